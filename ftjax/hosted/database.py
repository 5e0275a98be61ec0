"""The server's database: SQLite beside its files, or PostgreSQL by its URL. Each module declares its own tables."""

from typing import ClassVar

import sqlalchemy
from sqlalchemy.orm import DeclarativeBase

from ftjax.errors import UserError


class Base(DeclarativeBase):
    """What tables derive from. Whole numbers have 64 bits: times in seconds and bytes are larger than 32 hold."""

    # SQLite's INTEGER has them anyway, and numbers rows by itself only under that name.
    type_annotation_map: ClassVar = {int: sqlalchemy.BigInteger().with_variant(sqlalchemy.Integer, "sqlite")}


def connect(url: str) -> sqlalchemy.Engine:
    """The database of a URL of SQLAlchemy's, with the tables of all modules that are imported.

    SQLite writes ahead (WAL), so that readers and the one writer do not wait for each other, and a writer waits for
    another instead of failing.
    """
    try:
        # Parameters are what users sent, and would stand in the messages of errors, which are logged.
        engine = sqlalchemy.create_engine(url, hide_parameters=True, pool_pre_ping=True)
    except (sqlalchemy.exc.ArgumentError, ImportError) as error:
        raise UserError(
            f"database={url!r}: {error}; use sqlite:////absolute/path.db, or postgresql+psycopg://user@host/name "
            "with pip install 'ftjax[serve,postgres]'"
        ) from error
    if engine.dialect.name == "sqlite":

        @sqlalchemy.event.listens_for(engine, "connect")
        def _prepare(connection, _) -> None:
            for pragma in ("journal_mode=WAL", "busy_timeout=30000", "foreign_keys=ON", "synchronous=NORMAL"):
                connection.execute(f"PRAGMA {pragma}")

    try:
        Base.metadata.create_all(engine)
    except sqlalchemy.exc.OperationalError as error:
        raise UserError(f"database={url!r} does not open: {error.orig}") from error
    return engine
