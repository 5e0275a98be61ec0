"""Rows with images -> their documents, in which each image has as many tokens as the model makes of it."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data.format import images
from ftjax.data.format.example import Row
from ftjax.data.images import load
from ftjax.data.images.load import Size
from ftjax.data.images.rules import ImageRules, Shown
from ftjax.data.read.rows import Rows
from ftjax.data.tokens.rendering import Messages, Tokenizer
from ftjax.errors import UserError


class Pictures(NamedTuple):
    """The images of a row, in order.

    Attributes:
      references: see `images.load`.
      sizes: of each.
      tokens: how many tokens each has.
    """

    references: tuple[str, ...]
    sizes: tuple[Size, ...]
    tokens: tuple[int, ...]

    @property
    def digest(self) -> int:
        """64 bits of their names and sizes, wherever they lie; 0 where there are none."""
        if not self.references:
            return 0
        named = [[load.name_of(reference), *size] for reference, size in zip(self.references, self.sizes)]
        return int.from_bytes(hashlib.blake2b(json.dumps(named).encode(), digest_size=8).digest(), "little")

    def first(self, tokens: int) -> int | None:
        """How many of them have so many tokens together; None where no number of them has."""
        ends = [0, *np.cumsum(self.tokens).tolist()]
        return ends.index(tokens) if tokens in ends else None


NONE = Pictures((), (), ())


def pictures(row: Row, rules: ImageRules) -> Pictures:
    """The images of a row; reads their headers.

    Raises:
      UserError: with the row and the message; an image is missing, is none, or has a shape that the model cannot take.
    """
    references, sizes, tokens = [], [], []
    for name, i, message in images.of_record(row.fields):
        where = f"{row.origin}: {'message' if name == 'messages' else name} {i}"
        for reference in message["images"]:
            size = load.size(reference, where)
            try:
                tokens.append(rules.tokens(size.width, size.height))
            except ValueError as error:
                raise UserError(f"{where}: {load.told(reference)} has {error}; cut it or remove the row") from None
            references.append(reference)
            sizes.append(size)
    return Pictures(tuple(references), tuple(sizes), tuple(tokens)) if references else NONE


def stamps(rows: Rows, chunk: range) -> str:
    """Hex digest that changes when an image file of these rows is replaced; bad rows are left out."""
    found = []
    for i in chunk:
        with contextlib.suppress(UserError):  # told when the row is tokenized
            found += [load.stamp(reference) for reference in images.images_of(rows[i].fields)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def shown(row: Row, its: Pictures, rules: ImageRules) -> Row:
    """The row with `Shown` in place of its images, as the tokenizing of conversations takes them."""
    if not its.references:
        return row
    every = [Shown(rules.placeholder, rules.expanded(count)) for count in its.tokens]
    return Row(images.with_images(row.fields, every), row.origin)


def prompt(messages: Messages, rules: ImageRules, origin: str) -> tuple[Messages, Pictures]:
    """A checked conversation with `Shown` in place of its images, for `chat.render_prompt`, and the images.

    Errors are those of `pictures`.
    """
    row = Row({"messages": messages}, origin)
    its = pictures(row, rules)
    return shown(row, its, rules).fields["messages"], its


def check_tokenizer(rules: ImageRules, tokenizer: Tokenizer) -> None:
    """UserError where the tokenizer is not that of the model whose images have these rules."""
    for name, wanted in ((rules.token, rules.token_id), (rules.placeholder, None)):
        ids = tokenizer(name, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or (wanted is not None and ids != [wanted]):
            place = "" if wanted is None else f", with the id {wanted} of config.json"
            raise UserError(
                f"the tokenizer has no token {name}{place}, which stands for images; take the tokenizer that belongs "
                "to the model"
            )


def check_column(row: Row, raw: dict) -> None:
    """UserError where a row has a column of images, as `raw` has it, and no turn where one belongs."""
    if not images.images_of(row.fields) and images.column(raw) is not None:
        raise UserError(
            f"{row.origin}: has a column of images, and no place for one; write a part {{'type': 'image'}}, or "
            f"{images.TAG} in a turn whose content is a string, where each belongs, or leave out the column"
        )


def check_tokens(tokens: np.ndarray, its: Pictures, rules: ImageRules, origin: str) -> None:
    """UserError where a document has other tokens of images than those of the first of its row's."""
    count = int(np.count_nonzero(tokens == rules.token_id))
    if its.first(count) is None:
        raise UserError(
            f"{origin}: has {count} tokens {rules.token}, but its images have {sum(its.tokens)}; remove {rules.token} "
            "from the text of the row, and take the tokenizer that belongs to the model"
        )


def whole(tokens: np.ndarray, length: int, rules: ImageRules | None) -> int:
    """How many of the first `length` tokens stay so that no image is cut: one that ends after them is left out."""
    if rules is None or length >= len(tokens):
        return length
    pictured: Sequence[bool] = tokens[: length + 1] == rules.token_id
    while length and pictured[length] and pictured[length - 1]:
        length -= 1
    return length
