"""Stands in for the commands that a job runs, and takes hardly any time: `python fake_job.py -m ftjax.COMMAND ...`.

What a training does is told by the first row of its data, {"steps": 5, "seconds": 0.01, "end": 1, "times": 1}: so many
steps, and so often it ends with that status instead of 0, after half of them. As a real one it goes on from the last
step that it saved, holds its workdir, and saves on SIGTERM. Each start is noted in `starts` of the job's folder.
"""

import fcntl
import json
import signal
import sys
import time
from pathlib import Path

words = sys.argv[2:]
command = words[0].removeprefix("ftjax.")
flags = dict(zip(words[1::2], words[2::2], strict=False))


def note(folder, text):
    with (folder / "starts").open("a") as file:
        file.write(text + "\n")


def inspect(config, report):
    rows = Path(config["data.train"][0]).read_text().splitlines()
    if rows[0] == "not json":
        sys.exit(f"error: {config['data.train'][0]}:1: is not JSON")
    count = len(rows)
    chosen = {"batch_size": 1, "row_length": 64, "epochs": config.get("epochs", 3.0), "learning_rate": 1e-3}
    report.write_text(json.dumps({"findings": [], "epoch": {"rows": count}, "chosen": chosen}))


def train(config, workdir):
    plan = json.loads(Path(config["data.train"][0]).read_text().splitlines()[0])
    workdir.mkdir(exist_ok=True)
    lock = (workdir / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note(workdir.parent, "TWICE")
        sys.exit(2)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    checkpoints = workdir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    done = max((int(path.name) for path in checkpoints.iterdir()), default=0)
    if done == plan["steps"]:
        sys.exit(0)
    note(workdir.parent, f"start {done}")
    starts = (workdir.parent / "starts").read_text().count("start")
    (workdir / "environment.json").write_text(json.dumps({"starts": [{"steps": plan["steps"]}]}))
    for step in range(done + 1, plan["steps"] + 1):
        time.sleep(plan.get("seconds", 0))
        record = {"step": step, "loss": 1 / step, "mean_token_accuracy": 0.5, "num_tokens": 10 * step, "step_time": 0.1}
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if starts <= plan.get("times", 0) and step >= plan["steps"] / 2:
            print(plan.get("says", ""), flush=True)
            sys.exit(plan["end"])
        (checkpoints / str(step)).mkdir()
        if stopped:
            note(workdir.parent, f"saved {step}")
            sys.exit(75)
    note(workdir.parent, "end")


if command == "inspect_data":
    inspect(json.loads(Path(flags["--config"]).read_text()), Path(flags["--json"]))
elif command == "train":
    train(json.loads(Path(flags["--config"]).read_text()), Path(flags["--workdir"]))
elif command == "export":
    out = Path(flags["--out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapter_config.json").write_text("{}")
