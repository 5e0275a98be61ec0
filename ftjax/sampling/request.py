"""What is asked of the engine, and what comes of it: a request, its row on the way through, its completion."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.spec import DecoderSpec
from ftjax.models.vision import Images
from ftjax.sampling.pictured import Pictured
from ftjax.sampling.sampler import Sampling, Settings
from ftjax.sampling.slots import Rows
from ftjax.sampling.stop_strings import StopsAt

GREEDY = Sampling()
_LIKELIEST = np.int32, np.float32
LIKELIEST = 20  # tokens in whose place each was chosen, of requests for them

# A row's tokens so far -> which may be next: int32 [ceil(vocabulary / 32)], a bit for each token, the lowest first; one
# at least.
Allows = Callable[[Sequence[int]], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """The tokens generated for one prompt.

    logps, tempered_logps, full_logps: how likely each was, see sampler.Chosen; one more than there are tokens where a
    stop token ended it, of that.
    """

    tokens: np.ndarray  # int32 [at most max_new_tokens], without the stop token; with all that `stops_at` saw
    stopped: bool  # whether a stop token or `stops_at` ended it, and not max_new_tokens
    stop_token: int | None  # which
    logps: np.ndarray  # float32
    tempered_logps: np.ndarray  # float32
    full_logps: np.ndarray  # float32
    likeliest: np.ndarray | None = None  # int32 [.., LIKELIEST], of each; where they were asked for
    likeliest_logps: np.ndarray | None = None  # float32, their full_logps


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and how it is to be completed.

    prompt: int32 [length], length >= 1; or such a one with images, of which these are taken then.
    stop_tokens: any of these token ids ends it.
    stops_at: what else ends it, see stop_strings.stops_at.
    number: its randomness follows from (sampling.seed, number, number of tokens generated so far).
    bias: what is added to the logits of tokens.
    adapter: which of the engine's adapters; None: none of them.
    likeliest: whether the likeliest tokens in the place of each are wanted.
    images: see Pictured; None: there are none.
    allows: what the host allows next, see Allows; all rows beside such a one are then a token a dispatch, too.
    """

    prompt: np.ndarray | Pictured
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_tokens: Sequence[int] = ()
    number: int = 0
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stops_at: StopsAt | None = None
    adapter: int | None = None
    allows: Allows | None = None
    likeliest: bool = False
    images: Images | None = None

    def __post_init__(self):
        if isinstance(self.prompt, Pictured):
            object.__setattr__(self, "images", self.prompt.images)
            object.__setattr__(self, "prompt", self.prompt.tokens)

    def check(self, model: Decoder, name: str) -> None:
        """UserError for what the model cannot complete."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: use 1 or more")
        spec, length = model.spec, len(self.prompt)
        for what, tokens in (("stop tokens", self.stop_tokens), ("biased tokens", list(self.bias))):
            if outside := [token for token in tokens if not 0 <= token < spec.vocab_size]:
                raise UserError(f"{what} {outside} are outside the model's vocabulary of {spec.vocab_size}")
        if length == 0:
            raise UserError(f"{name} is empty; give it at least one token, such as the model's BOS token")
        if np.min(self.prompt) < 0 or np.max(self.prompt) >= spec.vocab_size:
            raise UserError(
                f"{name} has token ids outside the model's vocabulary of {spec.vocab_size}; "
                "encode it with the tokenizer that belongs to the model"
            )
        if length + self.max_new_tokens > spec.max_position_embeddings:
            raise UserError(
                f"{name} has {length} tokens, and with max_new_tokens={self.max_new_tokens} it exceeds the model's "
                f"{spec.max_position_embeddings} positions; shorten the prompt or lower max_new_tokens"
            )

    def rows(self) -> Rows:
        biased, biases = np.array(list(self.bias), np.int32), np.array(list(self.bias.values()), np.float32)
        stops = np.array(list(self.stop_tokens), np.int32)
        settings = Settings.of([self.sampling])
        turned = None if self.images is None else self.images.rope_positions
        shift = 0 if turned is None else int(turned.max()) + 1 - len(self.prompt)
        first = self.sampling.seed, self.number, self.max_new_tokens, self.row_adapter, shift
        return Rows(*first, settings, stops, biased, biases)

    @property
    def row_adapter(self) -> int:
        """As in Rows."""
        return -1 if self.adapter is None else self.adapter


class Row:
    """A request on its way."""

    def __init__(self, index: int, request: Request):
        self.index, self.request = index, request
        self.tokens: list[int] = []
        self.logps: list[list[float]] = []  # of each token, in the order of Chosen
        self.likeliest: list[list[list]] = []  # the same of what stands there, where it is wanted
        self.at_text = False  # whether `stops_at` ended it: the device may have gone on

    def note(self, tokens: np.ndarray, *logps: np.ndarray) -> None:
        """Adds what was chosen, up to where the text ends it."""
        stops_at = self.request.stops_at
        for token, *how_likely in zip(tokens.tolist(), *(part.tolist() for part in logps), strict=True):
            self.tokens.append(token)
            self.logps.append(how_likely[:3])
            if self.request.likeliest:
                self.likeliest.append(how_likely[3:])
            if stops_at is not None and self.stop_token is None and stops_at(self.tokens):
                self.at_text = True
                break

    @property
    def stop_token(self) -> int | None:
        return self.tokens[-1] if self.tokens and self.tokens[-1] in self.request.stop_tokens else None

    @property
    def text_tokens(self) -> list[int]:
        """Those without the stop token."""
        return self.tokens if self.stop_token is None else self.tokens[:-1]

    @property
    def stopped(self) -> bool:
        return self.at_text or self.stop_token is not None

    @property
    def ended(self) -> bool:
        return self.stopped or not self.left

    @property
    def left(self) -> int:
        """How many tokens may still be chosen."""
        return self.request.max_new_tokens - len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens that are in the cache, or will be before the next one is chosen."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def reach(self) -> int:
        """How long it may become."""
        return len(self.request.prompt) + self.request.max_new_tokens

    def long(self, spec: DecoderSpec) -> tuple[bool, ...]:
        """Which of LongRoPE's frequencies its keys have: of each rope whether the long ones."""
        return tuple(rope.long_after is not None and self.reach > rope.long_after for rope in spec.ropes)

    def key(self, spec: DecoderSpec) -> tuple[bytes, int, int, int]:
        """Rows of the same one leave the same in the cache. With LongRoPE that depends on how long they may become."""
        is_long = any(rope.long_frequencies is not None for rope in spec.ropes)
        prompt = np.asarray(self.request.prompt, np.int32).tobytes()
        pictured = 0 if self.request.images is None else id(self.request.images)
        return prompt, self.request.row_adapter, self.reach if is_long else 0, pictured

    def is_like(self, request: Request, long: tuple[bool, ...], spec: DecoderSpec) -> bool:
        """Whether the same tokens leave the same in the cache as of a request that has no images; long: its `long`."""
        pictured = self.request.images is not None or request.images is not None
        return not pictured and self.request.row_adapter == request.row_adapter and self.long(spec) == long

    def completion(self) -> Completion:
        logps = np.array(self.logps, np.float32).reshape(-1, 3).T
        made = Completion(np.array(self.text_tokens, np.int32), self.stopped, self.stop_token, *logps)
        if not self.likeliest:
            return made
        tokens, their = (np.array([both[i] for both in self.likeliest], dtype) for i, dtype in enumerate(_LIKELIEST))
        return dataclasses.replace(made, likeliest=tokens, likeliest_logps=their)


class Left(NamedTuple):
    """What a row that has ended left in its slot."""

    tokens: np.ndarray  # int32, whose keys and values are there
    adapter: int  # as in Rows; they are of it
    long: tuple[bool, ...]  # see Row.long
    row: int  # its index
    whole: bool  # whether only all of them can be gone on from

    def shared(self, prompt: np.ndarray) -> int:
        """How many tokens of a prompt, int32 [length], are there to go on from; never its last one."""
        there = self.tokens[: len(prompt) - 1]
        others = np.flatnonzero(there != prompt[: len(there)])
        length = int(others[0]) if len(others) else len(there)
        return 0 if self.whole and length < len(self.tokens) else length


def allowed_next(rows: Sequence[Row | None], vocabulary: int) -> np.ndarray | None:
    """int32 [rows, ceil(vocabulary / 32)] as Allows has them, all tokens of the others; None where no row asks."""
    asking = {slot: row for slot, row in enumerate(rows) if row is not None and row.request.allows is not None}
    if not asking:
        return None
    allowed = np.full((len(rows), -(-vocabulary // 32)), -1, np.int32)
    for slot, row in asking.items():
        allowed[slot] = row.request.allows(row.tokens)
    return allowed
