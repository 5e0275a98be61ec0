"""What a server does with its model: jobs that tune it, training by single steps, and the answers of all of them."""

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import sqlalchemy
from fastapi import APIRouter
from ml_collections import ConfigDict
from prometheus_client import CollectorRegistry, Gauge

from ftjax import adapted, assemble
from ftjax.errors import UserError
from ftjax.evals.graders import Judges
from ftjax.hosted import chat, completions, models
from ftjax.hosted.files import Files
from ftjax.hosted.generation import Generation, Limits
from ftjax.hosted.jobs import grading
from ftjax.hosted.jobs import routes as job_routes
from ftjax.hosted.jobs.backend import Backend, Local
from ftjax.hosted.jobs.jobs import Jobs
from ftjax.hosted.jobs.kubernetes import JobSets
from ftjax.hosted.jobs.slurm import Slurm
from ftjax.hosted.page import adapters, checking, page
from ftjax.hosted.settings import MB
from ftjax.hosted.tinker import part, service
from ftjax.hosted.turns import Turns

_SHARED = ("model.source", "model.revision", "model.dtype", "model.param_dtype", "model.attention")


class Serving:
    """The parts of a server that need a model; `running` is around its requests.

    Raises UserError: the model cannot be read, or a setting of jobs cannot be shared.
    """

    def __init__(self, settings: ConfigDict, engine: sqlalchemy.Engine, files: Files, registry: CollectorRegistry):
        if settings.model.revision:
            raise UserError("config.model.revision is not served; download that revision and name its directory")
        own = given(settings.jobs.settings)  # before the model is read, which takes its time
        base, variables = adapted.load_model(settings.model.source, {}, settings.model.dtype)
        name = settings.model.name or assemble.published(base) or Path(settings.model.source).name
        its = settings.generation
        limits = Limits(
            slots=its.slots,
            waiting=its.waiting,
            context=its.max_length,
            places=its.adapters,
            rank=max(its.rank, settings.tinker.rank),
            targets=part.TARGETS,
        )
        turns = Turns() if jax.device_count() > 1 else None
        self._generation = Generation(base, variables[adapted.NONE], limits, turns)
        steps = service.Limits(
            settings.tinker.batch_tokens,
            settings.tinker.max_length,
            settings.tinker.rank,
            settings.tinker.models,
            settings.tinker.quota_mb * MB,
        )
        place, params = Path(settings.folder).absolute() / "tinker", variables[adapted.NONE]["params"]
        self.tinker = part.make(base, params, self._generation, engine, place, steps, name, turns)
        trained = models.Trained(engine, name)
        shared = {key: settings.model[key.partition(".")[2]] for key in _SHARED}
        shared["data.max_length"] = self._generation.context  # as long as what can be answered
        shared |= own
        self.jobs = Jobs(
            engine,
            files,
            Path(settings.folder).absolute() / "jobs",
            shared,
            trained,
            _backend(settings),
            at_once=settings.jobs.at_once,
            per_key=settings.jobs.per_key,
            queued=settings.jobs.queue,
            quota=settings.jobs.quota_mb * MB,
            kept=round(settings.jobs.retention_days * 24 * 3600),
            judges=Judges(settings.jobs.judges, settings.jobs.judges_key),
        )
        self.routes: list[APIRouter] = [
            job_routes.routes(self.jobs),
            grading.routes(self.jobs.judges),
            models.routes(trained),
            chat.routes(self._generation, trained),
            completions.routes(self._generation, trained),
            self.tinker.routes,
            checking.routes(files, shared),
            adapters.routes(trained),
            page.routes(),
        ]
        text = "Completions that are being written or wait"
        Gauge("ftjax_open_completions", text, registry=registry).set_function(lambda: self._generation.open)

    def lacks(self) -> str:
        """What is wrong, for /healthz; "" where nothing is."""
        parts = {
            "completions are no longer written": self._generation.alive,
            "jobs are no longer taken on": self.jobs.alive,
            "Tinker's requests are no longer done": self.tinker.alive(),
        }
        ended = "; ".join(what for what, alive in parts.items() if not alive)
        return f"{ended}; the log says why" if ended else ""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self.jobs:
            try:
                yield
            finally:
                self.tinker.close()
                self._generation.close()


def given(words: tuple[str, ...]) -> dict[str, Any]:
    """("adapter.rank=8", ...) as {key: value}; UserError for what is none, and for keys of the base, which is one."""
    out: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"config.jobs.settings has {word!r}; write a key and its value, 'adapter.rank=8'")
        if key in _SHARED:
            raise UserError(f"config.jobs.settings has {key}, which jobs share with the answers; set config.{key}")
        try:
            out[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            out[key] = text
    return out


def _backend(settings: ConfigDict) -> Backend:
    options, script = tuple(settings.jobs.options), Path(settings.jobs.script)
    match settings.jobs.backend:
        case "slurm":
            return Slurm(script, options)
        case "kubernetes":
            return JobSets(script, options, settings.jobs.namespace)
    return Local()
