"""What is under /api/v1, where Tinker's client looks for it: version 0.38 of it, unchanged."""

import asyncio
import datetime
import io
import json
import tarfile
from collections.abc import Callable
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from ftjax.hosted.refusals import Refused
from ftjax.hosted.tinker import bodies, checkpoints, store, wire
from ftjax.hosted.tinker.service import Service
from ftjax.hosted.tinker.work import Asked, Failed

HOLD = 30.0  # seconds that an answer waits for a result; the client gives up after 45, and asks again
_LIMIT = Annotated[int, Query(ge=1, le=1000)]
_OFFSET = Annotated[int, Query(ge=0, lt=2**31)]


def routes(service: Service, hold: float = HOLD) -> APIRouter:
    router = APIRouter(prefix="/api/v1")
    _add_service(router, service)
    _add_training(router, service)
    _add_futures(router, service, hold)
    _add_sampling(router, service)
    _add_records(router, service)
    return router


def _add_service(router: APIRouter, service: Service) -> None:
    @router.get("/healthz")
    def healthy() -> dict[str, str]:
        return {"status": "ok"}

    @router.post("/client/config")
    def config() -> dict[str, Any]:
        """What the client is to do otherwise than it would: nothing."""
        return {}

    @router.post("/client/dynamic_config")
    def dynamic_config() -> dict[str, Any]:
        return {"sample_cancel_enabled": True}

    @router.get("/get_server_capabilities")
    def capabilities() -> dict[str, Any]:
        length = service.programs.longest
        model = {"model_name": service.names[0], "max_context_length": length, "trainable": True, "sampleable": True}
        return {"supported_models": [model]}

    @router.post("/telemetry")
    def telemetry() -> dict[str, str]:
        """What the client says of itself is not kept."""
        return {"status": "accepted"}

    @router.post("/create_session")
    def create_session(body: bodies.CreateSession, request: Request) -> dict[str, Any]:
        ties = "the base has no unembedding of its own: train_unembed adapts nothing" if service.programs.ties else None
        return {
            "type": "create_session",
            "session_id": service.open(request.state.owner, body),
            "info_message": ties,
        }

    @router.post("/session_heartbeat")
    def heartbeat(body: bodies.Heartbeat, request: Request) -> dict[str, str]:
        service.beat(body.session_id, request.state.owner)
        return {"type": "session_heartbeat"}

    @router.post("/sessions/{session}/finish")
    def finish(session: str, request: Request) -> None:
        service.finish(session, request.state.owner)

    @router.get("/sessions")
    def sessions(request: Request, limit: _LIMIT = 20, offset: _OFFSET = 0) -> dict[str, Any]:
        return {"sessions": service.store.sessions(request.state.owner, limit, offset)}

    @router.get("/sessions/{session}")
    def session(session: str, request: Request) -> dict[str, Any]:
        found = service.store.session(session, request.state.owner)
        return {
            "training_run_ids": service.store.runs_of(session),
            "sampler_ids": service.samplers.of_session(session),
            "user_metadata": _texts(found.user_metadata),
            "display_name": found.display_name,
        }


def _add_training(router: APIRouter, service: Service) -> None:
    @router.post("/create_model")
    def create_model(body: bodies.CreateModel, request: Request) -> dict[str, Any]:
        return _future(service.create(request.state.owner, body))

    @router.post("/get_info")
    def get_info(body: bodies.OfModel, request: Request) -> dict[str, Any]:
        return service.info(request.state.owner, body.model_id)

    @router.post("/forward_backward")
    async def forward_backward(request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "") != wire.PROTOBUF or "content-encoding" in request.headers:
            raise Refused(f"send a ForwardBackwardRequest with Content-Type: {wire.PROTOBUF}, uncompressed", status=415)
        raw = await request.body()
        return _future(await anyio.to_thread.run_sync(service.forward_backward, request.state.owner, raw))

    @router.post("/optim_step")
    def optim_step(body: bodies.OptimStep, request: Request) -> dict[str, Any]:
        return _future(service.optim_step(request.state.owner, body))

    @router.post("/save_weights")
    def save_weights(body: bodies.SaveWeights, request: Request) -> dict[str, Any]:
        return _future(service.save(request.state.owner, body))

    @router.post("/save_weights_for_sampler")
    def save_weights_for_sampler(body: bodies.SaveForSampler, request: Request) -> dict[str, Any]:
        return _future(service.save_for_sampler(request.state.owner, body))

    @router.post("/load_weights")
    def load_weights(body: bodies.LoadWeights, request: Request) -> dict[str, Any]:
        return _future(service.load(request.state.owner, body))

    @router.post("/unload_model")
    def unload_model(body: bodies.OfModel, request: Request) -> dict[str, Any]:
        return _future(service.unload(request.state.owner, body.model_id))


def _add_futures(router: APIRouter, service: Service, hold: float) -> None:
    @router.post("/retrieve_future")
    async def retrieve_future(body: bodies.Retrieve, request: Request) -> Response:
        asked = service.work.find(body.request_id, request.state.owner)
        waiting = asyncio.wrap_future(asked.future)
        waiting.add_done_callback(lambda its: its.cancelled() or its.exception())  # also if nobody waits then
        done, _ = await asyncio.wait([waiting], timeout=hold)
        if not done:
            await anyio.to_thread.run_sync(service.waiting_in, asked)
            return JSONResponse({"type": "try_again", "request_id": asked.id, "queue_state": "active"})
        try:
            result = waiting.result()
        except Failed as failed:
            return JSONResponse({"error": failed.message, "category": "user" if failed.by_user else "server"})
        return Response(result, media_type=wire.PROTOBUF) if isinstance(result, bytes) else JSONResponse(result)

    @router.post("/cancel_future")
    async def cancel_future(body: bodies.Retrieve, request: Request) -> None:
        service.samplers.cancel(body.request_id, request.state.owner)


def _add_sampling(router: APIRouter, service: Service) -> None:
    @router.post("/create_sampling_session")
    def create_sampling_session(body: bodies.CreateSamplingSession, request: Request) -> dict[str, Any]:
        id = service.create_sampler(request.state.owner, body)
        return {"type": "create_sampling_session", "sampling_session_id": id}

    @router.get("/samplers/{sampler}")
    def sampler(sampler: str, request: Request) -> dict[str, Any]:
        return service.samplers.describe(sampler, request.state.owner)

    @router.post("/asample")
    async def asample(body: bodies.Sample, request: Request) -> dict[str, Any]:
        id, sequences = service.sample(request.state.owner, body)
        return {"request_id": id, "sample_sequence_ids": sequences}


def _add_records(router: APIRouter, service: Service) -> None:
    kept, one = service.store, "/training_runs/{run}/checkpoints/{kind}/{name}"

    def find(run: str, kind: str, name: str, request: Request) -> store.Checkpoint:
        return kept.find(f"tinker://{run}/{kind}/{name}", request.state.owner)

    @router.get("/training_runs")
    def runs(request: Request, limit: _LIMIT = 20, offset: _OFFSET = 0) -> dict[str, Any]:
        found, count = kept.runs(request.state.owner, limit, offset)
        cursor = {"offset": offset, "limit": limit, "total_count": count}
        return {"training_runs": [_run(kept, run) for run in found], "cursor": cursor}

    @router.get("/training_runs/{run}")
    def run(run: str, request: Request) -> dict[str, Any]:
        return _run(kept, kept.run(run, request.state.owner))

    @router.get("/training_runs/{run}/checkpoints")
    def of_run(run: str, request: Request) -> dict[str, Any]:
        kept.run(run, request.state.owner)
        return {"checkpoints": [_checkpoint(its) for its in kept.checkpoints(request.state.owner, run)[0]]}

    @router.get("/checkpoints")
    def of_owner(request: Request, limit: _LIMIT = 100, offset: _OFFSET = 0) -> dict[str, Any]:
        found, count = kept.checkpoints(request.state.owner, None, limit, offset)
        cursor = {"offset": offset, "limit": limit, "total_count": count}
        return {"checkpoints": [_checkpoint(its) for its in found], "cursor": cursor}

    @router.post("/weights_info")
    def weights_info(body: bodies.WeightsInfo, request: Request) -> dict[str, Any]:
        found = kept.find(body.tinker_path, request.state.owner)
        shape = json.loads(found.shape)
        return {"base_model": found.base_model, "is_lora": True, "lora_rank": shape.pop("rank"), **shape}

    @router.delete(one)
    def delete(run: str, kind: str, name: str, request: Request) -> None:
        kept.delete(find(run, kind, name, request))

    @router.put(f"{one}/ttl")
    def keep_for(run: str, kind: str, name: str, body: bodies.Ttl, request: Request) -> None:
        kept.keep_for(find(run, kind, name, request), body.ttl_seconds)

    @router.get(f"{one}/archive")
    def archive(run: str, kind: str, name: str, request: Request) -> Response:
        """The adapter as peft has it, in a tar file: what python -m ftjax.generate --adapter and others read."""
        directory = kept.directory(find(run, kind, name, request)) / checkpoints.ADAPTER
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for file in sorted(directory.iterdir()):
                tar.add(file, file.name, filter=_of_nobody)
        return Response(packed.getvalue(), media_type="application/x-tar")


def _of_nobody(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mode = 0o644
    return info


def _future(asked: Asked) -> dict[str, Any]:
    return {"request_id": asked.id, "model_id": asked.id.rpartition(":")[0]}


def _run(kept: store.Store, run: store.Run) -> dict[str, Any]:
    found, _ = kept.checkpoints(run.owner, run.id)
    newest: Callable[[str], Any] = lambda kind: next((_checkpoint(its) for its in found if its.kind == kind), None)  # noqa: E731
    return {
        "training_run_id": run.id,
        "base_model": run.base_model,
        "model_owner": run.owner,
        "is_lora": True,
        "lora_rank": json.loads(run.shape)["rank"],
        "last_request_time": _time(run.last_at),
        "last_checkpoint": newest(store.WEIGHTS),
        "last_sampler_checkpoint": newest(store.SAMPLER),
        "user_metadata": _texts(run.user_metadata),
    }


def _checkpoint(checkpoint: store.Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": store.KINDS[checkpoint.kind],
        "time": _time(checkpoint.created_at),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.bytes,
        "public": False,
        "user_metadata": _texts(checkpoint.user_metadata),
        "expires_at": None if checkpoint.expires_at is None else _time(checkpoint.expires_at),
    }


def _time(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def _texts(metadata: str) -> dict[str, str]:
    """What a client said of something, as texts, which are all it reads again."""
    return {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in json.loads(metadata).items()
    }
