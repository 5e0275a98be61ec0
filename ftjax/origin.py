"""What a run began with: its base, and the adapter that it goes on from, recorded in its workdir by their contents.

A checkpoint holds what was trained; the rest is read from the base again, whenever the run goes on, is exported or
generates. That it is still the same is decided by digests and not by names: both may be found elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax.atomic import write_text
from ftjax.data.read import sources
from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.weights.gguf.read import GGUFReader
from ftjax.weights.hf.files import inside, read_json
from ftjax.weights.peft.adapter import base_digest, directory_digest
from ftjax.weights.source import Reader, everywhere

FILE = "origin.json"
_ADAPTER = "adapter.json"  # what runs had before: the digest of the adapter alone
_PARTS = ("weights", "config", "tokenizer", "template")
_SAY = {
    "model": "--config.model.source in training, --model in ftjax.generate and ftjax.export",
    "adapter": "--config.adapter.source in training, --adapter in ftjax.generate and ftjax.export",
}
_TEMPLATE = "tokenizer.chat_template"  # of a GGUF file; those of other names begin with it, too


def contents(config: ConfigDict, reader: Reader, spec: DecoderSpec) -> dict[str, str]:
    """{"weights", "config", "tokenizer", "template", and "adapter" where the run goes on from one: sha256}.

    Of the weights a few kilobytes of every tensor are read (`base_digest`), of an adapter all.
    """
    digests = {"weights": base_digest(reader, spec)}
    described = _of_gguf(reader.metadata) if isinstance(reader, GGUFReader) else _of_directory(reader.path)
    for part, content in described.items():
        digests[part] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if config.adapter.source:
        digests["adapter"] = directory_digest(Path(config.adapter.source).expanduser())
    return digests


def _of_directory(path: Path) -> dict[str, Any]:
    def stored(*names: str) -> dict[str, Path]:
        return {name: file for name in names if (file := inside(path, name)).is_file()}

    settings = {name: read_json(file) for name, file in stored("tokenizer_config.json").items()}
    template = [values.pop("chat_template", None) for values in settings.values()]
    names = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
    files = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in stored(*names).items()}
    return {
        "config": {name: read_json(file) for name, file in stored("config.json", "generation_config.json").items()},
        "tokenizer": [settings, files],
        "template": [template, [file.read_text() for file in stored("chat_template.jinja").values()]],
    }


def _of_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    template = {key: value for key, value in metadata.items() if key.startswith(_TEMPLATE)}
    tokenizer = {key: value for key, value in metadata.items() if key.startswith("tokenizer.") and key not in template}
    # What begins with "general." is for people, such as the name of the model.
    config = {key: value for key, value in metadata.items() if not key.startswith(("general.", "tokenizer."))}
    return {"config": config, "tokenizer": tokenizer, "template": template}


def located(config: ConfigDict, path: Path) -> ConfigDict:
    """A copy of the config whose names of the base, the adapter and the rows mean the same in every working directory.

    path: where the base was found. Its revision becomes the commit that this was.
    """
    out = ConfigDict(configs.as_json(config))
    out.model.source, out.model.revision = everywhere(config.model.source, path)
    if config.adapter.source:
        out.adapter.source = str(Path(config.adapter.source).expanduser().absolute())
    for which in ("train", "eval"):
        entries = [(entry, configs.source_entry(entry, f"data.{which}")) for entry in out.data[which]]
        out.data[which] = [
            sources.absolute(entry) if isinstance(entry, str) else given | {"source": sources.absolute(given["source"])}
            for entry, given in entries
        ]
    return out


def record(workdir: Path, given: ConfigDict, config: ConfigDict, digests: Mapping[str, str]) -> None:
    """Writes origin.json: what the run began with, and where it is now.

    given: the config of the command; config: the same, `located`.
    """
    content = {
        "version": 1,
        "model": config.model.source,
        "commit": config.model.revision,
        "adapter": config.adapter.source,
        "sha256": dict(digests),
        "given": _names(given),
    }
    write_text(workdir / FILE, json.dumps(content, indent=2) + "\n")


def is_recorded(workdir: Path) -> bool:
    """Whether the base of the run in `workdir` is known; older versions recorded only the adapter."""
    return (workdir / FILE).is_file()


def check(config: ConfigDict, workdir: Path, digests: Mapping[str, str]) -> None:
    """UserError where the base or the adapter that `config` names is not the one that the run in `workdir` began with.

    digests: of `contents`. The base of a run that is older than origin.json is not checked.
    """
    if is_recorded(workdir):
        content = read_json(workdir / FILE)
        then, names = content["sha256"], content
    elif (workdir / _ADAPTER).is_file():
        content = read_json(workdir / _ADAPTER)
        then, names = {"adapter": content["sha256"]}, {"adapter": content["source"]}
    else:
        return
    if then.get("adapter", digests.get("adapter")) != digests.get("adapter"):
        raise UserError(
            f"{config.adapter.source}: this adapter has changed since the run in {workdir} started from it, which was "
            f"then {names['adapter']}; restore it, say where it is now ({_SAY['adapter']}), or choose another --workdir"
        )
    if changed := [part for part in _PARTS if part in then and then[part] != digests[part]]:
        commit = f" at commit {names['commit']}" if names["commit"] else ""
        raise UserError(
            f"{workdir} holds a run with another base: {', '.join(changed)} of {config.model.source} differ from those "
            f"of {names['model']}{commit}, with which it began. Restore them, say where that base is now "
            f"({_SAY['model']}), or choose another --workdir"
        )


def at_hand(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config of a command that goes on with the run in `workdir`, with names that lead somewhere from here.

    Where the run was given the same name, and nothing of that name is here, it is what config.json says of it: the
    path or the commit that was found then.
    """
    if not is_recorded(workdir):
        return config
    given, now, saved = read_json(workdir / FILE)["given"], _names(config), configs.read(workdir / "config.json")
    same = {key for key in now if now[key] == given.get(key)}
    out = ConfigDict(configs.as_json(config))
    if {"model.source", "model.revision"} <= same and not Path(config.model.source).expanduser().exists():
        out.model.update(source=saved.model.source, revision=saved.model.revision)
    if "adapter.source" in same and not Path(config.adapter.source).expanduser().exists():
        out.adapter.source = saved.adapter.source
    for which in {"train", "eval"} & {key.removeprefix("data.") for key in same}:
        here = [sources.is_here(entry["source"]) for entry in configs.sources(config, which)]
        pairs = zip(out.data[which], saved.data[which], here, strict=True)
        out.data[which] = [entry if found else before for entry, before, found in pairs]
    return out


def _names(config: ConfigDict) -> dict[str, Any]:
    flat = configs.flat(ConfigDict(configs.as_json(config)))
    return json.loads(json.dumps({key: flat[key] for key in (*configs.PLACES, "data.eval")}, default=dict))
