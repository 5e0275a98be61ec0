"""References of images -> their sizes, without decoding them, and their pixels.

A reference is a string: the absolute path of a file, or the image itself as "data:image/png;base64,...". Of a relative
path of a row it is the directory of the row's file, "/./" and that path.
"""

import base64
import binascii
import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

from ftjax.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 89_478_485  # at which Pillow warns of an image that is made to fill the memory
DATA = "data:"
_LONGEST_NAME = 1000  # characters
_TURNED = (5, 6, 7, 8)  # values of EXIF's orientation by which height and width change places
_ORIENTED = (b"eXIf", b"exif", b"tiff:Orientation")  # one of them stands in a PNG that says how it is turned


class Size(NamedTuple):
    """What is known of an image that is not decoded."""

    width: int  # pixels, upright
    height: int
    bytes: int  # of the file


def name_of(reference: str) -> str:
    """The name of an image as its row has it, wherever that lies: a path, or a digest of the image itself."""
    if reference.startswith(DATA):
        return hashlib.sha256(reference.partition(",")[2].encode()).hexdigest()[:32]
    return reference.rpartition("/./")[2]


def stamp(reference: str) -> list:
    """What changes when the file of an image is replaced; the reference alone where there is none."""
    if reference.startswith(DATA):
        return []  # its bytes are in the row
    try:
        status = os.stat(reference)
    except (OSError, ValueError):  # ValueError: what no path can be, such as one with NUL
        return [reference]
    return [reference, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def identity(reference: str) -> str:
    """What tells an image of this machine from others: its path, or a digest of the image itself."""
    return name_of(reference) if reference.startswith(DATA) else os.path.normpath(reference)


def told(reference: str) -> str:
    """An image in messages: its path."""
    return "an image in the row" if reference.startswith(DATA) else short(os.path.normpath(reference))


def short(path: str) -> str:
    """The start of a path or address too long to be one, which mostly is an image in base64."""
    if len(path) <= _LONGEST_NAME:
        return path
    return f"{path[:60]}... ({len(path):,} characters; an image itself is written {DATA}image/png;base64,...)"


def size(reference: str, where: str) -> Size:
    """The size of an image; reads no more than its header, of PNG and TIFF files all.

    Args:
      where: row and message, for messages.

    Raises:
      UserError: the file is missing or too large, or is no image.
    """
    with _opened(reference, where) as (image, length):
        if image.format == "TIFF":  # turned when it is decoded, and its size at once or then, by Pillow's version
            image.load()
        width, height = image.size
        if _orientation(image) in _TURNED:
            width, height = height, width
    return Size(width, height, length)


def pixels(reference: str, where: str) -> "Image":
    """The image in RGB, upright as its EXIF data say; its first frame, where there are several.

    Raises:
      UserError: as `size`, or it is damaged.
    """
    from PIL import ImageOps

    with _opened(reference, where) as (image, _):
        return ImageOps.exif_transpose(image).convert("RGB")


@contextlib.contextmanager
def _opened(reference: str, where: str) -> Iterator[tuple["Image", int]]:
    """An image, and how many bytes it has. Errors while it is read are about it."""
    import PIL.Image

    name = told(reference)
    try:
        source, length = _source(reference, where)
        with source, PIL.Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(where, name, image.width, image.height)
            yield image, length
    except FileNotFoundError:
        raise UserError(
            f"{where}: there is no image {name}; correct the path, which is relative to the file of the row, or remove "
            "the row"
        ) from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise UserError(f"{where}: {name} has more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # whatever Pillow says of damaged files
        what = getattr(error, "strerror", None) or f"it is no {', '.join(FORMATS)}, or damaged"
        raise UserError(f"{where}: {name} cannot be read as an image ({what}); replace it or remove the row") from error


def _source(reference: str, where: str):
    """What Pillow can read an image from, and its bytes."""
    if not reference.startswith(DATA):
        status = os.stat(reference)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise UserError(f"{where}: {told(reference)} is no file; correct the path or remove the row")
        if status.st_size > MAX_BYTES:
            raise UserError(f"{where}: {told(reference)} has more than {MAX_BYTES >> 20} MiB; make it smaller")
        return open(reference, "rb"), status.st_size
    head, comma, text = reference.partition(",")
    if not comma or not head.endswith(";base64"):
        raise UserError(f"{where}: a data: image must be in base64; write data:image/png;base64,...")
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise UserError(f"{where}: a data: image is not base64 ({error}); write it again") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{where}: an image has more than {MAX_BYTES >> 20} MiB; make it smaller")
    return BytesIO(content), len(content)


def _orientation(image: "Image") -> int:
    """EXIF's orientation. A PNG may have it after its pixels, so Pillow decodes one that does not have it before."""
    if image.format == "PNG":
        place = image.fp.tell()
        image.fp.seek(0)
        content = image.fp.read()
        image.fp.seek(place)
        if not any(mark in content for mark in _ORIENTED):
            return 1
    return image.getexif().get(0x0112, 1)


def _too_large(where: str, name: str, width: int, height: int) -> UserError:
    return UserError(f"{where}: {name} has {width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller")
