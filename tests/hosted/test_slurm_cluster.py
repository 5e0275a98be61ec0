"""Jobs of the server under a real SLURM of one node: what its own daemons do, with jobs, signals, limits and requeues.

Trainings are a stand-in, but for one of two real processes.
"""

import contextlib
import subprocess
import sys

import pytest
from support import PYTHONPATH, SUPPORT, xla_flags
from support.jobs import serving
from support.plain_hosted import PlainFiles, client_of, until
from support.runs import write_model
from support.slurm import checkout, run, slurm

from ftjax.hosted.jobs.slurm import Slurm
from ftjax.training import environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    with slurm() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def script(cluster, tmp_path_factory):
    """train.sbatch of a checkout whose Python runs the stand-in; in its path is what sbatch reads as a pattern."""
    return checkout(tmp_path_factory.mktemp("check out %j"), sys.executable, "-IS", str(SUPPORT / "fake_job.py"))


@contextlib.contextmanager
def under_slurm(folder, script, *options):
    """A server of jobs, and its client; options: of sbatch."""
    with (
        serving(folder, backend=Slurm(script, options), seconds=0.2) as server,
        client_of(server.url) as client,
    ):
        yield server, client.fine_tuning.jobs


@pytest.fixture(scope="module", autouse=True)
def limited(cluster, script, tmp_path_factory):
    """A job beyond its time limit, which runs while other tests do: server, client and job.

    The shortest limit is a minute. SLURM looks each half a minute, and then sends the signal at once.
    """
    with under_slurm(tmp_path_factory.mktemp("limited"), script, "--time=1", "--signal=TERM@58") as (server, jobs):
        yield server, jobs, create(server, jobs, steps=90, seconds=0.4)


@pytest.fixture
def started(cluster, script, tmp_path):
    """`started(*options)` as `under_slurm`, where a path has what sbatch would read as a pattern."""
    folder = tmp_path / "100%job"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        yield lambda *options: stack.enter_context(under_slurm(folder, script, *options))


def create(server, jobs, **plan):
    return jobs.create(model="tiny", training_file=server.plan(**plan))


def trains(jobs, job):
    """Returns as soon as a step was made."""
    until(lambda: steps(jobs, job))


def steps(jobs, job):
    return [event.data["step"] for event in jobs.list_events(job.id, limit=100) if event.data][::-1]


def ended(jobs, job):
    final = ("succeeded", "failed", "cancelled")
    return until(lambda: (now := jobs.retrieve(job.id)).status in final and now)


def gone(server, job):
    until(lambda: server.jobs.find(job.id, "alice").stage == "")


def test_two_run_at_once_and_one_is_paused_and_goes_on(cluster, started):
    server, jobs = started()
    one, two = create(server, jobs, steps=30, seconds=0.1), create(server, jobs, steps=30, seconds=0.1)
    until(lambda: cluster.states(one.id.lower()) == cluster.states(two.id.lower()) == ["RUNNING"])
    trains(jobs, one)
    jobs.pause(one.id)
    gone(server, one)
    assert [line.partition(" ")[0] for line in server.starts(one)] == ["start", "saved"]
    assert cluster.states(one.id.lower()) == ["CANCELLED"]
    assert ended(jobs, two).status == "succeeded"
    jobs.resume(one.id)
    assert ended(jobs, one).status == "succeeded"
    assert [line.partition(" ")[0] for line in server.starts(one)] == ["start", "saved", "start", "end"]
    assert server.starts(two) == ["start 0", "end"]
    assert steps(jobs, one) == steps(jobs, two) == list(range(1, 31))
    assert cluster.states(one.id.lower()) == ["CANCELLED", "COMPLETED"]


def test_what_is_canceled_saves_and_does_not_come_back(cluster, started):
    server, jobs = started()
    job = create(server, jobs, steps=1000, seconds=0.05)
    trains(jobs, job)
    assert jobs.cancel(job.id).status == "cancelled"
    gone(server, job)
    started_at, saved = server.starts(job)
    assert started_at == "start 0"
    assert (server.folder / "jobs" / job.id / "run/checkpoints" / saved.removeprefix("saved ")).is_dir()
    assert cluster.states(job.id.lower()) == ["CANCELLED"]


def test_a_job_that_waits_in_slurm_is_paused_canceled_and_found_there(cluster, started):
    server, jobs = started("--hold")
    one, two = create(server, jobs), create(server, jobs)
    until(lambda: cluster.states(one.id.lower()) == cluster.states(two.id.lower()) == ["PENDING"])
    assert jobs.retrieve(one.id).status == "running"
    jobs.pause(one.id)
    jobs.cancel(two.id)
    for job in (one, two):
        gone(server, job)
        assert cluster.states(job.id.lower()) == ["CANCELLED"]
    jobs.resume(one.id)
    until(lambda: cluster.states(one.id.lower())[1:] == ["PENDING"])
    run("scontrol", "release", cluster.number(one.id.lower()))
    assert ended(jobs, one).status == "succeeded"
    assert server.starts(one) == ["start 0", "end"]


def test_what_an_administrator_cancels_goes_on_from_its_checkpoint(cluster, started):
    server, jobs = started()
    job = create(server, jobs, steps=40, seconds=0.1)
    trains(jobs, job)
    run("scancel", cluster.number(job.id.lower()))
    assert ended(jobs, job).status == "succeeded"
    first, saved, again, end = server.starts(job)
    assert (first, end) == ("start 0", "end")
    assert again == saved.replace("saved", "start")
    assert steps(jobs, job) == list(range(1, 41))
    assert cluster.states(job.id.lower()) == ["CANCELLED", "COMPLETED"]


def test_what_a_run_says_of_its_mistake_is_told_without_what_slurm_says(cluster, started):
    server, jobs = started()
    job = ended(jobs, create(server, jobs, end=2, times=1, says="error: row 3: wrong\nSee the rows"))
    assert job.status == "failed"
    assert job.error.message == "row 3: wrong\nSee the rows"
    log = (server.folder / "jobs" / job.id / "train/log").read_text()
    assert "srun: error: localhost: task 0: Exited with exit code 2" in log


def test_sbatch_refuses_and_the_job_fails_with_what_it_said(cluster, started):
    server, jobs = started("--partition=nowhere")
    job = ended(jobs, create(server, jobs))
    assert "sbatch refuses the job" in job.error.message
    assert "invalid partition specified: nowhere" in job.error.message
    gone(server, job)


def test_a_server_that_was_killed_leaves_its_jobs_to_the_next(cluster, script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    file = PlainFiles(tmp_path / "files").add([{"steps": 60, "seconds": 0.1}] + [{}] * 3)
    job = None
    for _ in range(2):
        command = [sys.executable, str(SUPPORT / "jobs_server.py"), str(tmp_path), str(script)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                with client_of(process.stdout.readline().strip()) as client:
                    jobs = client.fine_tuning.jobs
                    if job is None:
                        job = jobs.create(model="tiny", training_file=file)
                        trains(jobs, job)
                        assert cluster.states(job.id.lower()) == ["RUNNING"]
                    else:
                        assert jobs.retrieve(job.id).status == "running"
                        assert ended(jobs, job).status == "succeeded"
                        assert steps(jobs, job) == list(range(1, 61))
            finally:
                process.kill()
    assert (tmp_path / "jobs" / job.id / "starts").read_text().splitlines() == ["start 0", "end"]
    assert cluster.states(job.id.lower()) == ["COMPLETED"]


def test_each_job_of_an_array_is_requeued_by_itself(cluster, tmp_path):
    program = tmp_path / "once_more.py"
    program.write_text("""
import os, sys
again = "SLURM_RESTART_COUNT" in os.environ
print(sys.argv[-1], "again" if again else "first", flush=True)
sys.exit(0 if again else 75)
""")
    script = checkout(tmp_path / "checkout", sys.executable, "-IS", str(program))
    output = (f"--output={tmp_path}/%a.log", f"--export=ALL,FTJAX_ROOT={script.parents[2]}", "--job-name=sweep")
    run("sbatch", "--array=0-2", *output, str(script), "--workdir=x", "--sweep=adapter.rank=4,8,16")
    until(lambda: cluster.states("sweep") == ["COMPLETED"] * 3)
    assert {line.split()[2] for line in cluster.jobs("sweep")} == {"1"}
    for number in range(3):
        told = (tmp_path / f"{number}.log").read_text().splitlines()
        assert [line for line in told if "index" in line] == [f"--index={number} first", f"--index={number} again"]


def test_two_real_processes_find_each_other_save_and_go_on(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    settings = {
        "model.source": str(write_model(tmp_path / "model")),
        "model.dtype": "float32",
        "adapter.rank": 4,
        "data.max_length": 96,
        "mesh.fsdp": 2,
    }
    backend = Slurm(checkout(tmp_path / "checkout", sys.executable), ["--ntasks-per-node=2"])
    turn = [{"role": "user", "content": "The lamp is broken"}, {"role": "assistant", "content": "send a blue one"}]
    rows = [{"messages": [turn[0] | {"content": f"{turn[0]['content']} in {n}"}, turn[1]]} for n in range(40)]
    with (
        serving(tmp_path, settings, backend=backend, seconds=0.2) as server,
        client_of(server.url) as client,
    ):
        jobs = client.fine_tuning.jobs
        asked = {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2, "n_epochs": 4}}}}
        job = jobs.create(model="tiny", training_file=server.files.add(rows), **asked)
        place = server.jobs.queue.place(job.id)
        trains(jobs, job)
        jobs.pause(job.id)
        gone(server, job)
        jobs.resume(job.id)
        assert (
            until(lambda: (now := jobs.retrieve(job.id)).status in ("succeeded", "failed") and now).status
            == "succeeded"
        )
        assert steps(jobs, job) == list(range(1, 81))
        starts = environment.read(place.workdir)
        assert [start["devices"]["processes"] for start in starts] == [2, 2]
        first, again = (start["step"] for start in starts)
        assert 0 == first < again < 80


def test_a_job_runs_beyond_its_time_limit_by_requeueing_itself(cluster, limited):
    server, jobs, job = limited
    assert ended(jobs, job).status == "succeeded"
    starts = server.starts(job)
    assert [line.partition(" ")[0] for line in starts] == ["start", "saved"] * (len(starts) // 2 - 1) + ["start", "end"]
    assert len(starts) > 2
    (line,) = cluster.jobs(job.id.lower())  # submitted once
    assert line.split()[1:] == ["COMPLETED", str(len(starts) // 2 - 1)]
    assert steps(jobs, job) == list(range(1, 91))
