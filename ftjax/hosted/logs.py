"""The log of the server: a line of JSON for each event."""

import datetime
import json
import logging
import sys
from typing import TextIO

log = logging.getLogger("ftjax.hosted")

# Of the loggers that a server has. python_multipart warns of forms that are none, which their senders are told.
LEVELS = {"ftjax.hosted": logging.INFO, "uvicorn": logging.WARNING, "python_multipart": logging.ERROR}


class JsonLines(logging.Formatter):
    """time, level, event, the record's own `fields`, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def begin(stream: TextIO | None = None) -> None:
    """Sends what they log to a stream, by default stderr."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in LEVELS.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
