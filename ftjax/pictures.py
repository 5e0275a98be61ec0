"""How a run's model takes images: from its files to the rules that rows are tokenized by, and the shapes in a batch."""

import jax
from jax.sharding import Mesh

from ftjax import sharding
from ftjax.data.batch.patches import PATCHES, ROPE
from ftjax.data.images.rules import ImageRules, rules_of
from ftjax.errors import UserError
from ftjax.models.spec import Vision
from ftjax.weights.hf.files import read_json
from ftjax.weights.source import Reader

# The first that is there has the settings; transformers 5 writes the second.
FILES = ("preprocessor_config.json", "processor_config.json")


def rules(reader: Reader, max_pixels: int = 0) -> ImageRules:
    """How the model of these files takes images; max_pixels as of `rules_of`.

    Raises:
      UserError: the files do not say it, or say something that is not supported.
    """
    file = next((reader.path / name for name in FILES if (reader.path / name).is_file()), None)
    if file is None:
        raise UserError(
            f"config.model.vision: {reader.path} has no {FILES[0]}, which says how images are prepared; get the whole "
            "model, or set config.model.vision=False to train on text"
        )
    return rules_of(reader.config["model_type"], reader.config, read_json(file), max_pixels)


def abstract(vision: Vision, mesh: Mesh, shape: tuple[int, int, int], tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of images in a batch whose others have this shape, [accumulate, rows, length].

    tokens: of images in each row.
    """
    count, inner = tokens * vision.merge**2, {"patches": (3 * vision.patch**2,), "patch_places": (2,)}
    shapes = {name: (*shape[:2], count, *inner.get(name, ())) for name in PATCHES}
    dtypes = PATCHES | (ROPE if vision.mrope else {})
    shapes |= {"rope_positions": (*shape, 3)} if vision.mrope else {}
    return {
        name: jax.ShapeDtypeStruct(its, dtypes[name], sharding=sharding.named(mesh, axes(name, len(its)), its))
        for name, its in shapes.items()
    }


def axes(name: str, rank: int) -> tuple[str | None, ...]:
    """The logical axes of an array of a batch, with or without micro-batches in front."""
    rows = rank - (3 if name in ("patches", "patch_places", "rope_positions") else 2)
    along = None if name in PATCHES else "length"
    return (*[None] * rows, "batch", along, *[None] * (rank - rows - 2))
