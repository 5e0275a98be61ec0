"""Stands in for gcloud and its TPU hosts: notes every call in $FAKE/calls, and runs what ssh would on each host's home.

$FAKE/state is the slice's state (no file: there is no slice), $FAKE/queue that of its queued resource.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

fake = Path(os.environ["FAKE"])
hosts = [fake / "hosts" / str(index) for index in range(int(os.environ.get("FAKE_HOSTS", "2")))]
arguments = sys.argv[1:]
with (fake / "calls").open("a") as file:
    file.write(json.dumps(arguments) + "\n")
assert arguments[:2] == ["compute", "tpus"], arguments
kind, verb, target = arguments[2:5]
flags = dict(word.partition("=")[::2] for word in arguments[5:] if word.startswith("--"))
assert flags["--project"] == "my project", "every call says in which project"
assert flags["--zone"] == "us-west4-a"
state, queue = fake / "state", fake / "queue"


def not_found():
    sys.exit("ERROR: (gcloud) NOT_FOUND: Resource 'ft' was not found")


def make():
    if (fake / "no-capacity").exists():
        (fake / "no-capacity").unlink()
        sys.exit("ERROR: (gcloud) There is no more capacity in the zone")
    assert not state.exists(), "a slice is never made twice"
    state.write_text("READY")
    for host in hosts:
        host.mkdir(parents=True)


def unmake():
    state.unlink()
    # At once, as machines go: what runs on them may still write.
    gone = (fake / "hosts").rename(fake / f"gone-{os.getpid()}")
    shutil.rmtree(gone, ignore_errors=True)


if (kind, verb) == ("tpu-vm", "describe"):
    if (fake / "unreachable").exists():
        (fake / "unreachable").unlink()
        sys.exit("ERROR: (gcloud) cannot reach the API")
    if not state.exists():
        not_found()
    print({"value(state)": state.read_text(), "value(networkEndpoints.len())": len(hosts)}.get(flags["--format"], "?"))
elif (kind, verb) == ("tpu-vm", "create"):
    make()
elif (kind, verb) == ("tpu-vm", "delete"):
    unmake()
elif (kind, verb) == ("queued-resources", "create"):
    queue.write_text("WAITING_FOR_RESOURCES")
elif (kind, verb) == ("queued-resources", "describe"):
    if not queue.exists():
        not_found()
    print(queue.read_text())
    if queue.read_text() == "WAITING_FOR_RESOURCES":  # it comes while one waits
        make()
        queue.write_text("ACTIVE")
elif (kind, verb) == ("queued-resources", "delete"):
    queue.unlink()
    unmake()
elif (kind, verb) == ("tpu-vm", "scp"):
    name, _, path = arguments[5].partition(":")
    assert name == "ft"
    for host in hosts:
        shutil.copy(target, host / path)
elif (kind, verb) == ("tpu-vm", "ssh"):
    chosen = hosts if flags["--worker"] == "all" else [hosts[int(flags["--worker"])]]
    status = 0
    for host in chosen:
        if not host.exists() or state.read_text() != "READY" or (queue.exists() and queue.read_text() != "ACTIVE"):
            sys.exit("ERROR: (gcloud) the host is gone")
        environment = os.environ | {"HOME": str(host)}
        done = subprocess.run(["bash", "-c", flags["--command"]], cwd=host, env=environment, check=False)
        status = status or done.returncode
    sys.exit(status)
else:
    sys.exit(f"fake gcloud knows no {arguments}")
