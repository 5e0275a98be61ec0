"""Reading JSON from untrusted sources, and staying inside a directory."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from ftjax import strict_json
from ftjax.errors import UserError

# For configs, indexes and the headers of safetensors files. Parsed, JSON takes up to 25 times its size (the format of
# safetensors allows headers of 100 MB). The index of a model with 100,000 tensors has 10 MB.
MAX_JSON_BYTES = 32_000_000

# How images are prepared: the first of these that is there says it; transformers 5 writes the second.
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a UTF-8 file. UserError if it is absent, malformed, over 32 MB or repeats a key."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {MAX_JSON_BYTES} bytes, which no such file is; download it again")
        # Infinity passes: transformers writes it into some configs.
        content = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=strict_json.unique)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} the directory of a model or an adapter?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); download or write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__} where an object is expected")
    return content


def inside(directory: Path, name: str) -> Path:
    """`directory / name`, or UserError when `name` leads out of it by `..`, an absolute path or a symlink.

    In the cache of huggingface_hub the files of `REPO/snapshots/REVISION` are symlinks into `REPO/blobs`;
    these are followed, no others that leave the directory.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not name.isprintable():
        raise UserError(f"{directory}: refers to {name!r}, outside the directory; files are named relative to it")
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        target = (root / parts).resolve()
        target.exists()
    except (OSError, RuntimeError) as error:  # too long a name, symlinks in a circle
        raise UserError(f"{directory}: refers to {name!r}, which is not the name of a file ({error})") from error
    if not any(target.is_relative_to(parent) for parent in allowed):
        raise UserError(f"{directory / name}: a symlink that leads out of the directory, to {target}; copy the file in")
    return directory / name
