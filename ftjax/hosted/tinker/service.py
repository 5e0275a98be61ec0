"""Sessions and the models in training of them: what a request becomes, and who may ask for it."""

import dataclasses
import functools
import json
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ftjax.assemble import Base
from ftjax.hosted.refusals import Refused
from ftjax.hosted.tinker import batches, bodies, checkpoints, store, wire
from ftjax.hosted.tinker.sampling import Samplers
from ftjax.hosted.tinker.store import Store
from ftjax.hosted.tinker.training import Adam, Learner, Programs, Shape
from ftjax.hosted.tinker.work import Asked, Line, Work
from ftjax.weights.peft.adapter import BaseFacts

IDLE = 1800  # seconds after the last sign of a session, when it ends
QUIET = 60  # seconds without one after which its models make room for others; the client gives one every ten


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much at once.

    tokens: that are computed together, see `batches.padded`. longest: of a datum. rank: of an adapter.
    models: in memory together. quota: bytes of the checkpoints of a key.
    """

    tokens: int = 4096
    longest: int = 32768
    rank: int = 32
    models: int = 8
    quota: int = 64 * 2**30


class Live:
    """A model that is in memory."""

    def __init__(self, id: str, owner: str, session: str, learner: Learner):
        self.id, self.owner, self.session, self.learner = id, owner, session, learner
        self.line = Line(skipped=lambda why: self.learner.fail(why))


class Service:
    """What the routes ask for.

    names: what the base may be called; the first is what answers call it, and AutoTokenizer opens it.
    """

    def __init__(
        self,
        programs: Programs,
        facts: BaseFacts,
        names: Sequence[str],
        kept: Store,
        samplers: Samplers,
        work: Work,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.programs, self.names, self.store, self.samplers, self.work = programs, names, kept, samplers, work
        self._facts, self._limits, self._clock = facts, limits, clock
        self._lock = threading.Lock()  # of the three that follow
        self._models: dict[str, Live] = {}
        self._seen: dict[str, float] = {}  # sessions, and when they last gave a sign
        self._finished: set[str] = set()

    @property
    def base(self) -> Base:
        return self.programs.base

    # Sessions

    def open(self, owner: str, body: bodies.CreateSession) -> str:
        if body.project_id is not None:
            raise Refused("there are no projects here; leave project_id out", param="project_id")
        id = str(uuid.uuid4())
        self.store.open(id, owner, body.display_name, body.user_metadata)
        with self._lock:
            self._seen[id] = self._clock()
        return id

    def beat(self, id: str, owner: str) -> None:
        """Refused (410) where the session has ended."""
        self.store.session(id, owner)
        with self._lock:
            self._check_open(id)
            self._seen[id] = self._clock()

    def finish(self, id: str, owner: str) -> None:
        self.store.session(id, owner)
        self._end([id])

    def tidy(self) -> None:
        """Ends sessions that are not heard of any more, and deletes what has expired."""
        self._end(self._silent(IDLE))
        self.store.expire()

    def _check_open(self, session: str) -> None:
        """Whose holder has the lock: what a session that has ended is given nobody would ever end."""
        if session in self._finished:
            raise Refused(f"the session {session} has ended", code="session_finished", status=410)

    def _silent(self, seconds: float) -> list[str]:
        with self._lock:
            return [id for id, seen in self._seen.items() if seen < self._clock() - seconds]

    def _end(self, sessions: Sequence[str]) -> None:
        with self._lock:
            for id in sessions:
                self._seen.pop(id, None)
                self._finished.add(id)
            for id in [id for id, live in self._models.items() if live.session in sessions]:
                del self._models[id]
        for id in sessions:
            self.samplers.end(id)

    def _end_again(self, session: str) -> None:
        """For who has just given a session something, where it ended meanwhile."""
        with self._lock:
            ended = session in self._finished
        if ended:
            self.samplers.end(session)

    # What is asked of models

    def create(self, owner: str, body: bodies.CreateModel) -> Asked:
        self._check_base(body.base_model)
        config = body.lora_config
        if config.rank > self._limits.rank:
            raise Refused(
                f"rank is {config.rank}, and may be {self._limits.rank} here (config.tinker.rank)",
                param="lora_config.rank",
            )
        shape = Shape(config.rank, config.train_attn, config.train_mlp, config.train_unembed)
        seed = secrets.randbits(31) if config.seed is None else config.seed % 2**31
        make = functools.partial(Learner.begin, self.programs, shape, seed)
        return self._new(owner, body.session_id, body.model_seq_id, body.user_metadata, make, "create_model")

    def load(self, owner: str, body: bodies.LoadWeights) -> Asked:
        """Into a new model, where the request names a session, or into one that is there."""
        if (body.model_id is None) == (body.session_id is None):
            raise Refused("name a model_id or a session_id, and one of them", param="model_id")
        if body.weights_access_token is not None:
            raise Refused(
                "weights are their key's alone here; leave weights_access_token out", param="weights_access_token"
            )
        if body.base_model is not None:
            self._check_base(body.base_model)
        read = functools.partial(self._read, owner, body.path, body.optimizer)
        if body.session_id is not None:
            if body.model_seq_id is None:
                raise Refused("model_seq_id is missing", param="model_seq_id")
            more = {"path": body.path}
            return self._new(owner, body.session_id, body.model_seq_id, body.user_metadata, read, "load_weights", more)

        def replace(live: Live) -> dict[str, Any]:
            loaded = read()
            if loaded.shape != live.learner.shape:
                raise Refused(
                    f"{body.path} is an adapter of {loaded.shape}, and the model has {live.learner.shape}; use "
                    "create_training_client_from_state",
                    param="path",
                )
            live.learner = loaded
            return {"path": body.path, "model_id": live.id, "type": "load_weights"}

        return self._in_line(owner, body.model_id or "", body.seq_id, replace)

    def forward_backward(self, owner: str, raw: bytes) -> Asked:
        asked = wire.read_request(raw)

        def run(live: Live) -> bytes:
            learner = live.learner
            try:
                loss = batches.find_loss(asked.loss_fn)
                settings = batches.check_settings(loss, asked.loss_fn, wire.settings_of(asked))
                data = [wire.datum_of(datum, f"data[{index}]") for index, datum in enumerate(asked.data)]
                if not data:
                    raise Refused("data is empty", param="data")
                sizes = self.base.model.spec.vocab_size, self.programs.longest
                for index, datum in enumerate(data):
                    batches.check_datum(datum, f"data[{index}]", loss, asked.loss_fn, *sizes)
            except Refused as refused:
                if not asked.forward_only:
                    learner.fail(refused.message)
                raise
            return wire.forward_output(*learner.run(data, asked.loss_fn, settings, asked.forward_only))

        return self._in_line(owner, asked.model_id, asked.seq_id, run, len(raw))

    def optim_step(self, owner: str, body: bodies.OptimStep) -> Asked:
        def step(live: Live) -> dict[str, Any]:
            if body.optimizer_params is not None or body.adam_params is None:
                raise Refused("the optimizer here is AdamW; send adam_params", param="adam_params")
            settings = _checked(bodies.Adam, body.adam_params, "adam_params")
            metrics = live.learner.step(Adam(**settings.model_dump()))
            self.store.touch(live.id)
            return {"metrics": metrics, "type": "optim_step"}

        return self._in_line(owner, body.model_id, body.seq_id, step)

    def save(self, owner: str, body: bodies.SaveWeights) -> Asked:
        def save(live: Live) -> dict[str, Any]:
            write = functools.partial(checkpoints.save_state, learner=live.learner, facts=self._facts)
            name = body.path or f"step-{live.learner.moments.steps:06d}"
            more = {"ttl": body.ttl_seconds, "metadata": body.user_metadata, "overwrite": body.overwrite}
            return {"path": self._save(live, store.WEIGHTS, name, write, **more), "type": "save_weights"}

        return self._in_line(owner, body.model_id, body.seq_id, save)

    def save_for_sampler(self, owner: str, body: bodies.SaveForSampler) -> Asked:
        def save(live: Live) -> dict[str, Any]:
            write = functools.partial(checkpoints.save_adapter, learner=live.learner, facts=self._facts)
            kind = {"type": "save_weights_for_sampler"}
            if body.path is not None:
                more = {"ttl": body.ttl_seconds, "metadata": body.user_metadata}
                return {"path": self._save(live, store.SAMPLER, body.path, write, **more), **kind}
            if body.kind not in ("snapshot", "inflight") or body.sampling_session_seq_id is None:
                raise Refused(
                    "name a path, or a sampling_session_seq_id and the kind snapshot or inflight", param="kind"
                )
            directory = self.store.new_directory()
            write(directory)
            id = f"{live.session}:sample:{body.sampling_session_seq_id}"
            self.samplers.passing(id, owner, live.session, live.id, directory, body.kind == "inflight")
            self._end_again(live.session)
            return {"sampling_session_id": id, **kind}

        return self._in_line(owner, body.model_id, body.seq_id, save)

    def unload(self, owner: str, id: str) -> Asked:
        def unload(live: Live) -> dict[str, Any]:
            with self._lock:
                self._models.pop(live.id, None)
            return {"model_id": live.id, "type": "unload_model"}

        return self._in_line(owner, id, None, unload)

    def info(self, owner: str, id: str) -> dict[str, Any]:
        run = self.store.run(id, owner)
        name, arch = run.base_model, self.base.reader.config.get("model_type")
        return {
            "type": "get_info",
            "model_data": {"arch": arch, "model_name": name, "tokenizer_id": name},
            "model_id": id,
            "is_lora": True,
            "lora_rank": json.loads(run.shape)["rank"],
            "model_name": name,
        }

    def waiting_in(self, asked: Asked) -> None:
        """Looks after something that was asked of a model and is not done: whether what comes before it ever came."""
        with self._lock:
            live = self._models.get(asked.id.rpartition(":")[0])
        if live is not None:
            self.work.skip(live.line)

    def sample(self, owner: str, body: bodies.Sample) -> tuple[str, list[str]]:
        """On the event loop. The id of the request, and of its sequences."""
        if body.sampling_session_id is None or body.seq_id is None:
            raise Refused("sampling_session_id and seq_id are needed", param="sampling_session_id")
        return self.samplers.sample(owner, body)

    def create_sampler(self, owner: str, body: bodies.CreateSamplingSession) -> str:
        self.beat(body.session_id, owner)
        adapter = None
        if body.model_path is not None:
            checkpoint = self.store.find(body.model_path, owner)
            if checkpoint.kind != store.SAMPLER:
                raise Refused(
                    f"{body.model_path} is a state to train on from; sample from what save_weights_for_sampler saved",
                    param="model_path",
                )
            adapter = self.store.directory(checkpoint) / checkpoints.ADAPTER
        elif body.base_model is None:
            raise Refused("name a base_model or a model_path", param="base_model")
        if body.base_model is not None:
            self._check_base(body.base_model)
        id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
        self.samplers.add(id, owner, body.session_id, body.model_path, adapter)
        self._end_again(body.session_id)
        return id

    def _new(
        self,
        owner: str,
        session: str,
        number: int,
        metadata: Any,
        make: Callable[[], Learner],
        kind: str,
        more: dict[str, Any] | None = None,
    ) -> Asked:
        """Asks for a new model of a session."""
        self.beat(session, owner)
        id = f"{session}:train:{number}"

        def create() -> dict[str, Any]:
            self._make_room()
            learner = make()
            self.store.begin(id, owner, session, self.names[0], learner.shape._asdict(), metadata)
            with self._lock:
                self._check_open(session)
                self._models[id] = Live(id, owner, session, learner)
            return {"model_id": id, "type": kind} | (more or {})

        return self.work.submit(f"{id}:0", owner, create)

    def _make_room(self) -> None:
        """Refused where as many models as may be are in use."""
        silent, most = self._silent(QUIET), self._limits.models
        with self._lock:
            others = list(self._models.values())
            for live in [live for live in others if live.session in silent]:
                if len(others) < most:
                    break
                others.remove(live)
                del self._models[live.id]
        if len(others) >= most:
            raise Refused(
                f"there are {len(others)} models in training, and there may be {most} at a time "
                "(config.tinker.models); end a session that is over, ServiceClient.close does",
                code="too_many_models",
            )

    def _in_line(self, owner: str, id: str, number: int | None, do: Callable[[Live], Any], size: int = 0) -> Asked:
        with self._lock:
            live = self._models.get(id)
        if live is None or live.owner != owner:
            raise Refused(
                f"there is no model {id!r} in training; its session may have ended, or the server been started anew. "
                "Go on from a saved state",
                param="model_id",
                code="model_not_found",
                status=404,
            )
        with self._lock:
            self._check_open(live.session)
            self._seen[live.session] = self._clock()
        last = secrets.token_hex(8) if number is None else str(number)
        return self.work.submit(f"{id}:{last}", owner, lambda: do(live), size, live.line, number)

    def _read(self, owner: str, path: str, optimizer: bool) -> Learner:
        checkpoint = self.store.find(path, owner)
        if checkpoint.kind != store.WEIGHTS:
            raise Refused(f"{path} is for sampling; load what save_state saved", param="path")
        self._check_base(checkpoint.base_model)
        return checkpoints.load_state(self.store.directory(checkpoint), self.programs, optimizer)

    def _save(self, live: Live, kind: str, name: str, write: Callable[[Path], None], **options: Any) -> str:
        run = self.store.run(live.id, live.owner)
        return self.store.save(run, kind, name, write, checkpoints.size_of, **options).path

    def _check_base(self, name: str) -> None:
        if name not in self.names:
            raise Refused(
                f"there is no base model {name!r} here; there is {self.names[0]!r}",
                param="base_model",
                code="model_not_found",
            )


def _checked(kind: Any, given: dict[str, Any], where: str) -> Any:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *map(str, first["loc"])])
        raise Refused(f"{place}: {first['msg']}", param=place) from error
