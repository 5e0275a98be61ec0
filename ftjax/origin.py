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
from ftjax.data.tokens import templates
from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.weights.gguf.read import GGUFReader
from ftjax.weights.hf.files import inside, read_json
from ftjax.weights.peft.adapter import base_digest, directory_digest
from ftjax.weights.resized import original
from ftjax.weights.source import Reader, everywhere, on_hub

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
    reader = original(reader)
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
    for key in ("teacher", "teacher_adapter"):
        if config.objective[key] and Path(config.objective[key]).expanduser().exists():
            out.objective[key] = str(Path(config.objective[key]).expanduser().absolute())
    out.data.chat_template = templates.located(config.data.chat_template)
    for section, key in (("data", "train"), ("data", "eval"), ("data", "ptx"), ("evaluate", "general")):
        entries = [(entry, configs.source_entry(entry, f"{section}.{key}")) for entry in out[section][key]]
        out[section][key] = [
            _absolute(entry)
            if isinstance(entry, str)
            else given | {"source": _absolute(given["source"])} | _score(given)
            for entry, given in entries
        ]
    out.objective.update(rewards=located_rewards(config), judge=located_judge(config))
    return out


_OF_FILES = (configs.REWARD, configs.GRADER)


def located_rewards(config: ConfigDict) -> tuple[str | tuple[str, float], ...]:
    """config.objective.rewards, models among them by their absolute paths."""
    named = config.objective.rewards
    return tuple(_model(one) if isinstance(one, str) else (_model(one[0]), one[1]) for one in named)


def located_judge(config: ConfigDict) -> str:
    """config.objective.judge, a directory by its absolute path."""
    judge = config.objective.judge
    return str(Path(judge).expanduser().absolute()) if judge and Path(judge).expanduser().exists() else judge


def _model(score: str) -> str:
    """The name of a score; where that is given by a model in a directory or by a grader, with its absolute path."""
    kind, colon, path = score.partition(":")
    return f"{kind}:{Path(path).expanduser().absolute()}" if colon and kind in _OF_FILES else score


def _score(entry: Mapping[str, Any]) -> dict[str, str]:
    """The score of an entry where that names a model in a directory, or a grader; {} else."""
    kind, colon, _ = entry.get("score", "").partition(":")
    return {"score": _model(entry["score"])} if colon and kind in _OF_FILES else {}


def _absolute(source: str) -> str:
    return source if source == configs.SHIPPED else sources.absolute(source)


def record(workdir: Path, given: ConfigDict, found: ConfigDict, digests: Mapping[str, str], fresh: bool = True) -> None:
    """Writes origin.json: what the run began with, and where it is now.

    given: the config of the command; found: the same, `located`. digests: of `contents`. Which keys the run chose
    itself when it began is kept: where its config.json serves for another run, they are open again. So is how many
    epochs it was to have.
    fresh: it begins, and does not go on.
    """
    flat = configs.flat(given)
    chosen = [key for key in configs.OPEN if flat[key] == configs.KEYS[key].default]
    content = {"version": 1, "sha256": dict(digests), "given": _names(given), "found": _names(found), "chosen": chosen}
    if fresh:
        content["epochs"] = found.epochs
    elif is_recorded(workdir):
        before = read_json(workdir / FILE)
        content |= {key: before[key] for key in ("chosen", "epochs") if key in before}
    write_text(workdir / FILE, json.dumps(content, indent=2) + "\n")


def is_recorded(workdir: Path) -> bool:
    """Whether the base of the run in `workdir` is known; older versions recorded only the adapter."""
    return (workdir / FILE).is_file()


def epochs(workdir: Path) -> float | None:
    """How many epochs the run in `workdir` was to have when it began; None where that is not recorded."""
    return read_json(workdir / FILE).get("epochs") if is_recorded(workdir) else None


def check_there(config: ConfigDict, workdir: Path) -> None:
    """UserError where the local base or adapter of the run in `workdir` is gone."""
    model, adapter = config.model.source, config.adapter.source
    local = not (model.startswith("package:") or on_hub(model, config.model.revision))
    for what, source in {"model": model if local else "", "adapter": adapter}.items():
        if source and not Path(source).expanduser().exists():
            name = {"model": "base", "adapter": "adapter that it went on from"}[what]
            raise UserError(
                f"{workdir}: no such file or directory as the {name} of this run, {source}; restore it, or say where "
                f"it is now ({_SAY[what]})"
            )


def check(config: ConfigDict, workdir: Path, digests: Mapping[str, str]) -> None:
    """UserError where the base or the adapter that `config` names is not the one that the run in `workdir` began with,
    or what else has a digest.

    digests: of `contents`, and of `rewards.digests`. The base of a run that is older than origin.json is not checked.
    """
    if is_recorded(workdir):
        content = read_json(workdir / FILE)
        then, found = content["sha256"], content["found"]
    elif (workdir / _ADAPTER).is_file():
        content = read_json(workdir / _ADAPTER)
        then, found = {"adapter": content["sha256"]}, {"adapter.source": content["source"]}
    else:
        return
    if then.keys() ^ digests.keys() >= {"adapter"}:
        began = f"from the adapter {found['adapter.source']}" if "adapter" in then else "without one to go on from"
        raise UserError(
            f"config.adapter.source={config.adapter.source!r}: {workdir} has a run that began {began}; give it the old "
            "value, or choose another --workdir"
        )
    if then.get("adapter") != digests.get("adapter"):
        raise UserError(
            f"{config.adapter.source}: this adapter has changed since the run in {workdir} started from it, which was "
            f"then {found['adapter.source']}; restore it, say where it is now ({_SAY['adapter']}), or choose another "
            "--workdir"
        )
    if "teacher" in digests and then.get("teacher") != digests["teacher"]:
        names = [found[key] for key in ("objective.teacher", "objective.teacher_adapter") if found.get(key)]
        adapter = config.objective.teacher_adapter and f" with the adapter {config.objective.teacher_adapter}"
        raise UserError(
            f"config.objective.teacher={config.objective.teacher}{adapter}: this model is not the one that the run in "
            f"{workdir} began to learn from, in {' with the adapter '.join(names)}; restore it, say where it is now, "
            "or choose another --workdir"
        )
    for name in (name for name in digests if name.startswith("config.")):  # of reward models, which older runs lack
        if then.get(name, digests[name]) != digests[name]:
            raise UserError(
                f"{name}: this model is not the one that rewarded the run in {workdir} when it began; restore it, or "
                "choose another --workdir"
            )
    if changed := [part for part in _PARTS if part in then and then[part] != digests[part]]:
        commit = f" at commit {found['model.revision']}" if found["model.revision"] else ""
        raise UserError(
            f"{workdir} holds a run with another base: {', '.join(changed)} of {config.model.source} are not what they "
            f"were when it began, in {found['model.source']}{commit}. Restore them, say where that base is now "
            f"({_SAY['model']}), or choose another --workdir"
        )


def at_hand(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config of a command that goes on with the run in `workdir`, with names that lead somewhere from here.

    Where the run was given the same name, and nothing of that name is here, it is the path or the commit that was found
    then.
    """
    if not is_recorded(workdir):
        return config
    content, now, out = read_json(workdir / FILE), _names(config), ConfigDict(configs.as_json(config))
    found = {key: content["found"][key] for key in now if now[key] == content["given"].get(key)}
    if {"model.source", "model.revision"} <= found.keys() and not Path(config.model.source).expanduser().exists():
        out.model.update(source=found["model.source"], revision=found["model.revision"])
    if "adapter.source" in found and not Path(config.adapter.source).expanduser().exists():
        out.adapter.source = found["adapter.source"]
    for key in ("teacher", "teacher_adapter"):
        if f"objective.{key}" in found and not Path(config.objective[key]).expanduser().exists():
            out.objective[key] = found[f"objective.{key}"]
    for which in {"train", "eval", "ptx"} & {key.removeprefix("data.") for key in found}:
        here = [sources.is_here(entry["source"]) for entry in configs.sources(config, which)]
        entries = zip(out.data[which], found[f"data.{which}"], here, strict=True)
        out.data[which] = [entry if is_here else before for entry, before, is_here in entries]
    if {"model.source", "adapter.source"} <= found.keys():
        check_there(out, workdir)
    return out


def _names(config: ConfigDict) -> dict[str, Any]:
    flat = configs.flat(ConfigDict(configs.as_json(config)))
    return json.loads(json.dumps({key: flat[key] for key in (*configs.PLACES, "data.eval")}, default=dict))
