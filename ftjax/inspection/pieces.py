"""A row's tokens as text that a person can read: special tokens by name, trained ones marked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data.tokens.rendering import Tokenizer

_MANY = 8  # of one special token in a row are one piece: those of an image are hundreds
WHITE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


class Piece(NamedTuple):
    """One token, several that together make one character, or many of one special token."""

    text: str
    trained: bool  # predicted with loss
    special: str  # "bos", "eos", "special" (any other special token) or ""
    tokens: int  # how many


def pieces(tokens: Sequence[int], trained: np.ndarray, tokenizer: Tokenizer) -> list[Piece]:
    """The pieces of a document, in order; together they cover all its tokens.

    tokens: int [n]; trained: bool [n].
    """
    added = tokenizer.added_tokens_decoder
    special = {i for i in added if added[i].special} | set(tokenizer.all_special_ids)
    out, start = [], 0
    ids = [int(token) for token in tokens]
    while start < len(ids):
        stop = start + 1
        if ids[start] in special:
            text, kind = tokenizer.convert_ids_to_tokens(ids[start]), _kind(ids, start, tokenizer)
            while stop < len(ids) and ids[stop] == ids[start] and trained[stop] == trained[start]:
                stop += 1
            if stop - start < _MANY:
                stop = start + 1
            else:
                text = f"{text} × {stop - start}"
        else:
            kind, text = "", tokenizer.decode(ids[start:stop])
            # A character may be spread over several tokens, four bytes at most; a real U+FFFD stays as it is.
            while "\ufffd" in text and stop - start < 4 and stop < len(ids) and trained[stop] == trained[start]:
                if ids[stop] in special:
                    break
                stop += 1
                text = tokenizer.decode(ids[start:stop])
        out.append(Piece(text, bool(trained[start]), kind, stop - start))
        start = stop
    return out


def plain(shown: Sequence[Piece]) -> str:
    """For output without color: tokens separated by "|", trained ones between "[[" and "]]"."""
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
    """The text of a piece with its line breaks and tabs made visible, BOS and EOS named."""
    text = "".join(WHITE.get(char, char) + ("\n" if char == "\n" else "") for char in piece.text)
    return f"{text}({piece.special.upper()})" if piece.special in ("bos", "eos") else text


def _kind(ids: list[int], i: int, tokenizer: Tokenizer) -> str:
    # Only at the start: some templates begin every turn with the same token.
    if ids[i] == tokenizer.bos_token_id and set(ids[:i]) <= {ids[i]}:
        return "bos"
    return "eos" if ids[i] == tokenizer.eos_token_id else "special"
