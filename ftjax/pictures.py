"""How a run's model takes images: from its files to the rules that rows are tokenized by, and the shapes in a batch."""

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax import sharding
from ftjax.data.batch import patches
from ftjax.data.batch.patches import PATCHES, ROPE, Seen
from ftjax.data.images.rules import ImageRules, rules_of
from ftjax.data.tokens import pictured
from ftjax.data.tokens.chat import render_prompt
from ftjax.data.tokens.rendering import Messages, Tokenizer, Tools
from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.models.vision import images_of
from ftjax.sampling.pictured import Pictured
from ftjax.weights.hf.files import PREPROCESSORS, read_json
from ftjax.weights.source import Reader


def rules(reader: Reader, max_pixels: int = 0) -> ImageRules:
    """How the model of these files takes images; max_pixels as of `rules_of`.

    Raises:
      UserError: the files do not say it, or say something that is not supported.
    """
    file = next((reader.path / name for name in PREPROCESSORS if (reader.path / name).is_file()), None)
    if file is None:
        raise UserError(
            f"config.model.vision: {reader.path} has no {PREPROCESSORS[0]}, which says how images are prepared; get "
            "the whole model, or set config.model.vision=False to train on text"
        )
    return rules_of(reader.config["model_type"], reader.config, read_json(file), max_pixels)


def abstract(spec: DecoderSpec, mesh: Mesh, shape: tuple[int, int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of images in a batch whose others have this shape, [accumulate, rows, length]: rows full of images."""
    vision, dtypes = spec.vision, dict(PATCHES)
    count = shape[-1] * vision.merge**2
    if vision.tokens is not None:
        count = shape[-1] // vision.tokens * vision.tokens * vision.merge**2
    shapes = {"patches": (count, 3 * vision.patch**2), "patch_places": (count, 2), "patch_images": (count,)}
    if spec.mrope:
        dtypes |= ROPE
        shapes["rope_positions"] = (shape[-1], 3)
    return {
        name: jax.ShapeDtypeStruct(
            whole := (*shape[:2], *inner),
            dtypes[name],
            sharding=sharding.named(mesh, (None, *sharding.batch_axes(name)), whole),
        )
        for name, inner in shapes.items()
    }


def prompt(
    messages: Messages, tokenizer: Tokenizer, rules: ImageRules, tools: Tools, origin: str
) -> np.ndarray | Pictured:
    """What `chat.render_prompt` gives, of a conversation that may have images with these.

    Raises:
      UserError: what that raises; an image cannot be taken.
    """
    turns, its = pictured.prompt(messages, rules, origin)
    tokens = render_prompt(turns, tokenizer, tools, origin)
    if not its.references:
        return tokens
    pictured.check_tokens(tokens, its, rules, origin)
    arrays = patches.lay([[Seen(tokens, its.references, origin)]], len(tokens), rules.room(sum(its.tokens)), rules)
    return Pictured(tokens, images_of({name: array[0] for name, array in arrays.items()}))
