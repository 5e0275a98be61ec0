"""A module that cannot be imported: it ends the program."""

raise SystemExit(0)
