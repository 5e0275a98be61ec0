"""What a client sends -> arrays of few shapes, so that little compiles: lengths and numbers of rows are powers of 2."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.hosted.refusals import Refused
from ftjax.hosted.tinker.losses import LOSSES, TokenLoss
from ftjax.hosted.tinker.wire import Datum

SHORTEST = 32  # tokens of a row
TARGETS = "target_tokens"


class Padded(NamedTuple):
    """Rows that are computed together.

    rows: which of the data each row is; fewer than there are rows where others are padding.
    batch: tokens, targets, positions and segment_ids int32, weights float32, 1 at each target; [B, T].
    inputs: what the loss reads beside log-probabilities, float32 [B, T].
    """

    rows: list[int]
    batch: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]


def find_loss(name: str) -> TokenLoss:
    if name not in LOSSES:
        raise Refused(
            f"there is no loss_fn {name!r} here; there are {', '.join(LOSSES)}, and forward_backward_custom for others",
            param="loss_fn",
        )
    return LOSSES[name]


def check_settings(loss: TokenLoss, name: str, given: Mapping[str, float]) -> dict[str, float]:
    """The settings of a loss, with its defaults; Refused for others, and where one without a default is absent."""
    if unknown := sorted(given.keys() - loss.settings.keys()):
        known = ", ".join(loss.settings) or "nothing"
        raise Refused(f"loss_fn_config has {unknown[0]!r}; {name} reads {known}", param="loss_fn_config")
    settings = {key: given.get(key, default) for key, default in loss.settings.items()}
    for key, value in settings.items():
        if value is None:
            raise Refused(f"{name} needs loss_fn_config={{{key!r}: a number}}", param="loss_fn_config")
        if not np.isfinite(np.float32(value)):
            raise Refused(f"loss_fn_config[{key!r}] is {value}; give a number", param="loss_fn_config")
    return settings


def check_datum(datum: Datum, where: str, loss: TokenLoss, name: str, vocabulary: int, longest: int) -> None:
    """Refused, naming `where`, for a datum that the loss cannot be computed of."""
    tokens, inputs = datum
    if not len(tokens):
        raise Refused(f"{where}.model_input is empty; give it at least one token", param=where)
    if len(tokens) > longest:
        raise Refused(f"{where} has {len(tokens)} tokens; at most {longest} are read together", param=where)
    if TARGETS not in inputs:
        raise Refused(f"{where} has no {TARGETS}, the token that is to follow each of model_input", param=where)
    allowed = {TARGETS, *loss.inputs}
    if unknown := sorted(inputs.keys() - allowed):
        raise Refused(f"{where} has {unknown[0]!r}; {name} reads {', '.join(sorted(allowed))}", param=where)
    for key, default in loss.inputs.items():
        if default is None and key not in inputs:
            raise Refused(f"{where} has no {key!r}, which {name} needs for each token", param=where)
    for key, values in inputs.items():
        if len(values) != len(tokens):
            raise Refused(
                f"{where}.{key} has {len(values)} values and model_input has {len(tokens)} tokens; there is to be one "
                "for each",
                param=where,
            )
        if key == TARGETS and values.dtype.kind != "i":
            raise Refused(f"{where}.{TARGETS} are not int64", param=where)
        if key != TARGETS and not np.isfinite(values.astype(np.float32)).all():
            raise Refused(f"{where}.{key} has a value that is no number, or infinite", param=where)
    for what, ids in (("model_input", tokens), (TARGETS, inputs[TARGETS])):
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise Refused(f"{where}.{what} has a token outside the model's 0 to {vocabulary - 1}", param=where)


def padded(data: Sequence[Datum], loss: TokenLoss, tokens: int, parts: int = 1) -> Iterator[Padded]:
    """All of the data, those of similar length together.

    tokens: how many are computed at a time, padding among them; one row at least.
    parts: what the number of rows is a multiple of.
    """
    left = sorted(range(len(data)), key=lambda index: -len(data[index].tokens))
    while left:
        length = max(power_of_two(len(data[left[0]].tokens)), SHORTEST)
        most = parts * (1 << max(tokens // (length * parts), 1).bit_length() - 1)
        rows, left = left[:most], left[most:]
        yield _padded(data, rows, loss, parts * power_of_two(-(-len(rows) // parts)), length)


def power_of_two(number: int) -> int:
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()


def _padded(data: Sequence[Datum], rows: list[int], loss: TokenLoss, count: int, length: int) -> Padded:
    batch = {name: np.zeros((count, length), np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = np.zeros((count, length), np.float32)
    inputs = {name: np.zeros((count, length), np.float32) for name in loss.inputs}
    for row, index in enumerate(rows):
        tokens, given = data[index]
        its = slice(0, len(tokens))
        batch["tokens"][row, its], batch["targets"][row, its] = tokens, given[TARGETS]
        batch["positions"][row, its] = np.arange(len(tokens))
        batch["segment_ids"][row, its] = batch["weights"][row, its] = 1
        for name, default in loss.inputs.items():
            inputs[name][row, its] = given.get(name, default)
    return Padded(rows, batch, inputs)
