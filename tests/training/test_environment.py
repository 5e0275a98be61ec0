"""What is recorded of a run's starts."""

import os

import jax

from ftjax import sharding
from ftjax.training import environment


def test_starts_are_recorded_and_a_fresh_run_forgets_them(tmp_path):
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1, "context": 1, "expert": 1})
    environment.begin(tmp_path, mesh, 10.0, None, 80, {"model": "m"}, {"examples": 3})
    (tmp_path / "metrics.jsonl").write_text("")
    os.utime(tmp_path / "metrics.jsonl", (25, 25))
    environment.begin(tmp_path, mesh, 30.0, 40, 80, {}, {})
    environment.end(tmp_path)
    first, second = environment.read(tmp_path)
    assert (first["began"], first["ended"], first["step"], second["step"]) == (10.0, 25.0, 0, 40)
    assert second["ended"] > 30
    assert first["devices"] == {"platform": "cpu", "kind": "cpu", "count": mesh.size, "processes": 1}
    assert first["versions"]["jax"] == jax.__version__
    environment.begin(tmp_path, mesh, 50.0, None, 80, {}, {})
    assert [one["began"] for one in environment.read(tmp_path)] == [50.0]
