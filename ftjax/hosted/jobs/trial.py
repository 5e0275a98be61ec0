"""A grader tried on one answer, in a process of its own with limits: some take hours for texts of a few megabytes.

python -m ftjax.hosted.jobs.trial < {"grader": ..., "judges": [url, key], "text": ..., "item": ...}
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ftjax.errors import TransientError, UserError
from ftjax.evals import graders
from ftjax.evals.graders import Grade, Grader, Judges

_SECONDS = 60.0  # that it may take, of which so many on the processor:
_CPU_SECONDS = 20
_MEMORY = 2 * 2**30  # bytes


def grade(grader: Grader, text: str, item: Mapping[str, Any], judges: Judges, cpu_seconds: int = _CPU_SECONDS) -> Grade:
    """As `graders.grade`; UserError, too, where that takes too long or too much memory."""
    asked = {"grader": grader, "judges": judges, "text": text, "item": item, "cpu_seconds": cpu_seconds}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ftjax.hosted.jobs.trial"],
            input=json.dumps(asked).encode(),
            capture_output=True,
            # The server's own way to its packages; and one thread, since those of numeric libraries ask for memory.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        raise UserError(
            f"grading took longer than {cpu_seconds} s of a processor or {_SECONDS:g} s in all, or more than "
            f"{_MEMORY >> 30} GiB; try it on shorter texts"
        )
    said = json.loads(done.stdout)
    if "mistake" in said:
        raise (TransientError if said["transient"] else UserError)(said["mistake"])
    return Grade(**said)


def _main() -> None:
    asked = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (asked["cpu_seconds"],) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    try:
        found = graders.grade(asked["grader"], asked["text"], asked["item"], Judges(*asked["judges"]))
        said: dict[str, Any] = found._asdict()
    except UserError as error:
        said = {"mistake": str(error), "transient": isinstance(error, TransientError)}
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    _main()
