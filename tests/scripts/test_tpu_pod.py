"""scripts/tpu_pod.sh against hosts that are directories: a gcloud that notes its calls and runs here what ssh would."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, SUPPORT

# What quoting gets wrong: spaces, both quotes, a variable, a substitution, separators, a glob, a newline, nothing.
NASTY = ["--config.model.source=a b", 'it\'s "$HOME" `id` $(id)', "x;y|z&&w >f *", "", "line\nline", "-", "é\\n"]
ARGUMENTS = ["--config", "configs/x.py:a=1,b", "--workdir", "/mnt/ftjax/my run", *NASTY]

INSTALL = """#!/bin/bash
cd "$(dirname "$0")/.." && mkdir -p .venv/bin && echo "$1 $PYTHON" >>.venv/installed
printf '#!/bin/bash\\nshift 1; exec %q -IS %q "$@"\\n' "{python}" "{train}" >.venv/bin/python
chmod +x .venv/bin/python
"""


class Pod:
    """A checkout with the launcher, a fake gcloud on PATH, and what became of both."""

    def __init__(self, directory: Path):
        self.fake, self.checkout = directory / "fake", directory / "check out"
        bin = directory / "bin"
        (self.checkout / "scripts").mkdir(parents=True)
        self.fake.mkdir()
        bin.mkdir()
        for name in ("tpu_pod.sh", "tpu_worker.sh", "pack.sh"):
            shutil.copy(ROOT / "scripts" / name, self.checkout / "scripts")
        install = INSTALL.format(python=sys.executable, train=SUPPORT / "fake_train.py")
        (self.checkout / "scripts/install.sh").write_text(install)
        (self.checkout / ".gitignore").write_text(".venv\nruns\n")
        self._command(bin / "gcloud", f'exec {sys.executable} -IS {SUPPORT / "fake_gcloud.py"} "$@"')
        self._command(bin / "sudo", 'printf "%s\\n" "$*" >>"$FAKE/sudo"')
        self._command(bin / "mountpoint", "exit 1")
        git = ["git", "-C", str(self.checkout), "-c", "user.name=t", "-c", "user.email=t@example.org"]
        self.git = lambda *words: subprocess.run([*git, *words], check=True, capture_output=True, text=True)
        self.git("init", "-q", "-b", "main")
        (self.checkout / "removed.py").write_text("")
        self.git("add", "-A")
        self.git("commit", "-qm", "first")
        self.environment = {key: value for key, value in os.environ.items() if key not in ("NAME", "TYPE", "SHARE")} | {
            "PATH": f"{bin}:{os.environ['PATH']}",
            "FAKE": str(self.fake),
            "TMPDIR": str(directory),
            "PROJECT": "my project",
            "ZONE": "us-west4-a",
            "NAME": "ft",
            "TYPE": "v5litepod-16",
        }
        self.plan("wait")

    @staticmethod
    def _command(path, line):
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)

    def plan(self, *acts):
        (self.fake / "plan").write_text(json.dumps(acts))

    def __call__(self, *words, status=0):
        command = ["bash", str(self.checkout / "scripts/tpu_pod.sh"), *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def calls(self):
        return [json.loads(line) for line in (self.fake / "calls").read_text().splitlines()]

    def verbs(self):
        return [f"{kind} {verb}" for _, _, kind, verb, *_ in self.calls() if verb in ("create", "delete")]

    def starts(self, host=0):
        path = self.fake / f"starts-{host}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, holds):
        until = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < until, "it did not come to that in 60 s"
            time.sleep(0.05)

    def end(self):
        for record in [*self.starts(0), *self.starts(1)]:
            try:
                os.kill(record["pid"], 9)
            except ProcessLookupError:
                continue


@pytest.fixture
def pod(tmp_path):
    pod = Pod(tmp_path)
    yield pod
    pod.end()


@pytest.fixture
def ready(pod):
    pod("create")
    pod("setup")
    return pod


def test_arguments_and_environment_arrive_on_every_host_as_they_were_given(ready):
    ready("run", "--env", 'NOTE=it\'s "a" $HOME', "--", *ARGUMENTS)
    ready.wait_for(lambda: ready.starts(0) and ready.starts(1))
    for host in (0, 1):
        (start,) = ready.starts(host)
        assert start["arguments"] == ["-m", "ftjax.train", *ARGUMENTS]
        assert start["note"] == 'it\'s "a" $HOME'
        assert start["cwd"] == str(ready.fake / "hosts" / str(host) / "ftjax")


def test_another_program_of_the_checkout_runs_on_all_hosts_too(ready):
    ready.plan(0)
    ready("run", "--program", "scripts/bench_step.py", "--", "--batch", "16")
    ready.wait_for(lambda: ready.starts(0) and ready.starts(1))
    assert ready.starts(1)[0]["arguments"] == ["scripts/bench_step.py", "--batch", "16"]


def test_a_run_outlives_the_connection_refuses_a_second_and_saves_when_stopped(ready):
    ready("run", "--", *ARGUMENTS)
    ready.wait_for(lambda: ready.starts(0) and ready.starts(1))
    assert ready("status").count(" running") == 2
    assert "stop it first" in ready("run", "--", *ARGUMENTS, status=3)
    assert "stop it first" in ready("setup", status=3)
    assert "step 1" in ready("logs", "--worker", "1")
    assert ready("stop").count("asked to save and end") == 2
    ready.wait_for(lambda: ready("status").count("ended 75 asked") == 2)
    assert ready("stop").count("no run") == 2
    assert "ended with status 75" in ready("logs", "--lines", "5")
    ready.plan("wait", 0)
    ready("run", "--", *ARGUMENTS)
    ready.wait_for(lambda: ready("status").count("ended 0") == 2)
    assert len(ready.starts(0)) == 2


def test_a_second_stop_does_not_cut_the_save_short_and_now_does(ready):
    ready("run", "--", *ARGUMENTS)
    ready.wait_for(lambda: ready.starts(0) and ready.starts(1))
    for host in (0, 1):  # a run that is slow to save
        (ready.fake / f"hosts/{host}/.ftjax-run/asked").touch()
    assert ready("stop").count("was asked before") == 2
    assert ready("status").count("running asked") == 2
    assert ready("stop", "--now").count("killed") == 2
    ready.wait_for(lambda: ready("status").count("ended 137 asked") == 2)


def test_a_host_that_went_down_in_a_run_does_not_count_as_running(ready):
    ready("run", "--", *ARGUMENTS)
    ready.wait_for(lambda: ready.starts(0) and ready.starts(1))
    for host in (0, 1):
        shutil.copy(ready.fake / f"hosts/{host}/.ftjax-run/pid", ready.fake / f"pid-{host}")
    ready("stop", "--now")
    ready.wait_for(lambda: ready("status").count("ended 137") == 2)
    for host in (0, 1):  # as a reboot leaves it: a pid, which is now another process's, and no status
        run = ready.fake / f"hosts/{host}/.ftjax-run"
        (run / "exit").unlink()
        (run / "pid").write_text(str(os.getpid()))
    assert ready("status").count("ended 137") == 2


def test_set_up_brings_what_changed_but_not_what_is_ignored_or_removed(pod):
    (pod.checkout / "new file.py").write_text("new")
    (pod.checkout / "runs").mkdir()
    (pod.checkout / "runs/big").write_text("")
    (pod.checkout / "removed.py").unlink()
    pod("create")
    pod("setup", "--share", "10.0.0.2:/vol 1")
    for host in (0, 1):
        copy = pod.fake / f"hosts/{host}/ftjax"
        assert (copy / "new file.py").read_text() == "new"
        assert not (copy / "runs").exists()
        assert not (copy / "removed.py").exists()
        assert (copy / ".venv/installed").read_text().split()[0] == "tpu"
    sudo = (pod.fake / "sudo").read_text()
    assert sudo.count("mount -t nfs -o rw,hard 10.0.0.2:/vol 1 /mnt/ftjax\n") == 2


def test_set_up_can_clone_a_ref(pod):
    pod.git("checkout", "-qb", "other")
    (pod.checkout / "other.py").write_text("")
    pod.git("add", "-A")
    pod.git("commit", "-qm", "second")
    pod.git("checkout", "-q", "main")
    pod("create")
    for _ in range(2):  # again is no harm
        pod("setup", "--git", str(pod.checkout), "--ref", "other")
    assert (pod.fake / "hosts/1/ftjax/other.py").exists()


@pytest.mark.parametrize("kind", [["--spot"], ["--spot", "--queued"]], ids=["direct", "queued"])
def test_watch_makes_a_preempted_slice_anew_and_goes_on_with_the_same_command(pod, kind):
    pod.plan("preempt", 75, 0)
    told = pod("watch", *kind, "--poll", "1", "--", *ARGUMENTS)
    assert "taken away" in told
    assert "finished" in told
    resource = "queued-resources" if "--queued" in kind else "tpu-vm"
    assert pod.verbs() == [f"{resource} create", f"{resource} delete", f"{resource} create"]
    for host in (0, 1):
        assert [start["arguments"][2:] for start in pod.starts(host)] == [ARGUMENTS] * 3


def test_watch_waits_for_capacity_after_a_preemption_and_for_the_network(pod):
    pod.plan(0)
    pod("create")
    (pod.fake / "state").write_text("PREEMPTED")
    (pod.fake / "unreachable").touch()
    (pod.fake / "no-capacity").touch()
    told = pod("watch", "--spot", "--poll", "1", "--", *ARGUMENTS)
    assert "cannot reach the API" in told
    assert "no more capacity" in told
    assert pod.verbs() == ["tpu-vm create", "tpu-vm delete", "tpu-vm create", "tpu-vm create"]
    assert len(pod.starts(0)) == 1


@pytest.mark.parametrize(("plan", "status", "starts"), [((1, 75, 1, 0), 0, 4), ((2,), 2, 1), ((1,), 1, 3)])
def test_watch_starts_again_after_preemptions_and_some_failures_but_not_after_a_mistake(pod, plan, status, starts):
    pod.plan(*plan)
    pod("watch", "--poll", "1", "--max-failures", "2", "--", *ARGUMENTS, status=status)
    assert len(pod.starts(0)) == len(pod.starts(1)) == starts
    assert pod.verbs() == ["tpu-vm create"]


def test_watch_ends_when_the_run_is_stopped_and_a_new_watch_goes_on(pod):
    command = ["bash", str(pod.checkout / "scripts/tpu_pod.sh"), "watch", "--poll", "1", "--", *ARGUMENTS]
    watching = subprocess.Popen(command, env=pod.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pod.wait_for(lambda: pod.starts(0) and pod.starts(1))
    pod("stop")
    assert watching.wait(timeout=30) == 75
    pod.plan("wait", 0)
    assert "finished" in pod("watch", "--poll", "1", "--", *ARGUMENTS)


def test_watch_ends_where_the_slice_cannot_be_made(pod):
    (pod.fake / "no-capacity").touch()
    assert "could not be created" in pod("watch", "--", *ARGUMENTS, status=1)


def test_dry_run_prints_the_commands_and_runs_none(pod):
    """What it prints, pasted into a shell, makes the calls that the command itself makes."""
    session = [
        ["create", "--spot"],
        ["setup", "--share", "s:/v"],
        ["run", "--env", "NOTE=a 'b'", "--", *ARGUMENTS],
        ["status"],
        ["logs", "-f", "--worker", "1"],
        ["stop"],
        ["delete"],
    ]
    printed = [pod(words[0], "--dry-run", *words[1:]) for words in session]
    assert not (pod.fake / "calls").exists()
    for words in session:
        if words[0] == "stop":
            pod.wait_for(lambda: pod.starts(0) and pod.starts(1))
        if words[0] != "logs":  # it would follow for ever
            pod(*words)
    real = pod.calls()
    (pod.fake / "calls").unlink()
    pasted = "".join(text for words, text in zip(session, printed) if words[0] != "logs")
    pod.end()
    for host in (0, 1):
        (pod.fake / f"starts-{host}").unlink()
    subprocess.run(["bash", "-c", pasted], env=pod.environment, check=False, capture_output=True, timeout=60)
    looks = [call for call in real if call[3] != "describe" or "acceleratorType" in call[-1]]
    assert pod.calls() == looks
    assert "tpu_worker.sh logs -f 100" in printed[4]
    assert "--worker=1" in printed[4]


def test_dry_run_of_watch_and_of_queued_resources_names_every_step(pod):
    printed = pod("watch", "--reserved", "--dry-run", "--iap", "--", *ARGUMENTS)
    steps = ["queued-resources create", "queued-resources describe", "scp", "setup", "start", "status", "delete ft"]
    places = [printed.index(step) for step in steps]
    assert places == sorted(places)
    assert "--reserved" in printed
    assert all("--tunnel-through-iap" in line for line in printed.splitlines() if "tpu-vm s" in line)
    assert not (pod.fake / "calls").exists()


@pytest.mark.parametrize(
    ("type", "runtime"),
    [
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_each_type_gets_its_runtime(pod, type, runtime):
    assert f"--version={runtime}\n" in pod("create", "--type", type, "--dry-run")
    assert "--version=own\n" in pod("create", "--type", type, "--runtime", "own", "--dry-run")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fly"], "no command 'fly'"),
        (["run", "--fast"], "no option '--fast'"),
        (["run", "--env"], "wants a value"),
        (["run", "--env", "NOTE", "--", "--workdir=/mnt/ftjax/x"], "KEY=VALUE"),
        (["run"], "after --"),
        (["run", "--", "--config", "c.py"], "give --workdir /mnt/ftjax/"),
        (["run", "--", "--workdir=gs://bucket/run"], "does not lie below /mnt/ftjax"),
        (["run", "--", "--workdir", "/tmp/run"], "does not lie below /mnt/ftjax"),
        (["run", "--mount", "/data/", "--", "--workdir", "/mnt/ftjax/run"], "does not lie below /data"),
        (["create", "--spot", "--reserved"], "exclude each other"),
        (["logs", "--worker", "all"], "not a number"),
    ],
)
def test_mistakes_are_told_before_anything_is_called(pod, words, told):
    assert told in pod(*words, status=2)
    assert not (pod.fake / "calls").exists()


def test_what_is_missing_is_named(pod):
    for name in ("PROJECT", "ZONE", "NAME", "TYPE"):
        del pod.environment[name]
    assert "missing: --project --zone --name --type," in pod("create", status=2)
    assert "missing: --project --zone --name," in pod("delete", status=2)


def test_help_teaches_every_command_and_option(pod):
    text = pod("--help")
    source = (ROOT / "scripts/tpu_pod.sh").read_text()
    for command in ("create", "setup", "run", "watch", "status", "logs", "stop", "delete"):
        assert f"\n  {command} " in text
        assert f"\n{command}() {{" in source
    for option in ("--project", "--queued", "--reserved", "--share", "--mount", "--git", "--env", "--iap", "--dry-run"):
        assert option in text
