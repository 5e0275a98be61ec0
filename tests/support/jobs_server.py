"""A server of jobs as a process of its own, to be killed: python jobs_server.py FOLDER. Prints the URL of its API.

What its jobs run is `fake_job`, or what a train.sbatch runs under SLURM: python jobs_server.py FOLDER SCRIPT.
"""

import sys
import threading
from pathlib import Path

from ftjax.hosted.jobs.slurm import Slurm
from support.jobs import serving

backend = {"backend": Slurm(Path(sys.argv[2]))} if sys.argv[2:] else {}
with serving(Path(sys.argv[1]), at_once=3, per_key=3, **backend) as server:
    print(server.url, flush=True)
    threading.Event().wait()
