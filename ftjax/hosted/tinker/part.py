"""This part of the server, put together: its routes, what it does now and then, and how it ends."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import sqlalchemy
from fastapi import APIRouter

from ftjax import adapted
from ftjax.assemble import Base
from ftjax.hosted.generation import Generation
from ftjax.hosted.tinker.routes import routes
from ftjax.hosted.tinker.sampling import Samplers
from ftjax.hosted.tinker.service import Limits, Service
from ftjax.hosted.tinker.store import Store
from ftjax.hosted.tinker.training import Programs
from ftjax.hosted.tinker.work import Work
from ftjax.tree import Tree

# What the engine's adapters may adapt so that it can sample from all that is trained here: linear layers and the head.
TARGETS = r"^(?!.*/experts/).*/kernel$"


class Part(NamedTuple):
    routes: APIRouter
    tidy: Callable[[], None]
    close: Callable[[], None]
    alive: Callable[[], bool]  # whether its thread is
    service: Service


def make(
    base: Base,
    params: Tree,
    generation: Generation,
    engine: sqlalchemy.Engine,
    folder: Path,
    limits: Limits,
    name: str = "",
    turns: contextlib.AbstractContextManager | None = None,
) -> Part:
    """Starts its thread, which `close` ends.

    Args:
      params: the base's, which the engine has too.
      generation: writes completions; its limits have `limits.rank` at least, and TARGETS.
      folder: for checkpoints and the tokenizer.
      name: what else the base is called.
      turns: those of `generation`, on several devices.
    """
    programs, facts = Programs(base, params, limits.tokens, limits.longest, turns), adapted.facts_of(base)
    names = [*names_of(base, folder / "base"), *([name] if name else [])]
    work = Work()
    samplers = Samplers(generation, programs, facts, names[0], work)
    kept = Store(engine, folder / "checkpoints", limits.quota)
    service = Service(programs, facts, names, kept, samplers, work, limits)
    return Part(routes(service), service.tidy, work.close, lambda: work.alive, service)


def names_of(base: Base, folder: Path) -> list[str]:
    """What the base is called; the first is a name that AutoTokenizer opens, as the client and its recipes do with it.

    Where the base's own is none, of a GGUF file, it is `folder`, to which the tokenizer is written.
    """
    if not base.source.startswith("package:") and not str(base.path).endswith(".gguf"):
        return [base.source]
    base.tokenizer.save_pretrained(folder)
    return [str(folder.absolute()), base.source]
