"""Forms with a file in them (multipart/form-data), read as they arrive: no byte of the file is kept in memory.

Starlette's own reader takes the whole of a form before a route sees any of it, however large it is, into the system's
temporary directory. This one gives the file to whom it belongs, who may refuse it at any byte.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import NamedTuple

import anyio
from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from ftjax.hosted.refusals import Refused

_LONGEST_FIELD = 64 * 1024
_MOST_FIELDS = 16
OVERHEAD = 2**20  # bytes that a form may have beside its file: at least its fields, and what stands between them


_PATIENCE = 60  # seconds without a byte of a body after which its request is given up


def received(request: Request) -> Iterator[bytes]:
    """The body of a request as it arrives, for a thread of `anyio.to_thread`; Refused (408) where it stops arriving."""
    stream = request.stream()
    while chunk := anyio.from_thread.run(_next, stream):
        yield chunk


async def _next(stream: AsyncIterator[bytes]) -> bytes:
    try:
        with anyio.fail_after(_PATIENCE):
            return await anext(stream, b"")
    except TimeoutError:
        raise Refused(f"nothing of the body arrived for {_PATIENCE} seconds", status=408) from None


class Form(NamedTuple):
    """fields: the texts; filename: what the client calls its file."""

    fields: dict[str, str]
    filename: str


def read(content_type: str, chunks: Iterable[bytes], file: str, write: Callable[[bytes], None]) -> Form:
    """Reads a form, and writes what the file in it has.

    Args:
      content_type: the header, with the boundary.
      file: the name of the field with the file, of which there must be one.
      write: takes the pieces of the file.

    Raises:
      Refused: it is no form, has no file, ends early, or has a field twice.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refused(
            f"the body must be multipart/form-data with a boundary and a file in the field {file!r}; the content type "
            f"is {content_type!r}"
        )
    form = _Reader(file, write)
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        for chunk in chunks:
            parser.write(chunk)
    except FormParserError as error:
        raise Refused(f"the form cannot be read: {error}") from error
    if not form.complete:
        raise Refused("the form ends before its last boundary; send all of it")
    if form.filename is None:
        raise Refused(f"the form has no file; send it in the field {file!r}", param=file)
    return Form({name: _text(value, name) for name, value in form.fields.items()}, form.filename)


class _Reader:
    """What the parser calls, in the order in which a form has it."""

    def __init__(self, file: str, write: Callable[[bytes], None]):
        self._file, self._write = file, write
        self._header, self._value, self._disposition, self._field = b"", b"", b"", ""
        self.fields: dict[str, bytes] = {}
        self.filename: str | None = None
        self.complete = False

    def callbacks(self) -> dict[str, Callable]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._header, self._value, self._disposition = b"", b"", b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = _text(options.get(b"name", b""), "name of a field")
        if not self._field:
            raise Refused("a part of the form has no name; each needs Content-Disposition: form-data; name=...")
        if self._field in self.fields or (self._field == self._file and self.filename is not None):
            raise Refused(f"the form has {self._field!r} twice; send it once", param=self._field)
        if self._field == self._file:
            self.filename = _text(options.get(b"filename", b""), "filename")
        elif len(self.fields) == _MOST_FIELDS:
            raise Refused(f"the form has more than {_MOST_FIELDS} fields")
        else:
            self.fields[self._field] = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._field == self._file:
            self._write(data[start:end])
            return
        self.fields[self._field] += data[start:end]
        if len(self.fields[self._field]) > _LONGEST_FIELD:
            raise Refused(f"{self._field!r} is longer than {_LONGEST_FIELD:,} bytes", param=self._field)

    def _end(self) -> None:
        self.complete = True


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise Refused(f"{name} is not UTF-8", param=name) from error
