"""The server as a process: what its config asks for, wired together and served until a signal ends it."""

import contextlib
import fcntl
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import anyio
import anyio.to_thread
import sqlalchemy
import uvicorn
from fastapi import FastAPI
from ml_collections import ConfigDict
from prometheus_client import CollectorRegistry, ProcessCollector

from ftjax.errors import UserError
from ftjax.hosted import app, files, forms, logs, uploads
from ftjax.hosted import settings as configs
from ftjax.hosted.database import Base, connect
from ftjax.hosted.gate import OPEN, Rules
from ftjax.hosted.keys import Keys
from ftjax.hosted.page import page
from ftjax.hosted.serving import Serving

_TIDY_EVERY = 600  # seconds
_FINISH_WITHIN = 20  # seconds that answers have to end in when the server ends


def serve(settings: ConfigDict) -> int:
    """Until SIGTERM or Ctrl-C; 0 once what was asked is answered."""
    with _alone(Path(settings.folder)), _listen(settings.host, settings.port) as sock:
        engine = _database(settings)
        check_database(settings, engine)
        keys = Keys(engine)
        logs.begin()
        application = wire(settings, engine, keys)
        scheme = "https" if settings.certificate else "http"
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"serving {scheme}://{host}:{sock.getsockname()[1]}/v1; all of it is in {settings.folder}", flush=True)
        if not keys.all():
            print(f"an API key, which is not shown again: {keys.create('first').secret}", flush=True)
        if scheme == "http" and not configs.is_local(settings):
            print("keys and data pass in the clear: set config.certificate, or let a proxy do TLS", flush=True)
        return _run(application, sock, settings)


def wire(settings: ConfigDict, engine: sqlalchemy.Engine, keys: Keys) -> FastAPI:
    """The application with all its parts."""
    folder, registry = Path(settings.folder), CollectorRegistry()
    ProcessCollector(registry=registry)  # memory, open files, time of the CPU
    limits = files.Limits(
        settings.files.max_mb * configs.MB,
        settings.files.quota_mb * configs.MB,
        round(settings.files.retention_days * 24 * 3600),
    )
    kept = files.Files(engine, folder / "files", limits)
    large = uploads.Uploads(kept, folder / "uploads", settings.files.upload_mb * configs.MB)
    parts = [files.routes(kept), uploads.routes(large)]
    tidy = [kept.expire, large.expire]
    larger = {
        "/v1/files": settings.files.max_mb * configs.MB + forms.OVERHEAD,
        "/v1/uploads/{upload_id}/parts": uploads.PART + forms.OVERHEAD,
    }
    model = Serving(settings, engine, kept, registry) if settings.model.source else None
    if model is not None:
        parts += model.routes
        tidy += [model.jobs.expire, model.tinker.tidy]

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with model.running() if model else contextlib.nullcontext():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_tidy, tidy)
                yield
                tasks.cancel_scope.cancel()

    rules = Rules(
        keys.owner,
        configs.hosts(settings),
        settings.limits.requests_per_minute,
        settings.limits.body_mb * configs.MB,
        larger,
        (*OPEN, page.PATH) if model else OPEN,
    )
    application = app.create(
        *parts, engine=engine, rules=rules, registry=registry, lifespan=lifespan, lacks=model and model.lacks
    )
    application.state.files, application.state.uploads = kept, large
    application.state.tinker = model and model.tinker.service
    return application


def keys_of(settings: ConfigDict) -> Keys:
    """The keys, also while the server runs."""
    return Keys(_database(settings))


def _database(settings: ConfigDict) -> sqlalchemy.Engine:
    Path(settings.folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    return connect(configs.database_url(settings))


def check_database(settings: ConfigDict, engine: sqlalchemy.Engine) -> None:
    """UserError where the database is new and the folder is not: what has no row is removed as left over."""
    with engine.connect() as connection:
        rows = (sqlalchemy.select(table).limit(1) for table in Base.metadata.sorted_tables)
        if any(connection.execute(one).first() for one in rows):
            return
    folder = Path(settings.folder)
    if there := [name for name in ("files", "jobs", "tinker", "uploads") if any((folder / name).glob("*"))]:
        raise UserError(
            f"config.folder={str(folder)!r} has {', '.join(there)} of another database than {engine.url}, which is "
            "empty; name theirs in config.database, or another folder"
        )


async def _tidy(chores: Sequence[Callable[[], None]]) -> None:
    while True:
        for chore in chores:
            try:
                await anyio.to_thread.run_sync(chore)
            except Exception:  # such as a database that is away; the next time may do
                logs.log.exception("tidying failed")
        await anyio.sleep(_TIDY_EVERY)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """UserError where another server uses the folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "server.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"config.folder={str(folder)!r}: another server uses it; end it or name another") from error
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"config.host={host!r}, config.port={port}: {error.strerror}; name another") from error


def _run(application: FastAPI, sock: socket.socket, settings: ConfigDict) -> int:
    """1 where the application does not begin, of which the log has the reason."""
    config = uvicorn.Config(
        application,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_FINISH_WITHIN,
        ssl_certfile=settings.certificate or None,
        ssl_keyfile=settings.private_key or None,
    )
    # uvicorn ends on these, and then raises them again for whom they were meant before: nobody.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    process = uvicorn.Server(config)
    process.run(sockets=[sock])
    return 0 if process.started else 1
