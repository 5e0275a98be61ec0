"""JSON Lines: the index of the rows is made by looking for line ends; a row is parsed when it is asked for.

Files of that name may hold their objects otherwise, as one list or over several lines each (`json_values`)."""

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np

from ftjax.data.read import files, json_values
from ftjax.data.read.files import DataFile
from ftjax.data.read.spans import Index, TextRows, parse_object


def open_jsonl(file: DataFile) -> TextRows:
    """The rows of a JSON Lines file; lines of nothing but white space are not rows.

    Opening reads the file once, in blocks, and holds 8 bytes a row (16 where there are blank lines).
    """
    if (layout := json_values.layout(file)) != "lines":
        return json_values.open_values(file, listed=layout == "list")
    return TextRows(file, _index(files.content(file)), parse_object)


def _index(blocks: Iterable[bytes]) -> Index:
    """The index of the lines that are not blank. Line numbers are only stored once a blank line was met."""
    digest = hashlib.sha256()
    starts, lines = array("q"), None  # grow in place: a list of arrays would need twice the memory when joined
    block_start = line_start = lines_before = 0  # byte offsets, and the number of complete lines before this block
    blank = True  # whether the line that goes on into the next block has been white space so far
    for block in blocks:
        digest.update(block)
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        if len(ends):
            begins = ends[:-1] + 1
            # A first byte above the space rules most lines out without slicing them.
            suspects = np.flatnonzero(data[begins] <= ord(" "))
            empty = [int(k) + 1 for k in suspects if _is_blank(block, begins[k], ends[k + 1])]
            if blank and _is_blank(block, 0, ends[0]):
                empty.insert(0, 0)
            if empty and lines is None:
                lines = array("q", range(1, lines_before + 1))
            block_starts = np.append(line_start, begins + block_start)
            starts.frombytes(np.delete(block_starts, empty).astype(np.int64).tobytes())
            if lines is not None:
                numbers = np.arange(lines_before + 1, lines_before + 1 + len(ends))
                lines.frombytes(np.delete(numbers, empty).astype(np.int64).tobytes())
            lines_before += len(ends)
            line_start, blank = block_start + int(ends[-1]) + 1, True
        blank = blank and _is_blank(block, line_start - block_start if len(ends) else 0, len(block))
        block_start += len(block)
    if not blank:  # the last line may lack its line end
        starts.append(line_start)
        if lines is not None:
            lines.append(lines_before + 1)
    starts.append(block_start)
    line_numbers = None if lines is None else np.frombuffer(lines, np.int64)
    return Index(np.frombuffer(starts, np.int64), line_numbers, digest.hexdigest())


def _is_blank(block: bytes, start: int, stop: int) -> bool:
    return not block[start:stop].strip()
