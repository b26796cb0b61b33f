"""Does a real server say what the student says? An exported folder, served on this machine's loopback and asked through the
openai client, must give the token ids that local generation gives."""

import logging
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from transformers import PreTrainedTokenizerBase

from configs.errors import Refused, UnusableInput
from configs.launch import die_with_parent
from data.chat import dialect_of, encode_prompt
from data.records import Message
from student.formats.base import Speaker
from student.matrix import agreed
from student.parity import LOGIT_BOUND

if TYPE_CHECKING:
    import openai
    from openai.types.chat.chat_completion import Choice

START_S, REQUEST_S, END_S = 600.0, 300.0, 15.0
NUM_NEW_TOKENS = 128


class Server(NamedTuple):
    """A program that serves a folder. command: with {path} and {port}. model: the name to ask for, with {path}."""

    name: str
    program: str
    command: tuple[str, ...]
    model: str = "{path}"


TRANSFORMERS = Server("transformers serve", "transformers", ("serve", "{path}", "--host", "127.0.0.1", "--port", "{port}"))
VLLM = Server("vllm serve", "vllm", (*TRANSFORMERS.command, "--served-model-name", "student"), "student")
LLAMA = Server("llama-server", "llama-server", ("-m", "{path}", "--host", "127.0.0.1", "--port", "{port}", "--jinja"), "student")


class Served(NamedTuple):
    """What one server said to `requests` chats. near_ties: answers that part from ours where our own lead is within rounding."""

    format: str
    server: str
    requests: int
    tokens: int
    near_ties: int


def servers_for(form: str) -> list[tuple[Server, str]]:
    """What is installed here for a format: vLLM before transformers for weights, llama.cpp for GGUF; and where it lies.

    Raises UnusableInput when nothing is.
    """
    wanted = [LLAMA] if form.startswith("gguf") else [VLLM, TRANSFORMERS]
    found = [(server, path) for server in wanted if (path := _program(server)) is not None]
    if not found:
        remedy = "put llama.cpp's llama-server on PATH" if form.startswith("gguf") else "pip install 'tracestill[serve]', or vLLM"
        names = " or ".join(server.name for server in wanted)
        raise UnusableInput(f"export --serve-check: nothing here serves {form}; expected {names}: {remedy}")
    return found


def _program(server: Server) -> str | None:
    """Beside this interpreter, or on PATH."""
    beside = Path(sys.executable).parent / server.program
    return str(beside) if beside.is_file() else shutil.which(server.program)


def check_server(
    server: Server, program: str, form: str, path: Path, speaker: Speaker, tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]], *, dtype: str, log: Path,
) -> Served:  # fmt: skip
    """path: the folder or file that is served. speaker: the same, here. log: where the server's words go.

    Raises:
        UnusableInput: the server does not start or does not answer.
        Refused: it says something else; the message names the request and the first token that differs.
    """
    stops = list(dialect_of(tokenizer).stop_ids(tokenizer))
    tokens = near_ties = 0
    with serving(server, program, path, log) as url:
        client = _client(url)
        model = server.model.format(path=path)
        for number, messages in enumerate(prompts):
            prompt = encode_prompt(tokenizer, messages)  # type: ignore[arg-type]
            expected = speaker.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, stop_ids=stops)
            served = _ids(tokenizer, _ask(client, model, messages, server, log), stops)
            ours = _ids(tokenizer, _text(tokenizer, expected), stops)
            tokens += len(ours)
            if served == ours:
                continue
            at = agreed(ours, served)
            if not is_near_tie(speaker, prompt, ours, served, at, dtype):
                raise Refused(
                    f"export --serve-check: {server.name} serves {form} otherwise than it was trained: request {number}, token "
                    f"{at}: {_shown(tokenizer, served, at)}, expected {_shown(tokenizer, ours, at)} (another template, other "
                    f"stops, or other weights; its log: {log})"
                )
            near_ties += 1
    return Served(form, server.name, len(prompts), tokens, near_ties)


@contextmanager
def serving(server: Server, program: str, path: Path, log: Path) -> Iterator[str]:
    """The server's base URL, once its port is open. It ends with this block, and with this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [program, *(word.format(path=path, port=port) for word in server.command)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
    try:
        deadline = time.monotonic() + START_S
        while not _is_open(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnusableInput(f"export --serve-check: {server.name} did not start on {path}; see {log}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _client(url: str) -> "openai.OpenAI":
    try:
        import openai
    except ImportError as error:
        raise UnusableInput(f"export --serve-check: {error}; expected: pip install 'tracestill[serve]'") from error
    for name in ("httpx", "httpx2"):  # a line a request otherwise
        logging.getLogger(name).setLevel(logging.WARNING)
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=REQUEST_S)


def _ask(client: "openai.OpenAI", model: str, messages: Sequence[Message], server: Server, log: Path) -> str:
    """A server that is loading its model says 503."""
    import openai

    deadline = time.monotonic() + START_S
    while True:
        try:
            reply = client.chat.completions.create(
                model=model, messages=[dict(message) for message in messages],  # type: ignore[misc]
                temperature=0.0, max_tokens=NUM_NEW_TOKENS,
            )  # fmt: skip
        except openai.APIStatusError as error:
            if error.status_code != 503 or time.monotonic() > deadline:
                raise UnusableInput(f"export --serve-check: {server.name} answers {error.status_code}; see {log}") from error
            time.sleep(0.5)
        except openai.APIError as error:
            raise UnusableInput(f"export --serve-check: no answer from {server.name} ({error.message}); see {log}") from error
        else:
            return whole_answer(reply.choices[0])


def whole_answer(choice: "Choice") -> str:
    """With the thought, which servers that parse it put aside. One that was cut off in its thought has not closed it."""
    message = choice.message
    answer, thought = message.content or "", getattr(message, "reasoning_content", None)
    if thought is None:
        return answer
    is_cut = choice.finish_reason == "length" and not answer
    return f"<think>{thought}" + ("" if is_cut else f"</think>{answer}")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, stops: Sequence[int]) -> list[int]:
    """Of an answer's text, which is all that a server gives; ours goes the same way, so that both are cut alike."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    return [token for token in ids if token not in stops]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def is_near_tie(speaker: Speaker, prompt: Sequence[int], ours: Sequence[int], served: Sequence[int], at: int, dtype: str) -> bool:
    """Whether our own model, at the first token that differs, prefers ours by no more than rounding explains."""
    if at >= min(len(ours), len(served)):
        return False
    logits_V = speaker.logits([*prompt, *ours[:at]])[-1]
    spread = float((logits_V - logits_V.mean()).square().mean().sqrt())
    return float(logits_V[ours[at]] - logits_V[served[at]]) <= 2 * LOGIT_BOUND[dtype] * spread


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], at: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(int(ids[at]))) if at < len(ids) else "the end"
