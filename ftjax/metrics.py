"""Metrics to `metrics.jsonl` and TensorBoard, one record a logged step, under the names of FORMATS.md."""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends records; `start_step` is where the run (re)starts: records after it, left by a run that was killed, go.

    So an interrupted and resumed run leaves the records of an uninterrupted one.
    """

    def __init__(self, workdir: Path, start_step: int):
        self.path = workdir / "metrics.jsonl"
        kept = [record for record in read(self.path) if record["step"] <= start_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step} | metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line torn by a kill is left out; no file is no records."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
