"""The kinds of rows that methods train on, and the documents that each kind is made of."""

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ftjax.data.format import formats, images
from ftjax.data.format.example import Document, Example, Row
from ftjax.data.format.prompt import prompt_of
from ftjax.data.images.rules import ImageRules
from ftjax.data.tokens import chat, pictured
from ftjax.data.tokens.pictured import Pictures
from ftjax.data.tokens.rendering import Tokenizer, Tools
from ftjax.errors import UserError, did_you_mean

Documents = dict[str, Document]  # by the names that a person sees, in their order in a batch


class Settings(NamedTuple):
    """What a config says about rows beside config.data."""

    step_separator: str = "\n"  # between the steps of an answer
    classes: tuple[str, ...] = ()
    room: int = 0  # tokens that are kept free after a prompt, for its completion
    tools: str = ""  # JSON schemas of the functions that prompts offer, which rows may offer some of; "" for none
    images: ImageRules | None = None  # how the model takes images; None: it takes none


PLAIN = Settings()


class RowKind(NamedTuple):
    """A kind of row."""

    documents: int  # how many an example has
    # row, ..., vocab_size, train_on, settings -> the documents of each of its examples, which are not cut yet. There
    # are several where a template rewrites earlier answers (`chat.tokenize_answers`).
    tokenize: Callable[..., list[Documents]]
    labeled: bool = False  # whether its documents have labels
    answered: bool = True  # whether its rows hold what is trained; else the model writes that itself
    images: bool = False  # whether its rows may have images


def _conversation(
    row: Row, tokenizer: Tokenizer, vocab_size: int | None, train_on: str, settings: Settings = PLAIN
) -> list[Documents]:
    examples = chat.tokenize_answers(row, tokenizer, vocab_size, train_on)
    return [{"": Document(example.tokens, example.trained)} for example in examples]


def _pair(
    row: Row, tokenizer: Tokenizer, vocab_size: int | None, train_on: str, settings: Settings = PLAIN
) -> list[Documents]:
    sides = chat.tokenize_preference(row, tokenizer, vocab_size)
    return [{name: Document(side.tokens, side.trained) for name, side in zip(("chosen", "rejected"), sides)}]


def _ranked(
    row: Row, tokenizer: Tokenizer, vocab_size: int | None, train_on: str, settings: Settings = PLAIN
) -> list[Documents]:
    margin = row.fields.get("margin", 0.0)
    labels = {"chosen": margin, "rejected": margin - (1 - row.fields.get("probability", 1.0))}
    return [
        {name: document._replace(labels=_everywhere(document, labels[name])) for name, document in pair.items()}
        for pair in _pair(row, tokenizer, vocab_size, train_on)
    ]


def _labeled(
    row: Row, tokenizer: Tokenizer, vocab_size: int | None, train_on: str, settings: Settings = PLAIN
) -> list[Documents]:
    example, good = chat.tokenize_unpaired(row, tokenizer, vocab_size), row.fields["label"]
    document = Document(example.tokens, example.trained)
    return [{"good" if good else "bad": document._replace(labels=_everywhere(document, 1.0 if good else -1.0))}]


def _stepwise(
    row: Row, tokenizer: Tokenizer, vocab_size: int | None, train_on: str, settings: Settings = PLAIN
) -> list[Documents]:
    example, labels = chat.tokenize_stepwise(row, tokenizer, vocab_size, settings.step_separator)
    return [{"": Document(example.tokens, example.trained, labels)}]


def _classified(
    row: Row, tokenizer: Tokenizer, vocab_size: int | None, train_on: str, settings: Settings = PLAIN
) -> list[Documents]:
    example = chat.tokenize_classified(row, tokenizer, vocab_size)
    document, label = Document(example.tokens, example.trained), row.fields["label"]
    classes = settings.classes
    index = _index(label, classes)
    if index is None:
        raise UserError(
            f"{row.origin}: label is {label!r}, which is no name of config.objective.classes="
            f"{classes!r}{did_you_mean(label, classes)}"
        )
    return [{classes[index]: document._replace(labels=_everywhere(document, index))}]


def _prompt(
    row: Row, tokenizer: Tokenizer, vocab_size: int | None, train_on: str, settings: Settings = PLAIN
) -> list[Documents]:
    fields = prompt_of(row.fields, row.origin)
    turns = fields.get("messages") or fields["prompt"]
    tokens = chat.render_prompt(turns, tokenizer, offered(fields, settings.tools, row.origin), row.origin)
    return [{"": Document(tokens, np.zeros(len(tokens), bool))}]


def offered(fields: dict, tools: str, origin: str) -> Tools:
    """What a prompt, of `prompt_of`, offers: the tools of its row, else all of `Settings.tools`.

    Raises:
      UserError: the row offers one that there is no function for.
    """
    own, schemas = fields.get("tools"), json.loads(tools or "[]")
    known = [schema["function"]["name"] for schema in schemas]
    for tool in own if own and known else ():
        if (name := tool["function"]["name"]) not in known:
            raise UserError(f"{origin}: offers the tool {name!r}, which is not in config.rollouts.tools; add it there")
    return own or schemas or None


def _index(label: str, classes: tuple[str, ...]) -> int | None:
    """Which class a label is, None where it is none of them: by its name, or else by its number, as which true is 1."""
    number = {"true": 1, "false": 0}.get(label.lower())
    names = [label]
    if number is not None:  # readers may have made it of another spelling
        names += [name for name in classes if name.lower() == label.lower()] + [str(number)]
    if named := [classes.index(name) for name in names if name in classes]:
        return named[0]
    index = number if number is not None else int(label) if label.isdecimal() else len(classes)
    return index if index < len(classes) else None


def _everywhere(document: Document, label: float) -> np.ndarray:
    return np.full(len(document.tokens), label, np.float32)


ROW_KINDS = {
    "conversation": RowKind(1, _conversation, images=True),  # a text, a conversation, or a prompt with its completion
    "pair": RowKind(2, _pair, images=True),  # a prompt with a chosen and a rejected answer
    # The same with its margin, by how much chosen is better, 0 if not said. The label of rejected is less by the
    # probability that chosen is not the better one, 0 if not said.
    "ranked": RowKind(2, _ranked, labeled=True),
    "labeled": RowKind(1, _labeled, labeled=True),  # a prompt with an answer that is called good (+1) or bad (-1)
    "stepwise": RowKind(1, _stepwise, labeled=True),  # an answer in steps, +1 or -1 where one ends, 0 elsewhere
    "classified": RowKind(1, _classified, labeled=True),  # a text, or turns, and the index of its class
    "prompt": RowKind(1, _prompt, answered=False),  # what is asked, of a row with an answer or without
}


def documents(
    kind: str, row: Row, tokenizer: Tokenizer, vocab_size: int | None, train_on: str, settings: Settings
) -> tuple[list[Documents], Pictures]:
    """What `RowKind.tokenize` makes of a row of this kind, and the images that its documents have tokens of.

    Tokens of images are not trained.

    Raises:
      UserError: what that raises; the kind has no images, or an image cannot be taken.
    """
    tokenize, rules = ROW_KINDS[kind].tokenize, settings.images
    if rules is None:  # a row with images is refused where it is rendered
        return tokenize(row, tokenizer, vocab_size, train_on, settings), pictured.NONE
    places = {name for name, _, _ in images.of_record(row.fields)}
    if places and not ROW_KINDS[kind].images:
        able = " and ".join(name for name, one in ROW_KINDS.items() if one.images)
        raise UserError(
            f"{row.origin}: has images, which rows of the kind {kind!r} must not have; those of the kinds {able} may. "
            "Remove the row, or set objective.name to a method for these"
        )
    if late := places & {"chosen", "rejected"}:
        raise UserError(f"{row.origin}: {sorted(late)[0]} has an image; only the prompt of a pair may have some")
    its = pictured.pictures(row, rules)
    parts = tokenize(pictured.shown(row, its, rules), tokenizer, vocab_size, train_on, settings)
    for part in parts:
        for name, document in part.items():
            pictured.check_tokens(document.tokens, its, rules, row.origin)
            part[name] = document._replace(trained=document.trained & (document.tokens != rules.token_id))
    return parts, its


def kind_of(row: Row) -> str:
    """The kind that a row's fields make it, whatever the run trains it as."""
    kind = formats.kind_of(formats.check_row(row.fields, row.origin).fields)
    return {"preference": "pair", "unpaired": "labeled", "stepwise": "stepwise"}.get(kind, "conversation")


def divide(documents: Documents, max_length: int, origin: str) -> tuple[Example, ...]:
    """The examples of a text of any length: documents of at most `max_length` tokens that go on where the last ended.

    Each begins with the last token of the one before, so that every token but the first of all is predicted once.
    """
    (whole,) = documents.values()
    examples = []
    for start in range(0, max(1, len(whole.tokens) - 1), max_length - 1):
        tokens, trained = (part[start : start + max_length].copy() for part in (whole.tokens, whole.trained))
        trained[:1] = False  # nothing in its document predicts it
        examples.append(Example(tokens, trained, origin, (len(tokens),)))
    return tuple(examples)


def cut(documents: Documents, max_length: int, origin: str, images: ImageRules | None = None) -> Example:
    """The example of a row, each document cut to its first `max_length` tokens, independently of the others.

    With `images` to those before an image that would be cut.

    Raises:
      UserError: there is nothing to compare, because one of several documents has no trained token left, or two have
        become equal.
    """
    kept = {name: its.cut(pictured.whole(its.tokens, max_length, images)) for name, its in documents.items()}
    if len(kept) > 1:
        fix = f"raise data.max_length (now {max_length}), shorten the prompt or remove the row"
        for name, document in kept.items():
            if not document.trained.any():
                raise UserError(f"{origin}: {name} has no token of its answer within data.max_length; {fix}")
        names, (first, *others) = list(kept), kept.values()
        for name, other in zip(names[1:], others):
            if np.array_equal(first.tokens, other.tokens):
                cut_short = any(len(whole.tokens) > max_length for whole in documents.values())
                why = f"the same within data.max_length; {fix}" if cut_short else "the same; correct or remove the row"
                raise UserError(f"{origin}: {names[0]} and {name} are {why}")
    return Example.of(list(kept.values()), origin)
