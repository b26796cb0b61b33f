"""The peers of near_dedup: rensa and datasketch. Run with the Python of .bench/dedup.

    .bench/dedup/bin/python -P tests/bench/near_dedup_peers.py CORPUS.json

Reads the corpus (a JSON list of texts), says its versions, and then answers each line `PEER COUNT` on standard input with one
line of JSON: the processor's seconds from the first COUNT texts to the indices of those that repeat an earlier one, and these.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

THRESHOLD = 0.8
PERMUTATIONS = 128
SHINGLE_WORDS = 5

Shingling = Callable[[str], list[str]]


def shingles(text: str) -> list[str]:
    """Five words each, without case and punctuation."""
    return ngrams(re.findall(r"\w+", text.lower()))


def split_shingles(text: str) -> list[str]:
    """Five words each, without case, punctuation left on."""
    return ngrams(text.lower().split())


def ngrams(words: Sequence[str]) -> list[str]:
    return [" ".join(words[first : first + SHINGLE_WORDS]) for first in range(len(words) - SHINGLE_WORDS + 1)]


def rensa(texts: Sequence[str], shingling: Shingling = shingles) -> list[int]:
    """`Keep unique documents` of its README."""
    from rensa import RMinHashDeduplicator  # pyright: ignore[reportMissingImports]

    dedup = RMinHashDeduplicator(threshold=THRESHOLD, num_perm=PERMUTATIONS, use_lsh=True)
    keep = dedup.add_pairs((str(index), shingling(text)) for index, text in enumerate(texts))
    return [index for index, kept in enumerate(keep) if not kept]


def rensa_split(texts: Sequence[str]) -> list[int]:
    return rensa(texts, split_shingles)


def datasketch(texts: Sequence[str]) -> list[int]:
    """MinHashLSH of its documentation, answers confirmed by the signatures, which its batch generator makes fastest."""
    from datasketch import MinHash, MinHashLSH  # pyright: ignore[reportMissingImports]

    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    signatures: dict[int, MinHash] = {}
    repeated = []
    encoded: Iterable[list[bytes]] = ([shingle.encode() for shingle in shingles(text)] for text in texts)
    for number, signature in enumerate(MinHash.generator(encoded, num_perm=PERMUTATIONS)):
        if any(signature.jaccard(signatures[other]) >= THRESHOLD for other in index.query(signature)):
            repeated.append(number)
        else:
            index.insert(number, signature, check_duplication=False)
            signatures[number] = signature
    return repeated


PEERS: dict[str, Callable[[Sequence[str]], list[int]]] = {
    "rensa": rensa,
    "rensa_split": rensa_split,
    "datasketch": datasketch,
}


def main(corpus: Path) -> None:
    texts = json.loads(corpus.read_text())
    for peer in PEERS.values():  # imports and first-call costs
        peer(texts[:50])
    print(json.dumps({name: version(name) for name in ("rensa", "datasketch")}), flush=True)
    for line in sys.stdin:
        name, count = line.split()
        started = time.process_time()
        dropped = PEERS[name](texts[: int(count)])
        print(json.dumps({"seconds": time.process_time() - started, "dropped": dropped}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
