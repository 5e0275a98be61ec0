"""Completions that end where their text first has one of some strings, wherever the borders of tokens are.

The text is what the tokenizer decodes, special tokens left out. A string may begin inside of one token and end inside
of another, and byte-level tokenizers split characters too; so the text itself is looked at, by the host, and nothing is
compiled for it.
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerFast

from ftjax.errors import UserError

StopsAt = Callable[[Sequence[int]], bool]  # whether the last of these tokens ends a row; of those before it none did

UNFINISHED = "\ufffd"  # what bytes are decoded to that are no whole character
# Characters by which the text of a row's last tokens may be longer than their part of the whole text: bytes of a
# character at either border are decoded one by one, and a space at the beginning is left out.
_BORDER = 8
_LONGEST = 1000  # characters of a string, since as much of every row is looked at after each of its tokens


def stops_at(strings: Sequence[str], tokenizer: PreTrainedTokenizerFast, where: str = "--stop") -> StopsAt | None:
    """What `sampling.engine.Request.stops_at` is for these strings; None for none.

    The token that ends a row is the first one after which the row's text has one of the strings.

    where: what the user gave them by.

    Raises:
      UserError: an empty string, one of half a character, a very long one, or one that has a special token, which is
        no text.
    """
    check(strings, where)
    for special in tokenizer.all_special_tokens:
        if found := next((string for string in strings if special in string), None):
            raise UserError(
                f"{where}: {found!r} has the special token {special!r}, which is no part of the text; the model's end "
                "tokens end a completion anyway, so leave it out"
            )
    if not strings:
        return None
    longest = max(map(len, strings))

    def text(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    def ends(tokens: Sequence[int]) -> bool:
        count = longest + _BORDER  # of the last tokens, which are enough where each has a character
        while count < len(tokens) and len(text(tokens[-count:-1])) < longest + _BORDER:
            count *= 2
        last = text(tokens[-count:])
        return any(string in last for string in strings)

    return ends


def check(strings: Sequence[str], where: str) -> None:
    """UserError for strings that no text has, or every one."""
    for string in strings:
        if not isinstance(string, str) or not string or UNFINISHED in string:
            raise UserError(f"{where}: {string!r} is no text to stop at; use whole characters, such as '\\n\\n'")
        if len(string) > _LONGEST:
            raise UserError(f"{where}: a text to stop at has {len(string):,} characters; use up to {_LONGEST:,}")


def before(text: str, strings: Sequence[str]) -> str:
    """The text up to the string that is complete first, of several the longest; all of it where it has none."""
    found = [(place + len(string), place) for string in strings if (place := text.find(string)) >= 0]
    return text[: min(found)[1]] if found else text


def settled(text: str, strings: Sequence[str]) -> str:
    """The part of an unfinished text that `before` will keep, whatever follows."""
    kept = before(text, strings)
    if kept != text:
        return kept
    sizes = ((string, size) for string in strings for size in range(1, min(len(string), len(text) + 1)))
    begun = [size for string, size in sizes if text.endswith(string[:size])]
    return text[: len(text) - max(begun, default=0)]
