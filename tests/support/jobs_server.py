"""A server of jobs as a process of its own, to be killed: python jobs_server.py FOLDER. Prints the URL of its API.

What its jobs run is `fake_job`.
"""

import sys
import threading
from pathlib import Path

from support.jobs import serving

with serving(Path(sys.argv[1]), at_once=3, per_key=3) as server:
    print(server.url, flush=True)
    threading.Event().wait()
