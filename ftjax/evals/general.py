"""General text, on which a model is measured that is trained on something else: what ships, or any source."""

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from ftjax.config import SHIPPED
from ftjax.data.format.example import Row
from ftjax.data.format.formats import kind_of
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens.chat import tokenize
from ftjax.data.tokens.masks import encode
from ftjax.data.tokens.rendering import Tokenizer
from ftjax.errors import UserError
from ftjax.evals.likelihood import Item

FOLDER = Path(__file__).parent / "shipped"
MOST = 1000  # rows of a source, unless its `limit` says otherwise
METRICS = "eval_general/"  # before the names of what is recorded during training
OF_ALL = ("loss", "change", "kl")  # what is recorded beside the categories, which must have other names


class Text(NamedTuple):
    """One text to measure.

    Attributes:
      category: what it is counted with, such as "news" or "german".
      language: such as "en"; "" where it is not known.
      item: of a `text` all tokens but the first, of a conversation its last answer after what precedes it.
    """

    category: str
    language: str
    item: Item

    @property
    def tokens(self) -> int:
        return len(self.item.continuation)


def read(entries: Iterable[dict[str, Any]], tokenizer: Tokenizer, positions: int) -> list[Text]:
    """The texts of sources, each an entry as `config.source_entry` gives it, cut to the model's `positions`.

    Rows may have the fields `category` and `language`; without one the category is the name of the source. "general"
    is what ships: 81 texts in 11 languages, written for this project.

    Raises:
      UserError: what reading and tokenizing raise; a row that is neither text nor a conversation, or too short.
    """
    texts = []
    for entry in entries:
        source = entry["source"]
        if "weight" in entry:
            raise UserError(f"config.evaluate.general: {source} is measured, which knows no 'weight'; leave it out")
        where = str(FOLDER / "texts.jsonl") if source == SHIPPED else source
        rows = read_sources([{"limit": MOST, **entry, "source": where}])
        for i in range(len(rows)):
            raw, item = rows.raw(i), _item(rows[i], tokenizer)
            category = str(raw.get("category") or _name(source))
            if category in OF_ALL:
                raise UserError(f"{rows.origin(i)}: the category {category!r} has the name of a metric; use another")
            texts.append(Text(category, str(raw.get("language") or ""), shortened(item, positions)))
    return texts


def is_category(metric: str) -> bool:
    """Whether a metric is that of one category of general text."""
    return metric.startswith(METRICS) and metric.removeprefix(METRICS) not in OF_ALL


def within(texts: Sequence[Text], tokens: int, longest: int) -> list[Text]:
    """Of texts cut to `longest` tokens the first of each category, then the second of each, up to `tokens` in all.

    At least one.
    """
    turns, met = [], {}
    for text in texts:
        met[text.category] = met.get(text.category, 0) + 1
        turns.append(met[text.category])
    chosen, used = [], 0
    for index in np.argsort(turns, kind="stable"):
        text = texts[index]._replace(item=shortened(texts[index].item, longest))
        used += sum(map(len, text.item))
        if chosen and used > tokens:
            break
        chosen.append(text)
    return chosen


def shortened(item: Item, longest: int) -> Item:
    """The item with at most `longest` tokens: of a long context the end, of the continuation the beginning."""
    context, continuation = item
    if len(context) + len(continuation) <= longest:
        return item
    context = context[-max(longest // 2, longest - len(continuation)) :]
    return Item(context, continuation[: longest - len(context)])


def _item(row: Row, tokenizer: Tokenizer) -> Item:
    kind = kind_of(row.fields)
    if kind == "text":  # as it stands: whether a text ends here is none of its words
        tokens = np.asarray(encode([row.fields["text"]], tokenizer, add_special_tokens=True)[0], np.int32)
        if len(tokens) < 2:
            raise UserError(f"{row.origin}: the text is a single token, of which nothing can be predicted; remove it")
        return Item(tokens[:1], tokens[1:])
    if kind not in ("chat", "prompt_completion"):
        raise UserError(f"{row.origin}: is a row of {kind}; general text is `text` rows or conversations")
    example = tokenize(row, tokenizer, train_on="last")
    places = np.flatnonzero(example.trained)
    return Item(example.tokens[: places[0]], example.tokens[places[0] : places[-1] + 1])


def _name(source: str) -> str:
    return PurePath(source.partition("?")[0].rpartition(":")[2].rstrip("/")).name.partition(".")[0] or source
