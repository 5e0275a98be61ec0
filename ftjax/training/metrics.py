"""Metrics to `metrics.jsonl`, TensorBoard and trackers, a record a logged step; docs/running.md lists their names."""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Only the protocol buffers and the record format: tensorboard's own writer, and tensorboardX, import tensorflow or
# torch if they are installed.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ftjax import distributed
from ftjax.atomic import write_text
from ftjax.training.trackers import Trackers


class MetricsWriter:
    """Appends records, after removing those later than `start_step` (-1 for a new run), which a killed run left.

    So an interrupted and resumed run has the same records as an uninterrupted one. With several processes only the
    first one writes; in the others the methods do nothing.

    trackers: names of `training.trackers`; config: the run's, for them, {dotted key: JSON}.
    """

    def __init__(
        self, workdir: Path, start_step: int, trackers: Sequence[str] = (), config: Mapping[str, Any] | None = None
    ):
        self._writes = distributed.is_first()
        if not self._writes:
            return
        self.path = workdir / "metrics.jsonl"
        kept = [record for record in read(self.path) if record["step"] <= start_step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a")
        board = workdir / "tensorboard"
        board.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._board_file = (board / name).open("wb")
        self._board = RecordWriter(self._board_file)
        self._event(file_version="brain.Event:2")
        # TensorBoard then ignores what earlier files say about this step and later ones.
        self._event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._trackers = Trackers(trackers, workdir, config or {})

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends one record."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step} | metrics) + "\n")
        self._file.flush()
        metrics = numbers(metrics)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._event(step=step, summary=Summary(value=values))
        self._trackers.write(step, metrics)

    def close(self, finished: bool = False) -> None:
        """finished: whether the run is, and not to be gone on with; what trackers are told."""
        if not self._writes:
            return
        self._trackers.close(finished)
        self._file.close()
        self._board_file.close()

    def _event(self, **fields: Any) -> None:
        self._board.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._board_file.flush()


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """A record without what is no number: the mark of the evaluation set."""
    return {name: value for name, value in record.items() if not isinstance(value, str)}


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl` or another JSONL file, without a last line torn by a kill; [] without a file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: texts hold other line ends, too
    return [json.loads(line) for line in lines[:-1] if line]


def is_eval(record: dict) -> bool:
    """Whether a record of metrics.jsonl is of an evaluation."""
    return any(name.startswith("eval_") for name in record)
