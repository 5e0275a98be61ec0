"""Jobs that SLURM or Kubernetes run: what is submitted, found again, canceled, and how its end is read.

The programs of both are stand-ins that keep their state in files, as the tests of the launchers have them.
"""

import json
import os
import stat
import sys

import pytest
from support import ROOT, SUPPORT
from support.jobs import serving
from support.plain_hosted import client_of, until

from ftjax.errors import UserError
from ftjax.hosted.jobs.backend import Found, State, Task
from ftjax.hosted.jobs.kubernetes import JobSets
from ftjax.hosted.jobs.slurm import Slurm
from ftjax.hosted.jobs.validating import mistake

SBATCH = """
[ ! -e "$FAKE/refuses" ] || { echo "sbatch: error: no answer" >&2; exit 1; }
echo "$*" >>"$FAKE/submitted"
for word; do case $word in --job-name=*) echo "${word#*=} 17" >"$FAKE/queue";; esac; done
echo 17
"""
SQUEUE = """
[ ! -e "$FAKE/down" ] || exit 1
for word; do case $word in --name=*) name=${word#*=};; esac; done
[ ! -e "$FAKE/queue" ] || sed -n "s/^$name //p" "$FAKE/queue"
"""
KUBECTL = """
[ ! -e "$FAKE/down" ] || exit 1
echo "$*" >>"$FAKE/called"
case "$2 $3" in
"get jobset") [ ! -e "$FAKE/jobset" ] || cat "$FAKE/jobset" ;;
"get pods") cat "$FAKE/pods" ;;
"apply -f") cat >"$FAKE/applied"; echo '{"metadata": {}}' >"$FAKE/jobset" ;;
"delete jobset") rm "$FAKE/jobset" ;;
logs*) echo "error: rows.jsonl:3: wrong" ;;
esac
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts stand-ins before the programs of this machine."""
    write(
        tmp_path,
        monkeypatch,
        {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": 'echo "$*" >>"$FAKE/canceled"', "kubectl": KUBECTL},
    )
    return tmp_path


def write(folder, monkeypatch, commands):
    for name, script in commands.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))


# These run what is submitted, as SLURM would: a job is in the queue while it runs.
RUNNING_SBATCH = """
for word; do case $word in --job-name=*) name=${word#*=};; --output=*) out=${word#*=};; esac; done
while [ "${1##*/}" != train.sbatch ]; do shift; done
shift
setsid sh -c 'trap : TERM; "$@"; echo "--- now ended with status $?"' job \\
    "$PYTHON" -IS "$JOB" -m ftjax.train "$@" >>"$out" 2>&1 &
echo "$name $!" >>"$FAKE/queue"
echo $!
"""
RUNNING_SQUEUE = """
for word; do case $word in --name=*) name=${word#*=};; esac; done
[ ! -e "$FAKE/queue" ] || sed -n "s/^$name //p" "$FAKE/queue" | while read -r job; do
    if kill -0 "$job" 2>/dev/null; then echo "$job"; fi
done
"""


def task(folder):
    arguments = ("-m", "ftjax.train", "--config", "/mnt/ftjax/j/job.json", "--workdir", "/mnt/ftjax/j/run")
    return Task("ftjob-abc", arguments, folder / "train")


def test_slurm_gets_a_job_once_and_says_how_it_ended(fake):
    slurm, its = Slurm(ROOT / "scripts/slurm/train.sbatch", ["--time=1:00:00"]), task(fake)
    assert slurm.poll(its) == Found(State.ABSENT)
    assert not slurm.stop(its)
    slurm.start(its)
    slurm.start(its)  # as another server does that was started in between
    (line,) = (fake / "submitted").read_text().splitlines()
    assert f"--parsable --job-name=ftjob-abc --output={its.folder}/log" in line
    assert line.endswith("train.sbatch --config /mnt/ftjax/j/job.json --workdir /mnt/ftjax/j/run")
    assert "--time=1:00:00" in line
    assert slurm.poll(its) == Found(State.RUNNING)
    (fake / "down").touch()  # the controller does not answer: nothing is known, and nothing is submitted
    assert slurm.poll(its) == Found(State.UNKNOWN)
    slurm.start(its)
    (fake / "down").unlink()
    assert slurm.stop(its)
    assert (fake / "canceled").read_text() == "17\n"
    (its.folder / "log").write_text(
        "--- x ended with status 75\nsaved; requeued\n--- 2026-01-01T00:00:00 ended with status 0\n"
    )
    assert slurm.poll(its) == Found(State.RUNNING)  # it is in the queue: requeued
    (fake / "queue").unlink()
    assert slurm.poll(its) == Found(State.ENDED, 0)
    slurm.start(its)
    assert len((fake / "submitted").read_text().splitlines()) == 2


def test_a_job_that_slurm_ended_in_a_later_start_has_no_end_of_an_earlier_one(fake):
    slurm, its = Slurm(ROOT / "scripts/slurm/train.sbatch"), task(fake)
    its.folder.mkdir()
    first = "--- x job 17, start 1, on n1\n--- x ended with status 75\nsaved; requeued\n"
    (its.folder / "log").write_text(first)
    assert slurm.poll(its) == Found(State.ENDED, 75)
    (its.folder / "log").write_text(f"{first}--- x job 17, start 2, on n1\nstep 3\n")
    assert slurm.poll(its) == Found(State.ABSENT)


def test_sbatch_fails_for_good_only_where_slurm_answers(fake, monkeypatch):
    slurm, its = Slurm(ROOT / "scripts/slurm/train.sbatch"), task(fake)
    (fake / "refuses").touch()
    with pytest.raises(UserError, match="sbatch refuses the job: sbatch: error: no answer"):
        slurm.start(its)
    once = '[ -e "$FAKE/asked" ] && exit 1; touch "$FAKE/asked"'  # SLURM goes away between the two
    write(fake, monkeypatch, {"squeue": once})
    slurm.start(its)
    assert not (fake / "submitted").exists()


def test_what_slurm_says_of_the_end_is_no_part_of_a_mistake():
    between = "slurmstepd-n1: error: *** STEP 17.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***\n"
    after = "srun: error: n1: task 0: Exited with exit code 2\n--- 2026-01-01T00:00:00+00:00 ended with status 2\n"
    assert mistake(f"--- x job 17, start 1, on n1\nerror: row 3\n{between}of a file\n{after}") == "row 3\nof a file"
    assert mistake(f"Traceback\n{between}{after}") == ""


def test_kubernetes_gets_a_jobset_once_and_says_how_it_ended(fake):
    options = ["--image", "i", "--claim", "c", "--type", "v5e", "--topology", "2x2"]
    jobsets, its = JobSets(ROOT / "scripts/gke/render.py", options), task(fake)
    assert jobsets.poll(its) == Found(State.ABSENT)
    jobsets.start(its)
    applied = (fake / "applied").read_text()
    assert 'name: "ftjob-abc"' in applied
    assert '"--workdir", "/mnt/ftjax/j/run"' in applied
    (fake / "applied").unlink()
    jobsets.start(its)
    assert not (fake / "applied").exists()
    assert jobsets.poll(its) == Found(State.RUNNING)
    (fake / "down").touch()
    assert jobsets.poll(its) == Found(State.UNKNOWN)
    (fake / "down").unlink()
    ended = {"status": {"conditions": [{"type": "Completed", "status": "True"}]}}
    (fake / "jobset").write_text(json.dumps(ended))
    assert jobsets.poll(its) == Found(State.ENDED, 0)
    ended["status"]["conditions"][0]["type"] = "Failed"
    (fake / "jobset").write_text(json.dumps(ended))
    states = [{"state": {"terminated": {"exitCode": code}}} for code in (1, 2)]
    (fake / "pods").write_text(json.dumps({"items": [{"status": {"containerStatuses": states}}]}))
    assert jobsets.poll(its) == Found(State.ENDED, 2)
    assert its.log() == "error: rows.jsonl:3: wrong\n"
    (fake / "jobset").write_text(json.dumps(ended | {"metadata": {"deletionTimestamp": "now"}}))
    assert jobsets.poll(its) == Found(State.RUNNING)  # its pods still save
    assert jobsets.stop(its)
    assert "delete jobset ftjob-abc --cascade=foreground --wait=false" in (fake / "called").read_text()
    assert jobsets.poll(its) == Found(State.ABSENT)


def test_what_they_refuse_is_said(fake, monkeypatch):
    with pytest.raises(UserError, match=r"name scripts/slurm/train\.sbatch"):
        Slurm(fake / "nothing")
    jobsets = JobSets(
        ROOT / "scripts/gke/render.py", ["--image", "i", "--claim", "c", "--type", "v5e", "--topology", "3"]
    )
    with pytest.raises(UserError, match=r"render\.py refuses the job: error: --topology 3"):
        jobsets.start(task(fake))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no squeue here"):
        Slurm(ROOT / "scripts/slurm/train.sbatch").poll(task(fake))
    with pytest.raises(UserError, match="there is no kubectl here"):
        jobsets.poll(task(fake))


def test_a_job_runs_under_slurm_is_paused_and_goes_on(tmp_path, monkeypatch):
    cancel = 'kill -s TERM -- "-$1"'
    write(tmp_path, monkeypatch, {"sbatch": RUNNING_SBATCH, "squeue": RUNNING_SQUEUE, "scancel": cancel})
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("JOB", str(SUPPORT / "fake_job.py"))
    with (
        serving(tmp_path, backend=Slurm(ROOT / "scripts/slurm/train.sbatch")) as server,
        client_of(server.url) as client,
    ):
        jobs = client.fine_tuning.jobs
        job = jobs.create(model="tiny", training_file=server.plan(steps=40, seconds=0.05))
        until(lambda: any(event.data for event in jobs.list_events(job.id)))
        jobs.pause(job.id)
        until(lambda: server.jobs.find(job.id, "alice").stage == "")
        assert server.starts(job)[-1].startswith("saved ")
        jobs.resume(job.id)
        until(lambda: jobs.retrieve(job.id).status == "succeeded")
        assert server.starts(job)[-1] == "end"
        assert sorted(event.data["step"] for event in jobs.list_events(job.id) if event.data) == list(range(1, 41))
