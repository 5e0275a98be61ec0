"""A server on this machine for the length of a test, and clients of it."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import uvicorn
from fastapi import FastAPI
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax.hosted import server, settings
from ftjax.hosted.database import connect
from ftjax.hosted.keys import Keys


def settings_of(folder: Path, **changes) -> ConfigDict:
    """The server's config with its folder; changes: by dotted keys."""
    return configs.changed(settings.defaults(), {"folder": str(folder), **changes})


@contextlib.contextmanager
def running(application) -> Iterator[str]:
    """Serves an ASGI application; gives its address, http://127.0.0.1:PORT."""
    config = uvicorn.Config(application, http="h11", ws="none", log_config=None, access_log=False)
    process = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=process.run, args=([sock],))
        thread.start()
        try:
            while not process.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            process.should_exit = True
            thread.join()


class Hosted:
    """The server of some settings, with keys for users by name."""

    def __init__(self, settings: ConfigDict):
        Path(settings.folder).mkdir(exist_ok=True)
        self.engine = connect(server.configs.database_url(settings))
        self.keys = Keys(self.engine)
        self.application = server.wire(settings, self.engine, self.keys)
        self.files, self.uploads = self.application.state.files, self.application.state.uploads
        self._secrets: dict[str, str] = {}
        self.url = ""

    def key(self, user: str) -> str:
        if user not in self._secrets:
            self._secrets[user] = self.keys.create(user).secret
        return self._secrets[user]

    def client(self, user: str = "anna", **options) -> openai.OpenAI:
        """The official client; it tries nothing again unless told to."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key(user), **{"max_retries": 0} | options)


@contextlib.contextmanager
def hosted(folder: Path, **changes) -> Iterator[Hosted]:
    """A server over a folder, which may be used again after it."""
    made = Hosted(settings_of(folder, **changes))
    try:
        with running(made.application) as made.url:
            yield made
    finally:
        made.engine.dispose()


def routes_of(application: FastAPI, prefix: str) -> list[tuple[str, list[str]]]:
    """(template, methods) of all routes under a path, whatever parts the server has."""

    def below(routes) -> Iterator[tuple[str, list[str]]]:
        for route in routes:
            router = getattr(route, "original_router", None) or getattr(route, "router", None)
            if router is not None:
                yield from below(router.routes)
            else:
                yield route.path, sorted(route.methods)

    return sorted(route for route in below(application.routes) if route[0].startswith(prefix))
