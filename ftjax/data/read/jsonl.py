"""JSON Lines: the index of the rows is made by looking for line ends; a row is parsed when it is asked for."""

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np

from ftjax.data.read.files import DataFile
from ftjax.data.read.spans import Spans, content, parse_object


class Jsonl:
    """The rows of a JSON Lines file; lines of nothing but white space are none. `Records` of `rows`.

    Opening reads the file once, in blocks, and holds 8 bytes a row (16 where there are blank lines).
    """

    def __init__(self, file: DataFile):
        self._spans = Spans(file, *_index(content(file)))

    def __len__(self) -> int:
        return len(self._spans)

    def origin(self, i: int) -> str:
        return self._spans.place(i)

    def __getitem__(self, i: int) -> dict:
        origin = self.origin(i)
        return parse_object(self._spans.text(i, origin), origin)

    def digest(self) -> str:
        return self._spans.digest


def _index(blocks: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Starts of the rows and the end, their lines (None where no line is blank) and the digest, as `Spans` has them."""
    digest = hashlib.sha256()
    starts, lines = array("q"), None  # grow in place: a list of arrays would need twice the memory when joined
    offset = start = done = 0  # of the block, of the line that is not yet at its end, and the lines before it
    blank = True  # whether that line has been white space so far
    for block in blocks:
        digest.update(block)
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        if len(ends):
            begins = ends[:-1] + 1
            empty = [
                int(k) + 1 for k in np.flatnonzero(data[begins] <= ord(" ")) if _is_blank(block, begins[k], ends[k + 1])
            ]
            if blank and _is_blank(block, 0, ends[0]):
                empty.insert(0, 0)
            if empty and lines is None:
                lines = array("q", range(1, done + 1))
            starts.frombytes(np.delete(np.append(start, begins + offset), empty).astype(np.int64).tobytes())
            if lines is not None:
                lines.frombytes(np.delete(np.arange(done + 1, done + 1 + len(ends)), empty).astype(np.int64).tobytes())
            done += len(ends)
            start, blank = offset + int(ends[-1]) + 1, True
        blank = blank and _is_blank(block, start - offset if len(ends) else 0, len(block))
        offset += len(block)
    if not blank:  # the last line may lack its line end
        starts.append(start)
        if lines is not None:
            lines.append(done + 1)
    starts.append(offset)
    numbers = None if lines is None else np.frombuffer(lines, np.int64)
    return np.frombuffer(starts, np.int64), numbers, digest.hexdigest()


def _is_blank(block: bytes, start: int, stop: int) -> bool:
    return not block[start:stop].strip()
