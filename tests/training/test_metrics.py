"""metrics.jsonl and TensorBoard: what is written, and what a restart takes back."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftjax.training import metrics


def write(workdir: Path, start: int, steps: range) -> None:
    writer = metrics.MetricsWriter(workdir, start)
    for step in steps:
        writer.write(step, {"loss": start + step / 10})
    writer.close()


def test_a_restart_takes_back_what_came_after_its_step(tmp_path):
    write(tmp_path, 0, range(1, 5))
    write(tmp_path, 2, range(3, 6))
    records = metrics.read(tmp_path / "metrics.jsonl")
    kept = [(record["step"], record["loss"]) for record in records]
    assert kept == [(1, 0.1), (2, 0.2), (3, 2.3), (4, 2.4), (5, 2.5)]


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    write(tmp_path, 0, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert [record["step"] for record in metrics.read(path)] == [1, 2]
    write(tmp_path, 2, range(3, 4))
    assert [record["step"] for record in metrics.read(path)] == [1, 2, 3]


def test_tensorboard_reads_the_same(tmp_path):
    write(tmp_path, 0, range(1, 4))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["loss"]
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]
