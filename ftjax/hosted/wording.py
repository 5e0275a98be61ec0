"""Tokens -> text as they come: whole characters, and nothing of what a stop string ends."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from ftjax.sampling import stop_strings
from ftjax.sampling.request import Completion

WINDOW, KEPT = 64, 8  # tokens that are decoded together, and those of them after which the next ones are


class Token(NamedTuple):
    """A token of a text: where it begins and ends there, in characters; a part of a character is empty.

    likeliest: the tokens that were likeliest in its place, and their logps.
    """

    id: int
    logp: float
    start: int
    end: int
    likeliest: Sequence[tuple[int, float]]


class Text:
    """The text of one completion; `add` its tokens, and `finish` it.

    What `add` and `finish` return are parts of the text that stand whatever follows; together they are `text`. It is
    what the tokenizer decodes of all tokens, without special tokens and up to the first stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        self._special = special_tokens(tokenizer)
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that are in `_raw`
        self._raw = ""  # the text of whole characters
        self.text = ""
        self.cut = False  # whether a stop string ended it
        self.tokens: list[Token] = []
        self._taken = 0  # how many of them

    def add(
        self,
        tokens: Sequence[int],
        logps: Sequence[float] = (),
        likeliest: Sequence[Sequence[tuple[int, float]]] | None = None,
    ) -> str:
        for number, token in enumerate(tokens):
            start = len(self._raw)
            if token not in self._special:
                self._decode(token)
            how_likely, others = logps[number] if logps else 0.0, likeliest[number] if likeliest else ()
            self.tokens.append(Token(token, how_likely, start, len(self._raw), others))
        return self._settle(stop_strings.settled)

    def finish(self) -> str:
        """The rest: also what is no whole character, and what might have been the beginning of a stop string."""
        if self._window:
            self._raw += self._read()[self._shown :]
            self._shown = len(self._read())
        part = self._settle(stop_strings.before)
        self.cut = self.text != self._raw
        if self.cut:
            self.tokens = [token for token in self.tokens if token.start < len(self.text)]
        return part

    def take(self, until: int | None = None) -> list[Token]:
        """The tokens that were not taken yet, up to a place in the text; None: all."""
        out = []
        for token in self.tokens[self._taken :]:
            if until is not None and token.end > until:
                break
            out.append(token)
        self._taken += len(out)
        return out

    def _settle(self, how: Callable[[str, Sequence[str]], str]) -> str:
        # What came before is settled, so that stop strings begin after it.
        rest = how(self._raw[len(self.text) :], self._stops) if not self.cut else ""
        self.text += rest
        return rest

    def _decode(self, token: int) -> None:
        self._window.append(token)
        text = self._read()
        if text.endswith(stop_strings.UNFINISHED):
            return
        self._raw += text[self._shown :]
        self._shown = len(text)
        if len(self._window) % WINDOW == 0:
            self._shorten()

    def _shorten(self) -> None:
        """Lets go of what the next tokens' text does not depend on: it begins with a whole character again."""
        for start in range(len(self._window) - KEPT, 0, -1):
            text = self._read(start)
            if not text.startswith(stop_strings.UNFINISHED):
                self._window, self._shown = self._window[start:], len(text)
                return

    def _read(self, start: int = 0) -> str:
        return self._tokenizer.decode(self._window[start:], clean_up_tokenization_spaces=False)


def ending(completion: Completion) -> str:
    """OpenAI's finish_reason."""
    return "stop" if completion.stopped else "length"


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Those that no text shows."""
    return frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
