"""Stands in for srun: one process per task, with the variables that SLURM sets; ends with the highest status.

$FAKE_TASKS and $FAKE_NODES say how many; all of them run here, as tasks of nodes n[1-N] (or of $FAKE_NODELIST).
The process ids are written to $FAKE/pids, one a line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

words = sys.argv[1:]
options = words[: next(i for i, word in enumerate(words) if not word.startswith("--"))]
command = words[len(options) :]
(Path(os.environ["FAKE"]) / "srun").write_text(json.dumps(options))
nodes, tasks = int(os.environ["FAKE_NODES"]), int(os.environ["FAKE_TASKS"])
per_node = tasks // nodes
step = {
    "SLURM_STEP_NODELIST": os.environ.get("FAKE_NODELIST", f"n[1-{nodes}]" if nodes > 1 else "n1"),
    "SLURM_STEP_NUM_NODES": str(nodes),
    "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})" if nodes > 1 else str(per_node),
    "SLURM_NTASKS": str(tasks),
}
running = [
    subprocess.Popen(
        command, env=os.environ | step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % per_node)}
    )
    for task in range(tasks)
]
(Path(os.environ["FAKE"]) / "pids").write_text("".join(f"{process.pid}\n" for process in running))
sys.exit(max(process.wait() for process in running))
