"""A server of jobs as a process of its own, to be killed: python jobs_server.py FOLDER. Prints the URL of its API.

What its jobs run is `fake_job`.
"""

import sys
import threading
from pathlib import Path

from ftjax.hosted import models
from ftjax.hosted.database import connect
from ftjax.hosted.jobs.backend import Local
from ftjax.hosted.jobs.jobs import Jobs
from ftjax.hosted.jobs.routes import routes
from ftjax.hosted.models import Trained
from support import SUPPORT
from support.plain_hosted import PlainFiles, application, served

folder = Path(sys.argv[1])
engine = connect(f"sqlite:///{folder}/server.db")
trained = Trained(engine, "tiny", created=1)
fake = Local(python=(sys.executable, "-IS", str(SUPPORT / "fake_job.py")))
files = PlainFiles(folder / "files")
settings = {"model.source": "somewhere/tiny"}
with (
    Jobs(engine, files, folder / "jobs", settings, trained, fake, fake, at_once=3, per_key=3, seconds=0.02) as jobs,
    served(application(routes(jobs), models.routes(trained))) as url,
):
    print(url, flush=True)
    threading.Event().wait()
