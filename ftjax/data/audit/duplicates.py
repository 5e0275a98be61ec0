"""Rows that occur twice: exactly, by a hash; nearly, by MinHash signatures and locality-sensitive hashing.

The signature is a one-permutation MinHash (Li, Owen and Zhang 2012) over the 8-byte shingles of the text, densified
by rotation (Shrivastava and Li 2014): every shingle is hashed once, not once for each slot of the signature, which
makes it about twenty times as fast as `datasketch` (tests/data/audit/test_duplicates.py measures both). Signatures that
agree in a whole band are compared; the share of equal slots estimates the Jaccard similarity of the shingle sets. With
BANDS and BAND_SLOTS as here a pair of similarity 0.8 is found with probability 0.985, and one of 0.5 compared with
0.13.
"""

import hashlib
import tempfile
from collections.abc import Iterator

import numpy as np

SHINGLE = 8  # bytes
SPILL = 2**26  # bytes of signatures that are held in memory
SLOTS = 128  # of a signature; the estimate's standard deviation is at most 0.5 / sqrt(SLOTS) = 0.044
BAND_SLOTS = 7  # slots in a band
BANDS = SLOTS // BAND_SLOTS  # 18; two slots are in no band
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing
_MIX = np.uint64(0xBF58476D1CE4E5B9)  # of SplitMix64
_EMPTY = np.iinfo(np.uint32).max
_ODD = np.random.Generator(np.random.PCG64(0)).integers(1, 2**63, BAND_SLOTS, np.uint64) * np.uint64(2) + np.uint64(1)


def word_hash(*texts: str) -> int:
    """64-bit hash of the texts' words: white space at the ends and the length of its runs make no difference."""
    joined = "\x1f".join(" ".join(text.split()) for text in texts)
    return int.from_bytes(hashlib.blake2b(joined.encode(), digest_size=8).digest(), "little")


def exact_hash(*texts: str) -> int:
    """64-bit hash of the texts with their white space, which has a meaning in code."""
    joined = f"{[*map(len, texts)]}{''.join(texts)}"
    return int.from_bytes(hashlib.blake2b(joined.encode(), digest_size=8).digest(), "little")


def combined_hash(*hashes: int) -> int:
    """64-bit hash of several hashes in their order."""
    out = 0
    for value in hashes:
        out = ((out ^ value) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        out ^= out >> 32
    return out


def signature(text: str) -> np.ndarray:
    """uint32 [SLOTS]: the MinHash signature of a text; case and white space make no difference."""
    raw = " ".join(text.casefold().split()).encode().ljust(SHINGLE, b" ")
    windows = np.lib.stride_tricks.as_strided(np.frombuffer(raw, np.uint8), (len(raw) - SHINGLE + 1, SHINGLE), (1, 1))
    hashes = np.ascontiguousarray(windows).view(np.uint64)[:, 0] * _MULTIPLIER
    hashes ^= hashes >> np.uint64(29)
    hashes *= _MIX
    # The top 7 bits choose one of the 128 slots, 32 others are the value, of which each slot keeps the smallest.
    slot, value = (hashes >> np.uint64(57)).astype(np.intp), (hashes >> np.uint64(16)).astype(np.uint32)
    out = np.full(SLOTS, _EMPTY, np.uint32)
    np.minimum.at(out, slot, value)
    return _densified(out)


def _densified(values: np.ndarray) -> np.ndarray:
    """Empty slots take the value of the next full one, changed by their distance to it."""
    full = np.flatnonzero(values != _EMPTY)
    if len(full) == SLOTS:
        return values
    source = full[np.searchsorted(full, np.arange(SLOTS)) % len(full)]
    distance = (source - np.arange(SLOTS)) % SLOTS
    return values[source] + distance.astype(np.uint32) * np.uint32(0x85EBCA6B)


class Signatures:
    """The signatures of many texts; each time that SPILL bytes are in memory, they move into a temporary file."""

    def __init__(self):
        self._held, self._file, self.count = bytearray(), None, 0

    def add(self, text: str) -> None:
        self._held += signature(text).tobytes()
        self.count += 1
        if len(self._held) >= SPILL:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `take`)
            self._file.write(self._held)
            self._held.clear()

    def take(self) -> np.ndarray:
        """uint32 [count, SLOTS]. To be called once, at the end: the file of the signatures is closed."""
        if self._file is None:
            return np.frombuffer(self._held, np.uint32).reshape(self.count, SLOTS)
        with self._file as file:
            file.write(self._held)
            file.flush()
            return np.memmap(file, np.uint32, "r", shape=(self.count, SLOTS))  # stays valid when the file is closed


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float [...]: estimated Jaccard similarity of signatures [..., SLOTS]."""
    return (a == b).mean(-1)


def near_pairs(signatures: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (earlier, later) of row indices whose similarity is at least `threshold`, band by band, with repeats.

    Of rows that agree in a band, each is compared with the first and with its predecessor only: that connects the rows
    of a cluster, and takes linear time where thousands are alike.

    Args:
      signatures: uint32 [N, SLOTS]; may be a memory map.
    """
    for band in range(BANDS):
        keys = _band_keys(signatures, band)
        order = np.argsort(keys, kind="stable")
        ranked = keys[order]
        same = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1  # positions in `order` that continue a group
        first = np.searchsorted(ranked, ranked[same])  # where their groups start
        left = np.concatenate([order[same - 1], order[first]])
        right = np.concatenate([order[same], order[same]])
        yield _verified(signatures, signatures, left, right, threshold)


def near_across(ours: np.ndarray, theirs: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (row of `ours`, row of `theirs`) at least as similar as `threshold`, band by band, with repeats."""
    if not len(ours) or not len(theirs):
        return
    for band in range(BANDS):
        match = index_in(_band_keys(ours, band), _band_keys(theirs, band))
        matched = np.flatnonzero(match >= 0)
        yield _verified(ours, theirs, matched, match[matched], threshold)


def clusters(count: int, pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """int64 [count]: smallest index in the row's connected component, where pairs are the edges."""
    parent = np.arange(count)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for left, right in pairs:
        for a, b in zip(left.tolist(), right.tolist()):
            a, b = root(a), root(b)
            parent[max(a, b)] = min(a, b)
    for i in range(count):
        parent[i] = parent[parent[i]]  # a parent has a smaller index, so its own entry is final
    return parent


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """int64 [n]: for each of the uint64 keys [n] the index of the first key equal to it."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return first[group]


def index_in(wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """int64 [len(wanted)]: for each wanted key the index of the first of `keys` equal to it, -1 where there is none."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    position = np.minimum(np.searchsorted(ranked, wanted), len(keys) - 1)
    return np.where(ranked[position] == wanted, order[position], -1)


def _band_keys(signatures: np.ndarray, band: int) -> np.ndarray:
    part = np.asarray(signatures[:, band * BAND_SLOTS : (band + 1) * BAND_SLOTS]).astype(np.uint64)
    return (part * _ODD).sum(1, dtype=np.uint64) * _MIX


def _verified(ours, theirs, left, right, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    keep = np.zeros(len(left), bool)
    for start in range(0, len(left), 65536):  # at most 64 MiB of signatures at a time
        part = slice(start, start + 65536)
        keep[part] = similarity(ours[left[part]], theirs[right[part]]) >= threshold
    return left[keep], right[keep]
