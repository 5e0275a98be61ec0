"""Columns under other names: the option `columns` of a source says which of its columns each of ours is."""

from collections.abc import Iterable, Mapping

from ftjax.errors import UserError, did_you_mean

Columns = Mapping[str, str]  # our name -> the source's
NONE: Columns = {}


def renamed(fields: dict, columns: Columns) -> dict:
    """The fields of a row by our names. Another column that has one of these names is left out."""
    if not columns:
        return fields
    taken = {*columns, *columns.values()}
    others = {name: value for name, value in fields.items() if name not in taken}
    return others | {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}


def check(columns: Columns, present: Iterable[str], where: str) -> None:
    """UserError for a column that is not among those that are present at `where`."""
    present = [name for name in present if name]
    for theirs in columns.values():
        if theirs not in present:
            raise UserError(
                f"{where}: there is no column {theirs!r}, which the option columns = {dict(columns)} names"
                f"{did_you_mean(theirs, present)}"
            )
