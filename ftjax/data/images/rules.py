"""How a family of models takes images: their sizes, their patches, and the tokens that stand for them in the text."""

import math
from typing import NamedTuple

from ftjax.errors import UserError

LARGEST_RATIO = 200  # of the sides of an image that goes on a grid
_CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
_HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
_FILTERS = (2, 3)  # Pillow's numbers of the bilinear and the bicubic filter
_GRID_UNIT = 256  # patches; rows of batches have a power of two of them


class ImageRules(NamedTuple):
    """What decides the patches and the tokens of an image. Plain values, so that it is JSON.

    Attributes:
      kind: "square": every image is resized to size x size pixels; "grid": to nearly its own size and shape, with
        sides that are multiples of patch * merge, and an area of min_pixels to max_pixels.
      patch: the side of a patch in pixels.
      merge: merge x merge patches are one token.
      resample: the filter, by Pillow's number.
      placeholder: what the chat template writes for an image.
      before, token, after: the text of an image is `before`, as many times `token` as it has tokens, and `after`.
      token_id: the id of `token`.
      mrope: whether positions have three parts: time, row and column.
    """

    kind: str
    patch: int
    merge: int
    resample: int
    placeholder: str
    token: str
    token_id: int
    before: str = ""
    after: str = ""
    size: int = 0
    min_pixels: int = 0
    max_pixels: int = 0
    mrope: bool = False

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of so many pixels.

        Raises:
          ValueError: it is too narrow for a grid.
        """
        if self.kind == "square":
            return self.size // self.patch, self.size // self.patch
        rows, columns = _resized(width, height, self.patch * self.merge, self.min_pixels, self.max_pixels)
        return rows // self.patch, columns // self.patch

    def tokens(self, width: int, height: int) -> int:
        """How many tokens an image of so many pixels has."""
        rows, columns = self.grid(width, height)
        return rows * columns // self.merge**2

    def expanded(self, tokens: int) -> str:
        """The text of an image of so many tokens."""
        return self.before + self.token * tokens + self.after

    def room(self, tokens: int) -> int:
        """How many patches a row of a batch has whose fullest row has so many tokens of images.

        A power of two of those of one image, or of 256 on a grid, so that few programs are compiled.
        """
        unit = (self.size // self.patch) ** 2 if self.kind == "square" else math.lcm(_GRID_UNIT, self.merge**2)
        return unit << max(0, math.ceil(tokens * self.merge**2 / unit) - 1).bit_length()


class Shown(NamedTuple):
    """How an image of a message stands in the text of a conversation."""

    written: str  # by the chat template
    text: str  # what is tokenized in its place


def rules_of(model_type: str, config: dict, preprocessor: dict, max_pixels: int = 0) -> ImageRules:
    """The rules of a model.

    Args:
      config: its config.json.
      preprocessor: its preprocessor_config.json, or a processor_config.json that has one under "image_processor".
      max_pixels: the largest area of an image on a grid, in pixels; 0: the model's own.

    Raises:
      UserError: a family without images here, or settings that are not supported.
    """
    if model_type not in _FAMILIES:
        raise UserError(
            f"config.model.vision: images of the model_type {model_type!r} are not supported; of "
            f"{', '.join(_FAMILIES)} they are. Take one of these, or leave it out"
        )
    preprocessor = preprocessor.get("image_processor") or preprocessor
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if preprocessor.get(name) is False:
            raise _unsupported(name, False, "true")
    factor = preprocessor.get("rescale_factor")
    if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise _unsupported("rescale_factor", factor, "1/255")
    if max_pixels < 0:
        raise UserError(f"the most pixels of an image are {max_pixels}; write a positive number, or 0 for the model's")
    return _FAMILIES[model_type](config, preprocessor, max_pixels)


def _gemma3(config: dict, preprocessor: dict, max_pixels: int) -> ImageRules:
    if preprocessor.get("do_pan_and_scan"):
        raise _unsupported("do_pan_and_scan", True, "false, which gives each image once and no crops of it")
    if max_pixels:
        raise UserError("gemma3 resizes every image to one size, so the most pixels of an image must be left at 0")
    _check_colors(preprocessor, _HALF)
    vision = {"image_size": 896, "patch_size": 14} | (config.get("vision_config") or {})
    side, patch = vision["image_size"], vision["patch_size"]
    size = preprocessor.get("size") or {"height": side, "width": side}
    if size != {"height": side, "width": side}:
        raise _unsupported("size", size, f"the model's image_size, {side} x {side}")
    tokens = config.get("mm_tokens_per_image", 256)
    if preprocessor.get("image_seq_length", tokens) != tokens:
        raise _unsupported("image_seq_length", preprocessor["image_seq_length"], f"the model's {tokens} tokens")
    merge, across = side // patch // math.isqrt(tokens), math.isqrt(tokens)
    if across * across != tokens or across * merge * patch != side:
        raise UserError(f"the config.json pools images of {side} pixels to {tokens} tokens, which are no whole square")
    return ImageRules(
        "square",
        patch=patch,
        merge=merge,
        resample=_filter(preprocessor, 2),
        placeholder="<start_of_image>",
        before="\n\n<start_of_image>",
        token="<image_soft_token>",
        after="<end_of_image>\n\n",
        token_id=config.get("image_token_index", config.get("image_token_id", 262_144)),
        size=side,
    )


def _qwen2_5_vl(config: dict, preprocessor: dict, max_pixels: int) -> ImageRules:
    _check_colors(preprocessor, _CLIP)
    vision = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2} | (config.get("vision_config") or {})
    for name, its in {"patch_size": "patch_size", "merge_size": "spatial_merge_size"}.items():
        if preprocessor.get(name, vision[its]) != vision[its]:
            raise _unsupported(name, preprocessor[name], f"{its} of config.json's vision_config, {vision[its]}")
    if (frames := preprocessor.get("temporal_patch_size", 2)) != 2 or vision["temporal_patch_size"] != 2:
        raise _unsupported("temporal_patch_size", frames, "2")
    size, factor = preprocessor.get("size") or {}, vision["patch_size"] * vision["spatial_merge_size"]
    fewest = preprocessor.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    most = preprocessor.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    if max_pixels and max_pixels < max(fewest, factor * factor):
        raise UserError(
            f"images may have {max_pixels} pixels at most, but the model takes {max(fewest, factor * factor)} or more; "
            "allow as many"
        )
    return ImageRules(
        "grid",
        patch=vision["patch_size"],
        merge=vision["spatial_merge_size"],
        resample=_filter(preprocessor, 3),
        placeholder="<|image_pad|>",
        token="<|image_pad|>",
        token_id=config.get("image_token_id", 151_655),
        min_pixels=fewest,
        max_pixels=max_pixels or most,
        mrope=True,
    )


_FAMILIES = {"gemma3": _gemma3, "qwen2_5_vl": _qwen2_5_vl}


def _resized(width: int, height: int, factor: int, fewest: int, most: int) -> tuple[int, int]:
    """Height and width in pixels of an image on a grid: multiples of `factor`, with about the shape that it has.

    Qwen2-VL (arXiv 2409.12191, section 2.1); the numbers are those of its image processor.
    """
    if max(width, height) > LARGEST_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels, one side over {LARGEST_RATIO} times the other")
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < fewest:
        grow = math.sqrt(fewest / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def _filter(preprocessor: dict, usual: int) -> int:
    resample = preprocessor.get("resample")
    resample = usual if resample is None else resample
    if resample not in _FILTERS:
        raise _unsupported("resample", resample, "2 (bilinear) or 3 (bicubic)")
    return resample


def _check_colors(preprocessor: dict, usual: tuple[list[float], list[float]]) -> None:
    for name, values in zip(("image_mean", "image_std"), usual):
        given = preprocessor.get(name) or values
        if len(given) != 3 or not all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(given, values)):
            raise _unsupported(name, given, str(values))


def _unsupported(name: str, value: object, wanted: str) -> UserError:
    return UserError(
        f"preprocessor_config.json of the model: {name} is {value!r}, which is not supported; set it to {wanted}"
    )
