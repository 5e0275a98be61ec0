"""What `ftjax.inspect_data` found of a job's rows: numbers to train with, or why the job fails."""

import json
import re
from pathlib import Path
from typing import Any

from ftjax.cli import EXIT_MISTAKE
from ftjax.data.audit.findings import ERROR
from ftjax.hosted.jobs.configuring import Data

_OF_EVALUATION = ("leak", "eval_empty")  # what codes of findings about the rows of an evaluation begin with
_SHOWN = 3  # findings of a message
# Lines of SLURM, and of the script that it runs, between and after those of a command.
_LAUNCHER = re.compile(r"^(?:srun|slurmstepd\S*|---)[: ].*(?:\n|$)", re.MULTILINE)


def command(config: Path, report: Path) -> tuple[str, ...]:
    """Arguments of Python that look at the rows of a config."""
    return ("-m", "ftjax.inspect_data", "--config", str(config), "--json", str(report), "--rows=0", "--max_rows=0")


def read(status: int, report: Path, log: str, names: dict[str, str]) -> Data | dict[str, Any]:
    """The data of a job, or the error that it fails with.

    Args:
      status: that the command ended with; log: what it printed.
      names: {path: what a client calls the file, such as "training_file (file-abc)"}, for messages.
    """
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    errors = [finding for finding in found.get("findings", ()) if finding["severity"] == ERROR]
    if errors:
        more = f" (and {len(errors) - _SHOWN} more)" if len(errors) > _SHOWN else ""
        message = "; ".join(f"{finding['message']} [{finding['code']}]" for finding in errors[:_SHOWN]) + more
        return error(message, names, errors[0]["code"].startswith(_OF_EVALUATION))
    if status == EXIT_MISTAKE or not found:
        return failure(mistake(log) or f"the check of the rows ended with status {status}", names)
    chosen = found["chosen"]
    return Data(found["epoch"]["rows"], **chosen)


def warnings(report: Path, names: dict[str, str]) -> list[str]:
    """What else is to be known of the rows; not of their batches, which are not yet those that a request asks for."""
    found = json.loads(report.read_text(encoding="utf-8")).get("findings", ())
    told = [one for one in found if one["severity"] != ERROR and one["code"] != "few"]
    return [renamed(f"{one['message']} [{one['code']}]", names) for one in told]


def failure(message: str, names: dict[str, str]) -> dict[str, Any]:
    """The error of a command that ended with this message: of the rows where it names a file of theirs."""
    if any(path in message for path in names):
        return error(message, names)
    return {"code": "server_error", "message": message, "param": None}


def mistake(log: str) -> str:
    """What a command of ours said before it ended with the status of a mistake: from the last "error: " on."""
    log = _LAUNCHER.sub("", log)
    _, found, message = log.rpartition("\nerror: ") if "\nerror: " in log else log.partition("error: ")
    return message.strip() if found else ""


def error(message: str, names: dict[str, str], heldout: bool = False) -> dict[str, Any]:
    """`error` of a job whose file is not to be trained on.

    heldout: whether it is about the validation file; where only that is named, it is.
    """
    about = [name for path, name in names.items() if path in message]
    heldout |= bool(about) and all(name.startswith("validation_file") for name in about)
    param = "validation_file" if heldout else "training_file"
    return {"code": f"invalid_{param}", "message": renamed(message, names), "param": param}


def renamed(message: str, names: dict[str, str]) -> str:
    """A message with files as clients call them, and none of the server's own paths."""
    for path, name in names.items():
        message = message.replace(path, name)
    return message
