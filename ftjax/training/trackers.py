"""Trackers of experiments, which get what metrics.jsonl gets: Weights & Biases, MLflow, trackio.

Where they send it, and whether they are offline, is set as each of them has it: WANDB_MODE, MLFLOW_TRACKING_URI,
TRACKIO_SPACE_ID, ... A run keeps their ids in `trackers.json`, so that it is one run there, too, when it is resumed.
"""

import importlib.util
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ftjax.atomic import write_text
from ftjax.errors import TransientError, UserError

log = logging.getLogger(__name__)

_IDS = "trackers.json"  # {name: id of the run there}


class Tracker(NamedTuple):
    """A run that is open in a tracker."""

    name: str
    id: str
    write: Callable[[int, Mapping[str, float]], Any]
    close: Callable[[bool], Any]  # whether the run is finished, and not to be gone on with


def check(names: Iterable[str]) -> None:
    """UserError that names the first tracker whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without: a directory of that name, in which it keeps its files
            raise UserError(f"config.trackers: {name} is not installed; pip install 'ftjax[{name}]', or leave it out")


class Trackers:
    """The trackers of a run. One that fails while the run goes on is left out from there, with a warning.

    config: the run's, {dotted key: JSON}.

    Raises:
      TransientError: one does not start.
    """

    def __init__(self, names: Iterable[str], workdir: Path, config: Mapping[str, Any]):
        kept = workdir / _IDS
        ids = json.loads(kept.read_text()) if kept.exists() else {}
        self._open: list[Tracker] = []
        for name in names:
            try:
                tracker = _START[name](workdir.resolve(), ids.get(name), config)
            except Exception as error:
                self.close(finished=False)
                raise TransientError(
                    f"config.trackers: {name} does not start ({type(error).__name__}: {error}); leave it out to train "
                    "without it"
                ) from error
            self._open.append(tracker)
            ids[name] = tracker.id
        if self._open:
            write_text(kept, json.dumps(ids) + "\n")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.write(step, metrics))

    def close(self, finished: bool) -> None:
        self._each(lambda tracker: tracker.close(finished))
        self._open = []

    def _each(self, call: Callable[[Tracker], Any]) -> None:
        for tracker in list(self._open):
            try:
                call(tracker)
            except Exception as error:  # whatever it is, hours of training are worth more
                self._open.remove(tracker)
                log.warning(
                    "config.trackers: %s fails (%s: %s) and gets nothing more; metrics.jsonl and tensorboard/ have all",
                    *(tracker.name, type(error).__name__, error),
                )


def _wandb(workdir: Path, known: str | None, config: Mapping[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "ftjax"),
        name=workdir.name,
        id=known or secrets.token_hex(4),
        resume="allow",
        config=dict(config),
        dir=workdir,
        settings=wandb.Settings(console="off"),  # or it takes stdout, and a progress bar with it
    )
    return Tracker(
        "wandb",
        run.id,
        lambda step, metrics: run.log(dict(metrics), step=step),
        lambda finished: run.finish(exit_code=0 if finished else 1),
    )


def _mlflow(workdir: Path, known: str | None, config: Mapping[str, Any]) -> Tracker:
    # Files, and not a database, because they need nothing but mlflow-skinny; it asks to be told so.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow
    from mlflow.entities import Metric, Param

    client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (workdir / "mlruns").as_uri())
    if known:
        client.update_run(known, status="RUNNING")
        run = known
    else:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ftjax")
        experiment = client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else client.create_experiment(name)
        run = client.create_run(number, run_name=workdir.name).info.run_id
        params = [Param(key, str(value)[:6000]) for key, value in config.items()]
        for first in range(0, len(params), 100):  # as many as one call may have
            client.log_batch(run, params=params[first : first + 100])

    def write(step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        named = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in metrics.items()}
        client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in named.items()])

    return Tracker(
        "mlflow", run, write, lambda finished: client.set_terminated(run, "FINISHED" if finished else "KILLED")
    )


def _trackio(workdir: Path, known: str | None, config: Mapping[str, Any]) -> Tracker:
    import trackio

    # It knows a run by its name, which two workdirs may share.
    name = known or f"{workdir.name}-{secrets.token_hex(3)}"
    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "ftjax"),
        name=name,
        resume="allow",
        config=dict(config),
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    return Tracker(
        "trackio", name, lambda step, metrics: run.log(dict(metrics), step=step), lambda finished: run.finish()
    )


_START = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
