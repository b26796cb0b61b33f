"""What the server of http_throughput says: reasoning prose of one size, as chat text or as token ids, made before anybody asks.

    python -m tests.bench.replies --reply-bytes 16000

A process of its own that prints its port. Texts are drawn word after word from this repository's documentation, with numbers of
their own, so that words repeat as they do in prose and sentences do not: a tokenizer's cache of words, and a compressor, find
neither everything nor nothing. There are DISTINCT of them, told round and round; a reply costs the server a look-up, so that on a
machine with two cores the client is what is measured.
"""

import argparse
import asyncio
import itertools
import random
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.teacher.mock_server import PROSE, Asked, MockServer, Reply, completed, encoded, said

REPOSITORY = Path(__file__).parents[2]
DISTINCT = 256
VOCABULARY = 16_000
TAGS = ("<think>", "</think>", "<|im_end|>", "<|endoftext|>")
NUMBER = re.compile(r"\d+")


def documentation() -> list[Path]:
    return sorted([*(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md"])


@cache
def followers() -> dict[str, list[str]]:
    """Word -> the words that stand behind it in the documentation, as often as they do."""
    found = defaultdict[str, list[str]](list)
    for text in (PROSE, *(path.read_text() for path in documentation())):
        for word, after in itertools.pairwise(text.split()):
            found[word].append(after)
    return dict(found)


def prose(seed: int, letters: int) -> str:
    """ASCII of exactly so many letters, without think tags; the same for the same seed."""
    draw, after, words, size = random.Random(seed), followers(), list[str](), 0
    word = draw.choice(list(after))
    while size < letters:
        words.append(NUMBER.sub(lambda _: str(draw.randrange(10_000)), word))
        size += len(words[-1]) + 1
        word = draw.choice(after.get(word) or list(after))
    return " ".join(words).encode("ascii", "replace").decode().replace("think>", "think")[:letters]


@cache
def train_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of a real one's kind: byte-level BPE that splits at words, and one id for each tag."""
    sources = sorted(path for folder in ("data", "teacher", "train", "student") for path in (REPOSITORY / folder).rglob("*.py"))
    bpe = ByteLevelBPETokenizer()
    files = [str(path) for path in (*sources, *documentation())]
    bpe.train(files, vocab_size=VOCABULARY, special_tokens=list(TAGS[2:]), show_progress=False)
    backend = Tokenizer.from_str(bpe.to_str())
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS[:2]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}<think>"
    return tokenizer


class Teller:
    """The same texts to everybody: as chat text to who sends messages, as text with its ids (vLLM's `return_token_ids`) to who
    sends ids."""

    def __init__(self, reply_bytes: int) -> None:
        texts = [prose(seed, reply_bytes) for seed in range(DISTINCT)]
        half = reply_bytes // 2
        self.chats = itertools.cycle([Reply(body=encoded(said("stop", reasoning_content=text[:half], content=text[half:])))
                                      for text in texts])  # fmt: skip
        self.completions = itertools.cycle(
            [Reply(body=encoded(with_ids(f"{text[:half]}</think>{text[half:]}"))) for text in texts]
        )

    def __call__(self, asked: Asked) -> Reply:
        return next(self.completions if "prompt" in asked.body else self.chats)


def with_ids(text: str) -> dict[str, object]:
    """A completion with its text and its ids, stop token included."""
    ids = train_tokenizer().encode(f"{text}<|im_end|>", add_special_tokens=False)
    content = completed(ids)
    content["choices"][0]["text"] = text
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reply-bytes", type=int, default=16_000)
    teller = Teller(parser.parse_args().reply_bytes)

    async def forever() -> None:
        server = MockServer(teller)
        await server.serve(0)
        print(server.port, flush=True)
        await asyncio.Event().wait()

    asyncio.run(forever())


if __name__ == "__main__":
    main()
