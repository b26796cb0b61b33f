"""A set of digests that a million prompts fit into: 18 bytes a slot, half of the slots filled."""

SIZE = 16
_EMPTY = bytes(SIZE)


class DigestTable:
    """16-byte digests, each with the label (0 to 65,535) that it was first added with.

    An open hash table in one bytearray. A Python set of a million such digests takes 83 MB, this 38 MB.
    Digests must be uniform (a hash); the one of all zeros marks a free slot and cannot be stored.
    """

    def __init__(self, slots: int = 1 << 16) -> None:
        assert slots & (slots - 1) == 0, "a power of two"
        self._digests, self._labels = bytearray(slots * SIZE), bytearray(slots * 2)
        self._mask, self._count = slots - 1, 0

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes, label: int = 0) -> int | None:
        """None when `digest` is new and now stored; otherwise the label that it came with first."""
        slot = self._slot(digest)
        if self._digests[slot * SIZE : slot * SIZE + SIZE] == digest:
            return self._label(slot)
        self._put(slot, digest, label)
        if 2 * self._count > self._mask:
            self._grow()
        return None

    def find(self, digest: bytes) -> int | None:
        """The label of a stored digest, None of any other."""
        slot = self._slot(digest)
        return self._label(slot) if self._digests[slot * SIZE : slot * SIZE + SIZE] == digest else None

    def _slot(self, digest: bytes) -> int:
        """Where `digest` stands, or the free slot where it would."""
        assert len(digest) == SIZE and digest != _EMPTY
        slot, digests, mask = int.from_bytes(digest[:8], "little") & self._mask, self._digests, self._mask
        while (found := digests[slot * SIZE : slot * SIZE + SIZE]) != digest and found != _EMPTY:
            slot = (slot + 1) & mask
        return slot

    def _label(self, slot: int) -> int:
        return int.from_bytes(self._labels[2 * slot : 2 * slot + 2], "little")

    def _put(self, slot: int, digest: bytes, label: int) -> None:
        self._digests[slot * SIZE : slot * SIZE + SIZE] = digest
        self._labels[2 * slot : 2 * slot + 2] = label.to_bytes(2, "little")
        self._count += 1

    def _grow(self) -> None:
        larger = DigestTable(2 * (self._mask + 1))
        for slot in range(self._mask + 1):
            digest = bytes(self._digests[slot * SIZE : slot * SIZE + SIZE])
            if digest != _EMPTY:
                larger._put(larger._slot(digest), digest, self._label(slot))
        self._digests, self._labels, self._mask = larger._digests, larger._labels, larger._mask
