"""The entries of data.train and data.eval, read: files, TFDS data sets and tasks in one list of rows."""

from collections.abc import Iterable

from ftjax.data.example import Row
from ftjax.data.rows import check_rows, read_rows
from ftjax.tasks import registry

TASK = "task:"


def read_sources(entries: Iterable[dict[str, str]], max_bad_rows: int = 0) -> list[Row]:
    """All rows of all entries ({"source", "format"?, "split"?}, see FORMATS in docs/data.md), in their order.

    Raises UserError for what `read_rows` refuses and for an unknown task or split.
    """
    rows = []
    for entry in entries:
        source, format, split = entry["source"], entry.get("format"), entry.get("split", "train")
        if source.startswith(TASK):
            task = registry.get(source.removeprefix(TASK))
            rows += check_rows(registry.examples(task, split), source, format)
        else:
            rows += read_rows(source, format, split, max_bad_rows)
    return rows
