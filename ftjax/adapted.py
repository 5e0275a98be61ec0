"""A model with adapters as PEFT directories, loaded: what is used without being a run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from ftjax import assemble, sharding, tree
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.errors import UserError
from ftjax.models.heads import COLLECTION, SCORE
from ftjax.models.params import abstract_params
from ftjax.sampling.adapters import ALONE, stack
from ftjax.tree import Tree
from ftjax.weights.load import load_params
from ftjax.weights.peft.adapter import BaseFacts, open_adapter
from ftjax.weights.peft.begun_heads import classifier

NONE = "none"  # the name of the base without an adapter


def load_model(
    source: str, adapters: Mapping[str, str], dtype: str, heads: bool = False, vision: bool = False
) -> tuple[Base, dict[str, Tree]]:
    """(base, {name: variables}) over this machine's devices, of a model and PEFT adapters {name: directory}.

    The adapters share the base's arrays; the name NONE has the base alone. Raises UserError for an
    adapter that does not fit it or was trained on another base.

    heads: a reward model or a classifier is wanted, whose head the variables then have; else one is refused, as it has
    no head for tokens. vision: it is to see images, see config.model.vision.
    """
    config = configs.defaults()
    config.model.update(source=source, dtype=dtype, param_dtype=dtype, vision=vision)
    base = assemble.open_base(config.model, adapter=_with_tokenizer(adapters))
    stored = {name: open_adapter(Path(path), base.model.spec) for name, path in adapters.items()}
    begun = {NONE: classifier(base.reader)} | stored
    begun = {name: its for name, its in begun.items() if its is not None and its.kind}
    for its in begun.values() if not heads else ():
        raise UserError(
            f"{its.path}: is a model {its.kind}, whose head gives no tokens; python -m ftjax.score scores texts with "
            "a reward model"
        )
    facts = assemble.base_facts(config, base) if stored else None
    for adapter in stored.values():
        adapter.check_base(facts, base.reader)
    mesh = sharding.make_mesh({"fsdp": -1})
    params = load_params(base.reader, base.model.spec, abstract_params(base.model, mesh))
    variables = {NONE: {"params": params}}
    for name, adapter in stored.items():
        adapters, saved = adapter.read()
        leaves = tree.flatten(params)
        for path, values in saved.items():
            leaves[path] = jax.device_put(values.astype(leaves[path].dtype), leaves[path].sharding)
        lora = jax.device_put(adapters, sharding.replicated(mesh))
        variables[name] = {"params": tree.unflatten(leaves), "lora": lora}
    for name, its in begun.items():
        variables[name][COLLECTION] = {SCORE: {"kernel": jax.device_put(its.head(), sharding.replicated(mesh))}}
    return base, variables


def side_by_side(
    base: Base, variables: Mapping[str, Tree], rank: int | None = None, targets: Sequence[str] = ()
) -> Tree:
    """The adapters of `load_model`, in their order, for an Engine over `variables[NONE]` whose rows choose among them.

    rank, targets: see sampling.adapters.stack. Raises UserError for what cannot be served row by row.
    """
    leaves = tree.flatten(variables[NONE]["params"])
    adapters = {name: its for name, its in variables.items() if name != NONE}
    for name, its in adapters.items():
        own = [path for path, leaf in tree.flatten(its["params"]).items() if leaf is not leaves.get(path)]
        if own:
            raise UserError(f"adapter {name}: {own[0]} was trained whole, and rows share it; {ALONE}")
    return stack(base.model, variables[NONE], [its["lora"] for its in adapters.values()], rank, targets)


def facts_of(base: Base) -> BaseFacts:
    """What `of_rows` compares adapters with; it reads a little of every tensor."""
    return assemble.base_facts(configs.defaults(), base)


def of_rows(base: Base, facts: BaseFacts, path: Path) -> Tree:
    """The adapter in the directory `path`, in host memory, for `Engine.set_adapter`.

    Raises UserError where rows cannot have it.
    """
    stored = open_adapter(path, base.model.spec)
    if stored.kind:
        raise UserError(f"{path}: is a model {stored.kind}, whose head gives no tokens")
    stored.check_base(facts, base.reader)
    adapter, saved = stored.read()
    if saved:
        raise UserError(f"{path}: {next(iter(saved))} was trained whole, and rows share it; {ALONE}")
    return adapter


def _with_tokenizer(adapters: Mapping[str, str]) -> Path | None:
    """The adapter that brings the tokenizer of all, if there is one; UserError where two bring different ones."""
    brought = {name: Path(path).expanduser() for name, path in adapters.items()}
    brought = {name: path for name, path in brought.items() if (path / "tokenizer.json").is_file()}
    first = next(iter(brought), None)
    for name, path in brought.items():
        for file in ("tokenizer.json", "chat_template.jinja"):
            contents = [(at / file).read_bytes() if (at / file).is_file() else b"" for at in (path, brought[first])]
            if contents[0] != contents[1]:
                raise UserError(f"--adapter: {first} and {name} have another {file} each; use them one at a time")
    return brought.get(first)


def parse_adapters(text: str) -> dict[str, str]:
    """{name: directory} of "DIR", whose name is then "adapter", or "name=DIR,other=DIR2"."""
    if not re.match(r"[\w-]+=", text):
        return {"adapter": text}
    directories: dict[str, str] = {}
    for part in text.split(","):
        name, _, directory = part.partition("=")
        if not re.fullmatch(r"[\w-]+", name) or not directory:
            raise UserError(f"--adapter: {part!r} is not NAME=DIRECTORY, with commas between several")
        if name in directories or name == NONE:
            raise UserError(f"--adapter: the name {name!r} is " + ("the base's own" if name == NONE else "there twice"))
        directories[name] = directory
    return directories
