"""From kept bytes to a completion: the one parser, for a reply that just came and for one of last week."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from data.chat import Dialect, dialect_of
from data.engine import Completion, Request
from data.records import FinishReason
from teacher.http.raw import Line, unpack
from teacher.http.replies import Reply, read_body, read_stream

ENDED: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
REFUSALS = {"content_filter": "content_filter", "tool_calls": "tool_call", "function_call": "tool_call"}
"""Reasons of a server's own that no second ask would change, and our words for them."""
CONTINUED = ("torn", "unfinished")
"""Aborts that hold what there is of the output."""


class Prices(NamedTuple):
    """Dollars per million tokens."""

    prompt: float = 0.0
    output: float = 0.0

    def of(self, prompt_tokens: int, output_tokens: int) -> float:
        """Dollars."""
        return (prompt_tokens * self.prompt + output_tokens * self.output) / 1e6


class Reading(NamedTuple):
    """completion, as HttpEngine.read gives it. model: what the reply says answered; "" when it does not. detail: the server's
    words."""

    completion: Completion
    model: str = ""
    detail: str = ""


class Output(NamedTuple):
    """Ids of one output, all that the ask continued included. logprobs: as many as the servers sent."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def fitted(self) -> "Output":
        """With one logprob an id, or none: a server's belong to its own tokens, which its text need not give back."""
        return self if len(self.logprobs) == len(self.ids) else Output(self.ids, ())


class Reader:
    """Safe in threads: it holds nothing that changes, and the tokenizer releases the GIL while it encodes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prices: Prices = Prices()) -> None:  # noqa: B008  (immutable)
        self.dialect: Dialect = dialect_of(tokenizer)
        self.prices = prices
        self.stop_ids = self.dialect.stop_ids(tokenizer)
        self.vocabulary = len(tokenizer)
        self._tokenizer = tokenizer
        self._eos: int | None = tokenizer.eos_token_id  # type: ignore[assignment]
        self._backend = _plain_backend(tokenizer)
        self.close_ids = self.encode("</think>")
        self.open_ids = self.encode("<think>")

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of `text`, special tokens in it recognised and none added."""
        if self._backend is None:
            return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=False)  # without offsets: a fifth less
        return tuple(encoding.ids)

    def read(self, request: Request, raw: bytes) -> Reading:
        """What `raw` holds for `request`; whatever it holds instead is an abort, never an exception."""
        line = Line("", 0, 0.0, 0.0, 0)
        reply = Reply()
        try:
            line, body, _ = unpack(raw)
            reply = read_stream(body) if line.streamed else read_body(body)
            return self._reading(request, line, reply)
        except Exception as error:  # hostile bytes find every way to be wrong: nesting, huge numbers, types
            cost = self._cost(request, line, reply, 0)
            return Reading(_abort(request, line, "bad_reply", cost=cost), reply.model, detail=type(error).__name__)

    def _reading(self, request: Request, line: Line, reply: Reply) -> Reading:
        output = self.output(line, reply)
        cost = self._cost(request, line, reply, len(output.ids) - len(line.given))
        reason = ENDED.get(reply.reason)
        error = self._why_not(line, reply) if reason is None else ""
        if line.phase == "reasoning" and reason == "length":
            error = "unfinished"
        if error or reason is None:
            kept = output if error in CONTINUED else Output((), ())
            return Reading(_abort(request, line, error, kept, cost, exact=bool(reply.ids)), reply.model, reply.error)
        if reason == "stop":
            output = self._with_stop(request, output, reply)
        ids, logprobs = output.fitted()
        completion = Completion(
            request.request_id, ids, logprobs, reason, line.started_at, line.seconds, cost=cost, exact=bool(reply.ids)
        )
        return Reading(completion, reply.model)

    def _why_not(self, line: Line, reply: Reply) -> str:
        """Why the output has no end that we know. A JSON body that closes is whole, wherever its connection was cut; a stream
        is whole when it gave its reason to end."""
        if reply.reason in REFUSALS:
            return REFUSALS[reply.reason]
        return "torn" if line.streamed and reply.choices and not reply.reason else "bad_reply"

    def output(self, line: Line, reply: Reply) -> Output:
        """The output so far. ids are the server's where it returns them, else those of its text, counted by our tokenizer:
        servers report 0 reasoning tokens when `<think>` is part of the prompt.

        Raises:
            ValueError: ids that the teacher's vocabulary does not have.
        """
        new = tuple(reply.ids) or self.encode(reply.spoken(self.dialect.prompt_opens_think and not line.given))
        if new and (set(map(type, new)) != {int} or min(new) < 0 or max(new) >= self.vocabulary):
            raise ValueError("token ids outside the teacher's vocabulary")
        return Output((*line.given, *new), (*line.given_logprobs, *reply.logprobs))

    def _with_stop(self, request: Request, output: Output, reply: Reply) -> Output:
        """The output with the stop token at its end, which most texts do not show (that of `transformers serve` does) and some
        servers' ids leave out. One that a stop string ended keeps that string, as the other engines do, and has no stop
        token."""
        ends = {*request.stop_ids, *self.stop_ids, self._eos}
        if output.ids and output.ids[-1] in ends:
            return output
        match reply.stop_reason:
            case str(text) if text in request.stop_strings:
                last = () if reply.ids else self.encode(text)
            case str(text) if (named := self.encode(text)) and len(named) == 1 and named[0] in ends:
                last = named
            case int(token) if token in ends:
                last = (token,)
            case _:
                last = self.stop_ids[:1]
        return Output(output.ids + last, output.logprobs)

    def _cost(self, request: Request, line: Line, reply: Reply, new: int) -> float:
        """Dollars, of the tokens that the server bills or, when it does not say, of ours."""
        ours = len(request.prompt_ids) + len(line.given)
        prompt, output = reply.usage or (ours, new)
        return self.prices.of(prompt, output)


def _plain_backend(tokenizer: PreTrainedTokenizerBase):  # noqa: ANN202  (tokenizers.Tokenizer, which pure-Python ones lack)
    """The Rust tokenizer, without the truncation and padding that a tokenizer.json may switch on."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    if backend.truncation is None and backend.padding is None:
        return backend
    plain = Tokenizer.from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def _abort(
    request: Request, line: Line, error: str, output: Output = Output((), ()), cost: float = 0.0,  # noqa: B008  (immutable)
    *, exact: bool = True,
) -> Completion:  # fmt: skip
    ids, logprobs = output.fitted()
    return Completion(
        request.request_id, ids, logprobs, "abort", line.started_at, line.seconds, error=error, cost=cost, exact=exact
    )
