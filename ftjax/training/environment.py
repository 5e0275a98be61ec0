"""What a run ran on: versions, devices, time, and a description of each of its starts, in environment.json.

Device time is that of every start from beginning to end, so that reading weights, compiling, evaluating and steps that
a kill threw away are in it, which the step times of metrics.jsonl leave out.
"""

import contextlib
import json
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ftjax import distributed
from ftjax.atomic import write_text

FILE = "environment.json"
_PACKAGES = ("ftjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def begin(
    workdir: Path,
    mesh: Mesh,
    began: float,
    step: int | None,
    steps: int,
    run: Mapping[str, str],
    data: Mapping[str, int],
) -> None:
    """Records a start; a fresh run forgets what an earlier one recorded. For the first process only.

    began: seconds since 1970. step: that the run goes on from, None for a fresh one; steps: its length. run: what it is
    in words; data: counts of the rows.
    """
    starts = [] if step is None else read(workdir)
    # One that was killed lived at least until its last record. metrics.jsonl is written anew after this.
    starts = [start | {"ended": ended(workdir, start)} for start in starts]
    starts.append(
        {
            "step": step or 0,
            "steps": steps,
            "began": began,
            "ended": None,
            "devices": {
                "platform": mesh.devices.flat[0].platform,
                "kind": mesh.devices.flat[0].device_kind,
                "count": mesh.size,
                "processes": distributed.count(),
            },
            "versions": versions(),
            "run": dict(run),
            "data": dict(data),
        }
    )
    _write(workdir, starts)


def end(workdir: Path) -> None:
    """Records that the last start has ended, however it did; on the first process."""
    if distributed.is_first():
        starts = read(workdir)
        starts[-1]["ended"] = time.time()
        with contextlib.suppress(OSError):  # of a full disk the run says more; its last record tells the time as well
            _write(workdir, starts)


def read(workdir: Path) -> list[dict[str, Any]]:
    """The starts, the oldest first; [] of a run that is older than the file. Raises ValueError where it is damaged."""
    file = workdir / FILE
    return json.loads(file.read_text(encoding="utf-8"))["starts"] if file.is_file() else []


def ended(workdir: Path, start: Mapping[str, Any]) -> float:
    """When a start ended; of one that was killed, or is running, when it last wrote a record."""
    if start.get("ended"):
        return start["ended"]
    records = workdir / "metrics.jsonl"
    return max(start["began"], records.stat().st_mtime if records.is_file() else 0.0)


def versions() -> dict[str, str]:
    """{package: version} of Python and of what decides a run's numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a directory that is not installed
            found[name] = "not installed"
    return found


def _write(workdir: Path, starts: list[dict[str, Any]]) -> None:
    write_text(workdir / FILE, json.dumps({"version": 1, "starts": starts}, indent=2) + "\n")
