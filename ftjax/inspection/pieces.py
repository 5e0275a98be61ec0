"""A row's tokens as text that a person can read: special tokens by name, those that are trained on marked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WHITE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


class Piece(NamedTuple):
    """One token, or the few that only together make a character.

    Attributes:
      text: as it is decoded.
      trained: is it predicted with loss?
      special: "bos", "eos", "special" (any other special token) or "".
      tokens: how many tokens it is.
    """

    text: str
    trained: bool
    special: str
    tokens: int


def pieces(tokens: Sequence[int], trained: np.ndarray, tokenizer) -> list[Piece]:
    """The pieces of an example, in order; together they are all its tokens."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    found, start = [], 0
    ids = [int(token) for token in tokens]
    while start < len(ids):
        stop = start + 1
        if ids[start] in special:
            text, kind = tokenizer.convert_ids_to_tokens(ids[start]), _kind(ids, start, tokenizer)
        else:
            kind, text = "", tokenizer.decode(ids[start:stop])
            # A character may be spread over several tokens, four bytes at most; a real U+FFFD stays as it is.
            while "\ufffd" in text and stop - start < 4 and stop < len(ids) and trained[stop] == trained[start]:
                longer = tokenizer.decode(ids[start : stop + 1])
                if ids[stop] in special:
                    break
                stop, text = stop + 1, longer
        found.append(Piece(text, bool(trained[start]), kind, stop - start))
        start = stop
    return found


def plain(shown: Sequence[Piece]) -> str:
    """For places without color: tokens separated by "|", what is trained on between "[[" and "]]"."""
    out, inside = [], False
    for piece in shown:
        text = visible(piece)
        if piece.trained != inside:
            out.append("[[" if piece.trained else "]]")
        elif out:
            out.append("|")
        out.append(text)
        inside = piece.trained
    return "".join(out) + ("]]" if inside else "")


def visible(piece: Piece) -> str:
    """The piece with its line breaks and tabs made visible, BOS and EOS named."""
    text = "".join(WHITE.get(char, char) + ("\n" if char == "\n" else "") for char in piece.text)
    return f"{text}({piece.special.upper()})" if piece.special in ("bos", "eos") else text


def _kind(ids: list[int], at: int, tokenizer) -> str:
    if ids[at] == tokenizer.bos_token_id and set(ids[:at]) <= {ids[at]}:  # some begin every turn with it: not that
        return "bos"
    return "eos" if ids[at] == tokenizer.eos_token_id else "special"
