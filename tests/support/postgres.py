"""A real PostgreSQL for the length of a test, where Debian's packages (postgresql) or others have put one."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest


def program(name: str) -> str | None:
    """Debian keeps the server's programs out of the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Its URL for SQLAlchemy; skips the test where there is none, or where root alone could start it."""
    initdb, server = program("initdb"), program("postgres")
    if not (initdb and server):
        pytest.skip("no initdb and postgres: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="ftjax-pg-"))  # a short path, as that of a socket must be
    user = {}
    if os.geteuid() == 0:  # as which it does not run
        user = {"user": "nobody"}
        shutil.chown(folder, "nobody")
    try:
        data = folder / "data"
        make = [initdb, "-D", data, "-U", "ftjax", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **user)
        command = [server, "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=folder, **user)
        try:
            _wait(f"host={folder} user=ftjax dbname=postgres", process)
            yield f"postgresql+psycopg://ftjax@/postgres?host={folder}"
        finally:
            process.terminate()
            process.communicate(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(address: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(address).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.1)
