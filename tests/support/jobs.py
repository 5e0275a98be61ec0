"""A server of jobs whose runs take hardly any time (`fake_job`)."""

import contextlib
import sys

from ftjax.hosted import models
from ftjax.hosted.database import connect
from ftjax.hosted.jobs.backend import Local
from ftjax.hosted.jobs.jobs import Jobs
from ftjax.hosted.jobs.routes import routes
from ftjax.hosted.models import Trained
from support import SUPPORT
from support.plain_hosted import PlainFiles, application, served

SETTINGS = {"model.source": "somewhere/tiny"}
FAKE = Local(python=(sys.executable, "-IS", str(SUPPORT / "fake_job.py")))


class Server:
    """Files, jobs and clients of one server."""

    def __init__(self, folder, url, jobs, files):
        self.folder, self.url, self.jobs, self.files = folder, url, jobs, files

    def plan(self, owner="alice", rows=4, **what):
        """A file that tells the stand-in of a training what to do."""
        return self.files.add([{"steps": 4, **what}] + [{}] * (rows - 1), owner)

    def starts(self, job):
        return (self.folder / "jobs" / job.id / "starts").read_text().splitlines()


@contextlib.contextmanager
def serving(folder, settings=SETTINGS, **options):
    files = PlainFiles(folder / "files")
    engine = connect(f"sqlite:///{folder}/server.db")
    trained = Trained(engine, "tiny", created=1)
    values = {"backend": FAKE, "helpers": FAKE, "seconds": 0.02, "at_once": 2, "per_key": 2} | options
    with (
        Jobs(engine, files, folder / "jobs", settings, trained, **values) as jobs,
        served(application(routes(jobs), models.routes(trained))) as url,
    ):
        yield Server(folder, url, jobs, files)
    engine.dispose()
