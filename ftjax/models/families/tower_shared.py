"""What the families with a vision tower have in common."""

import math
from collections.abc import Mapping
from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import shorten
from ftjax.models.spec import Vision


def of_layers(prefix: str, modules: Mapping[str, str]) -> dict[str, str]:
    """{our path: Hugging Face name, with {} for the layer} of what a tower's layers may have.

    prefix: of the names of a layer; modules: {ours: theirs}, linear layers and norms.
    """
    names = {}
    for ours, theirs in modules.items():
        leaf = "scale" if ours.startswith("norm") else "kernel"
        names |= {f"vision/layers/{ours}/{leaf}": f"{prefix}.{theirs}.weight"}
        names |= {f"vision/layers/{ours}/bias": f"{prefix}.{theirs}.bias"}
    return names


def check_processor(vision: Vision, settings: Mapping[str, Any], file: str) -> None:
    """UserError where the `settings` of transformers' image processor, read from `file`, make other numbers of images
    than the tower here is given: it has no config of its own for these.
    """
    side = vision.grid and vision.grid * vision.patch
    expected = {
        "do_rescale": True,
        "do_normalize": True,
        "do_pan_and_scan": False,
        "rescale_factor": 1 / 255,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "patch_size": vision.patch,
        "merge_size": vision.merge if vision.grid is None else None,
        "temporal_patch_size": vision.frames,
        "size": {"height": side, "width": side} if side else None,
    }
    for name, value in expected.items():
        given = settings.get(name)
        if None not in (given, value) and not _same(given, value):
            raise UserError(
                f"{file}: {name}={shorten(given)} of a {vision.family!r} model is not supported, only {value!r} is"
            )


def _same(given: Any, value: Any) -> bool:
    if isinstance(value, list):
        return isinstance(given, list) and len(given) == len(value) and all(map(_same, given, value))
    if isinstance(value, float):
        return isinstance(given, int | float) and math.isclose(given, value, rel_tol=1e-5)
    return given == value
