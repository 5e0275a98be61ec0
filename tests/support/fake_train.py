"""Stands in for the interpreter that runs ftjax.train: notes its arguments, then does what $FAKE/plan says.

The plan is a list, one entry for each start of this host: a status to end with, "preempt" (the slice is taken away once
both hosts have started) or "wait" (until SIGTERM, then 75).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

fake, host = Path(os.environ["FAKE"]), Path(os.environ["HOME"]).name
starts = fake / f"starts-{host}"
done = len(starts.read_text().splitlines()) if starts.exists() else 0
plan = json.loads((fake / "plan").read_text())
record = {"arguments": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid(), "note": os.environ.get("NOTE")}
act = plan[min(done, len(plan) - 1)]
if act == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with starts.open("a") as file:
    file.write(json.dumps(record) + "\n")
print("step 1", flush=True)
if act == "wait":
    time.sleep(60)
if act == "preempt":  # by the last host alone: one that was slow to start would take away the slice made after this one
    state, taken = (fake / "queue", "SUSPENDED") if (fake / "queue").exists() else (fake / "state", "PREEMPTED")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if host == "1" and (fake / "starts-0").exists():
            state.write_text(taken)
        if not state.exists() or state.read_text() == taken:
            break
        time.sleep(0.05)
    act = 75
sys.exit(act)
