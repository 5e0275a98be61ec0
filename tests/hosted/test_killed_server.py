"""The server is killed again and again, at any moment: every job ends once, and nothing runs twice at a time."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import openai
import pytest
from support import ROOT, SUPPORT
from support.plain_hosted import PlainFiles, client_of, until

ENDS = {
    "succeeded": "The job has successfully completed",
    "failed": "The job failed: ",
    "cancelled": "The job was cancelled",
}


@pytest.fixture
def start():
    """`start(folder)` -> the process of a server and its URL; what is left at the end is killed."""
    with contextlib.ExitStack() as stack:

        def begin(folder):
            process, url = _start(folder)
            stack.callback(kill, process)
            return process, url

        yield begin


def _start(folder):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, str(SUPPORT / "jobs_server.py"), str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    url = process.stdout.readline().strip()
    assert url, process.wait()
    return process, url


def kill(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_run_that_was_lost_with_its_machine_goes_on_from_its_checkpoint(tmp_path, start):
    files = PlainFiles(tmp_path / "files")
    file = files.add([{"steps": 40, "seconds": 0.05}] + [{}] * 9)
    process, url = start(tmp_path)
    with client_of(url) as client:
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file).id
        until(lambda: any(event.data for event in client.fine_tuning.jobs.list_events(job)))
    folder = tmp_path / "jobs" / job
    kill(process)
    os.killpg(os.getpgid(int((folder / "train/pid").read_text())), signal.SIGKILL)
    process, url = start(tmp_path)
    with client_of(url) as client:
        until(lambda: client.fine_tuning.jobs.retrieve(job).status == "succeeded")
        told = [event.data["step"] for event in client.fine_tuning.jobs.list_events(job) if event.data]
    kill(process)
    first, again, end = (folder / "starts").read_text().splitlines()
    assert (first, end) == ("start 0", "end")
    assert 0 < int(again.removeprefix("start ")) < 40
    assert sorted(told) == list(range(1, 41))


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_jobs_end_once_however_often_the_server_is_killed(tmp_path, start, kills):
    chance, files = random.Random(kills), PlainFiles(tmp_path / "files")
    process, url = start(tmp_path)
    jobs = []
    with client_of(url) as client:
        for number in range(12):
            plan = {"steps": 10 + 3 * number, "seconds": 0.05, "end": 1, "times": number % 2}
            file = files.add([plan] + [{}] * 4)
            jobs.append(client.fine_tuning.jobs.create(model="tiny", training_file=file).id)
    paused = set()
    for _ in range(kills):
        with client_of(url) as client, contextlib.suppress(openai.BadRequestError):  # it may have ended before
            job = chance.choice(jobs)
            if chance.random() < 0.3:
                client.fine_tuning.jobs.pause(job)
                paused.add(job)
            elif paused:
                client.fine_tuning.jobs.resume(paused.pop())
        time.sleep(chance.uniform(0, 0.6))
        kill(process)
        process, url = start(tmp_path)
    with client_of(url) as client:
        asked = client.fine_tuning.jobs
        with contextlib.suppress(openai.BadRequestError):
            asked.cancel(jobs[-1])
        for job in jobs:
            if asked.retrieve(job).status == "paused":
                asked.resume(job)
        until(lambda: all(asked.retrieve(job).status in ENDS for job in jobs))
        time.sleep(0.5)  # nothing comes after the end
        for number, job in enumerate(jobs):
            status = asked.retrieve(job).status
            assert status in (("succeeded",) if number < 11 else ("succeeded", "cancelled"))
            events = [event.message for event in asked.list_events(job, limit=100)]
            assert sum(event.startswith(tuple(ENDS.values())) for event in events) == 1
            noted = tmp_path / "jobs" / job / "starts"
            starts = noted.read_text().splitlines() if noted.exists() else []  # it was canceled before
            assert "TWICE" not in starts
            if status == "succeeded":
                assert starts.count("end") == 1
                told = [event.data["step"] for event in asked.list_events(job, limit=100) if event.data]
                assert sorted(told) == list(range(1, 10 + 3 * number + 1))
                models = [checkpoint.fine_tuned_model_checkpoint for checkpoint in asked.checkpoints.list(job)]
                assert models.count(asked.retrieve(job).fine_tuned_model) == 1
