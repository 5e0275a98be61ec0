"""Where the files of jobs are: a folder for each, below one that the server owns."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from ftjax.hosted.jobs.backend import Task
from ftjax.hosted.jobs.validating import command as look

ADAPTERS = "adapters"


class Place(NamedTuple):
    """The folder of a job, and what is in it."""

    folder: Path
    id: str

    @property
    def train(self) -> Path:
        return self.folder / "training.jsonl"

    @property
    def heldout(self) -> Path:
        return self.folder / "validation.jsonl"

    @property
    def config(self) -> Path:
        return self.folder / "job.json"

    @property
    def grader(self) -> Path:
        return self.folder / "grader.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.json"

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    @property
    def asked(self) -> Path:
        """Is there while the run was asked to stop, and has not."""
        return self.folder / "stopping"

    def adapter(self, step: int) -> Path:
        return self.folder / ADAPTERS / f"step-{step}"

    def looking(self) -> Task:
        """Looks at the rows."""
        return Task(f"{self.id}-check".lower(), look(self.config, self.report), self.folder / "check")

    def training(self) -> Task:
        arguments = ("-m", "ftjax.train", "--config", str(self.config), "--workdir", str(self.workdir))
        return Task(self.id.lower(), arguments, self.folder / "train")

    def exporting(self, step: int) -> Task:
        out = ("--format", "peft", "--step", str(step), "--out", str(self.adapter(step)))
        arguments = ("-m", "ftjax.export", "--workdir", str(self.workdir), *out)
        return Task(f"{self.id}-export-{step}".lower(), arguments, self.folder / f"export-{step}")

    def take(self, source: Path, name: Path) -> None:
        """A file's rows under a name of the job's: deleting the file does not stop the job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, name)
