"""Images of messages: where rows have them, and how a message holds them.

A message with images has MARK in its content for each of them, and their references in `images`, in this order; for
the chat template `Shown` in place of these. See `images.load` for what a reference is.
"""

import base64
import os
from collections.abc import Iterator, Sequence
from urllib.parse import unquote, urlsplit

from ftjax.data.images.load import DATA, short
from ftjax.data.images.rules import Shown
from ftjax.errors import UserError

MARK = "\ufffc"  # Unicode's object replacement character
TAG = "<image>"  # what stands for an image in rows of LLaVA and LLaMA-Factory
COLUMNS = ("images", "image")
_TURNS = ("messages", "conversations", "prompt")
_SIDES = ("chosen", "rejected")
_MESSAGES = ("messages", "prompt", "completion", "completions", *_SIDES)  # of records
_KINDS = ("image", "image_url")  # of parts
_KEYS = ("image", "path", "url", "image_url")  # of parts, under which the image is
_ANSWERING = ("assistant", "gpt", "chatgpt", "model")  # whose turns have no images, and so no TAGs


def filled(fields: dict, origin: str) -> dict:
    """The fields of a row with the images of its column `images` or `image` in the turns where they belong.

    They fill image parts without an image, in order, or where there are none the TAGs in the turns' text. A row without
    either is left as it is: the column is not used.

    Raises:
      UserError: with the origin; not as many places as images.
    """
    given = column(fields)
    if given is None:
        return fields
    name = next((name for name in _TURNS if isinstance(fields.get(name), list)), None)
    sides = [side for side in _SIDES if isinstance(fields.get(side), list)]
    turns = [fields[key] for key in ([name] if name else sides)]
    bare = any(_is_bare(part) for its in turns for part in _parts(its))
    if not bare and not any(_has_tag(turn) for its in turns for turn in its):
        return fields
    images = [reference(image, f"{origin}: images[{i}]") for i, image in enumerate(_listed(given))]
    out = {key: value for key, value in fields.items() if key not in COLUMNS}
    used = 0
    if name:
        out[name], used = _fill(fields[name], images, 0, bare, f"{origin}: {name}")
    for side in sides:  # whole conversations, or the answers to a prompt
        out[side], count = _fill(fields[side], images, used, bare, f"{origin}: {side}")
        if not name and count != len(images):
            raise _unequal(origin, len(images), count)
    if name and used != len(images):
        raise _unequal(origin, len(images), used)
    return out


def column(fields: dict) -> object:
    """What a row has in its column `images` or `image`; None where these are empty."""
    return next((fields[name] for name in COLUMNS if _is_given(fields.get(name))), None)


def text_and_images(content: object, what: str) -> tuple[object, list[str]]:
    """A list of parts as one string, with MARK for each image, and the images; anything else as it is.

    Raises:
      UserError: a part of another type, an image that cannot be told, a text that has MARK itself beside images.
    """
    if not isinstance(content, list):
        return content, []
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _KINDS:
            texts.append(MARK)
            images.append(_of_part(part, what))
        else:
            its = f"a part of type {kind!r}" if kind != "text" else "a part of text that is no string"
            raise UserError(f"{what} has {its}; only parts of type 'text', 'image' and 'image_url' can be trained on")
    text = "".join(texts)
    if images and text.count(MARK) != len(images):
        raise UserError(f"{what} has the character U+FFFC, which stands for an image here; remove it")
    return text, images


def check(content: str, images: object, role: str, what: str) -> list:
    """The images of a message with this content, checked; may be those that `text_and_images` gave.

    Raises:
      UserError: an image that cannot be told, another number of them than of places, or an assistant's.
    """
    if not isinstance(images, list):
        raise UserError(f"{what}: images is a {type(images).__name__}; write it as a list")
    if role == "assistant":
        raise UserError(f"{what} has an image, but the role assistant; a model writes text only")
    if content.count(MARK) != len(images):
        raise UserError(
            f"{what} has {len(images)} images and {content.count(MARK)} places for them (U+FFFC); write its content "
            "as a list of parts of type 'text' and 'image'"
        )
    return [image if isinstance(image, Shown) else reference(image, f"{what}: images") for image in images]


def reference(image: object, what: str) -> str:
    """The reference of an image in any form that a row may have it in; a path stays as it is written.

    Raises:
      UserError: it is on the web, or of no known form.
    """
    if isinstance(image, dict):
        content = image.get("bytes")  # of a table, which may have been taken for text
        content = content.encode() if isinstance(content, str) else content
        image = content or image.get("path") or image.get("url")
    if isinstance(image, bytes):
        return f"{DATA}image;base64,{base64.b64encode(image).decode()}"
    if not isinstance(image, str) or not image:
        its = "empty" if image is None or image == "" else f"a {type(image).__name__}"
        raise UserError(f"{what} has an image that is {its}; write the path of its file, or data:image/png;base64,...")
    try:
        image.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} has an image with a lone surrogate (\\ud8xx) at character {error.start}") from None
    if image.startswith(DATA):
        return image
    if image.startswith(("file:///", "file://localhost/")):
        return unquote(urlsplit(image).path)
    if image.startswith("file://"):
        raise UserError(
            f"{what} has the image {short(image)}, which is of another machine; write file:/// and the whole path"
        )
    if "://" in image:
        raise UserError(
            f"{what} has the image {short(image)}, which is not on this machine; download it first and write the path "
            "of the file"
        )
    return image


def of_record(fields: dict) -> Iterator[tuple[str, int, dict]]:
    """The messages of a record that have images, each with the name of its list and its number there."""
    for name in _MESSAGES:
        turns = fields.get(name)
        for i, turn in enumerate(turns if isinstance(turns, list) else ()):
            if isinstance(turn, dict) and turn.get("images"):
                yield name, i, turn


def images_of(fields: dict) -> list[str]:
    """The images of a record, in order."""
    return [image for _, _, message in of_record(fields) for image in message["images"]]


def with_images(fields: dict, images: Sequence) -> dict:
    """The record with others in place of its images, in order."""
    out, left = dict(fields), list(images)
    for name, i, message in of_record(fields):
        count = len(message["images"])
        out[name] = [*out[name][:i], message | {"images": left[:count]}, *out[name][i + 1 :]]
        left = left[count:]
    return out


def placed(fields: dict, folder: str, origin: str) -> dict:
    """The record with the paths of its images made absolute; they are relative to `folder`, "" if there is none.

    "/./" stands before what the row says (`load.name_of`).
    """
    images = images_of(fields)
    return with_images(fields, [_absolute(image, folder, origin) for image in images]) if images else fields


def as_parts(content: str, images: Sequence, key: str = "image") -> list[dict]:
    """The content of a message with images as a list of parts, an image under `key`."""
    parts, left = [], list(images)
    for i, text in enumerate(content.split(MARK)):
        if i:
            parts.append({"type": "image", key: left.pop(0)})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _absolute(image: str, folder: str, origin: str) -> str:
    path = os.path.expanduser(image)
    if image.startswith(DATA) or os.path.isabs(path):
        return path
    if not folder:
        raise UserError(f"{origin}: the path of the image {image} is relative, to no file; write it whole")
    return f"{folder}/./{path}"


def _of_part(part: dict, what: str) -> str:
    given = next((part[key] for key in _KEYS if part.get(key) is not None), None)
    if given is None:
        raise UserError(
            f"{what} has a part of type {part['type']!r} without an image; write its path under 'image', or give the "
            "row a column `images` with one for each such part"
        )
    return reference(given, what)


def _is_given(column: object) -> bool:
    return column is not None and not (isinstance(column, str | list | tuple | dict) and not column)


def _listed(column: object) -> Sequence:
    return column if isinstance(column, list | tuple) else [column]


def _parts(turns: list) -> Iterator[object]:
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        yield from content if isinstance(content, list) else ()


def _has_tag(turn: object) -> bool:
    if not isinstance(turn, dict) or turn.get("from", turn.get("role")) in _ANSWERING:
        return False
    content = turn.get("value", turn.get("content"))
    return isinstance(content, str) and TAG in content


def _is_bare(part: object) -> bool:
    if not isinstance(part, dict) or part.get("type") != "image":
        return False
    return all(part.get(key) is None for key in _KEYS)


def _fill(turns: list, images: list[str], start: int, bare: bool, where: str) -> tuple[list, int]:
    """The turns with the images from `start` on, and how many of all are used up then."""
    out, used = [], start

    def take() -> str:
        nonlocal used
        used += 1
        return images[min(used, len(images)) - 1]  # too few are told when all places are counted

    for i, turn in enumerate(turns):
        key = "value" if isinstance(turn, dict) and "value" in turn else "content"
        content = turn.get(key) if isinstance(turn, dict) else None
        if bare and isinstance(content, list):
            parts = [part | {"image": take()} if _is_bare(part) else part for part in content]
            turn = turn | {key: parts}
        elif not bare and _has_tag(turn):
            if MARK in content:
                raise UserError(f"{where}[{i}] has the character U+FFFC, which stands for an image here; remove it")
            its = [take() for _ in range(content.count(TAG))]
            turn = turn | {key: content.replace(TAG, MARK), "images": its}
        out.append(turn)
    return out, used


def _unequal(origin: str, images: int, places: int) -> UserError:
    return UserError(
        f"{origin}: has {images} images and {places} places for them; write a part {{'type': 'image'}}, or {TAG} in "
        "the text, where each belongs"
    )
