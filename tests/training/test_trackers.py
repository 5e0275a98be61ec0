"""Trackers, with the packages themselves, offline: what they were sent is read back from their files."""

import json
import sqlite3
import struct
import time
from types import SimpleNamespace

import pytest

from ftjax import config as configs
from ftjax.errors import TransientError, UserError
from ftjax.training import metrics, trackers

CONFIG = {"adapter.rank": 8, "data.train": ["rows.jsonl"]}


def train(workdir, name):
    """A run that is stopped after step 2, resumed there, and finished."""
    workdir.mkdir()
    for start, steps in ((-1, (1, 2)), (2, (3, 4))):
        writer = metrics.MetricsWriter(workdir, start, (name,), CONFIG)
        for step in steps:
            writer.write(step, {"loss": 1.0 / step})
        writer.write(steps[-1], {"eval_x[train]/score": 0.25 * step, "evaluation_set": "ab12"})
        writer.close(finished=start > 0)
    return json.loads((workdir / "trackers.json").read_text())[name]


LOSSES = [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    known = train(tmp_path / "mine", "wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    losses, scores, runs, exits = [], [], [], []
    files = list((tmp_path / "mine/wandb").glob(f"offline-run-*/run-{known}.wandb"))
    assert len(files) == 2
    for path in sorted(files, key=lambda path: path.parent.name):
        records = []
        deadline = time.monotonic() + 20
        while not (records and records[-1].WhichOneof("record_type") in ("exit", "footer")):
            assert time.monotonic() < deadline  # its own process writes behind
            records = [Record.FromString(data) for data in leveldb_log(path)]
        for record in records:
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append((record.run.display_name, record.run.project, record.run.run_id))
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert config.items() >= {("adapter.rank", 8)}
            elif kind == "exit":
                exits.append(record.exit.exit_code)
            elif kind == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                losses += [(items["_step"], items["loss"])] if "loss" in items else []
                scores += [items["eval_x[train]/score"]] if "eval_x[train]/score" in items else []
    assert losses == LOSSES
    assert scores == [0.5, 1.0]
    assert set(runs) == {("mine", "ftjax", known)}
    assert exits == [1, 0]


def leveldb_log(path):
    """The records of a file in LevelDB's log format: blocks of 32 KiB of fragments, each with crc, length, type."""
    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        if position + 7 + length > len(data):  # not written yet
            return
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            yield whole
            whole = b""


@pytest.mark.slow
def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    known = train(tmp_path / "mine", "mlflow")
    client = mlflow.MlflowClient((tmp_path / "mine/mlruns").as_uri())
    run = client.get_run(known)
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params == {"adapter.rank": "8", "data.train": "['rows.jsonl']"}
    assert [(one.step, one.value) for one in client.get_metric_history(known, "loss")] == LOSSES
    assert [one.value for one in client.get_metric_history(known, "eval_x_train_/score")] == [0.5, 1.0]
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.slow
def test_trackio(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    known = train(tmp_path / "mine", "trackio")
    assert known.startswith("mine-")
    with sqlite3.connect(tmp_path / "trackio/ftjax.db") as database:
        rows = list(database.execute("select run_id, run_name, step, metrics from metrics order by id"))
        (config,) = database.execute("select config from configs")
    database.close()
    assert len({(run, name) for run, name, _, _ in rows}) == 1
    logged = [(step, json.loads(values)) for _, _, step, values in rows]
    assert [(step, values["loss"]) for step, values in logged if "loss" in values] == LOSSES
    assert [values["eval_x[train]/score"] for _, values in logged if "loss" not in values] == [0.5, 1.0]
    assert json.loads(config[0])["adapter.rank"] == 8


def test_one_that_fails_later_is_left_out_with_a_warning_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    sent = []

    def fails(step, values):
        raise ConnectionError("gone")

    def fake(name, write):
        return lambda workdir, known, config: trackers.Tracker(name, "1", write, lambda finished: sent.append(finished))

    monkeypatch.setattr(
        trackers,
        "_START",
        {"wandb": fake("wandb", fails), "mlflow": fake("mlflow", lambda step, values: sent.append(values))},
    )
    writer = metrics.MetricsWriter(tmp_path, -1, ("wandb", "mlflow"))
    for step in (1, 2):
        writer.write(step, {"loss": float(step)})
    writer.close(finished=True)
    assert sent == [{"loss": 1.0}, {"loss": 2.0}, True]  # and wandb is not closed either
    assert caplog.messages == [
        "config.trackers: wandb fails (ConnectionError: gone) and gets nothing more; metrics.jsonl and tensorboard/ "
        "have all"
    ]
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 2


def test_one_that_does_not_start_is_named(tmp_path, monkeypatch):
    def start(*_):
        raise OSError("no network")

    monkeypatch.setattr(trackers, "_START", {"wandb": start})
    with pytest.raises(TransientError, match=r"config\.trackers: wandb does not start \(OSError: no network\)"):
        trackers.Trackers(("wandb",), tmp_path, {})


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])  # not there; only a directory of that name
def test_one_that_is_not_installed_is_refused_with_how_to_install_it(monkeypatch, spec):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'ftjax\[wandb\]'"):
        trackers.check(("wandb",))


def test_the_names_are_those_of_the_config():
    names = configs.KEYS["trackers"].check
    assert names.holds(tuple(trackers._START))
    assert not names.holds(("wandb", "wandb"))
    assert not names.holds(({},))
    assert names.wanted == "some of wandb, mlflow, trackio"
