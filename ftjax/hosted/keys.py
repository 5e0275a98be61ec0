"""API keys: who may ask, and whose files, jobs and models they are.

A key is 256 random bits, of which the database holds the SHA-256 alone. Slow hashes such as scrypt protect what people
think up, which can be guessed; of so many random bits nobody finds any by trying, and each request is checked at once.
The hash is what is looked up: how long that takes says something about the hash, and nothing about the key. Keys begin
with "tml-" since Tinker's client takes no others; OpenAI's takes any.
"""

import hashlib
import hmac
import secrets
import time
from typing import NamedTuple

import sqlalchemy
from sqlalchemy.orm import Mapped, Session, mapped_column

from ftjax.errors import UserError
from ftjax.hosted.database import Base

_SHOWN = 8  # characters of a key by which its owner knows it: the beginning that all have, and four of its 43


class Key(Base):
    __tablename__ = "keys"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)  # key_...: the owner of what is made with it
    name: Mapped[str]
    prefix: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[int]
    revoked_at: Mapped[int | None]


class Created(NamedTuple):
    """A new key; `secret` is nowhere else."""

    id: str
    secret: str


class Keys:
    """The keys of a database. What the command line changes counts from the next request on."""

    def __init__(self, engine: sqlalchemy.Engine):
        self._engine = engine

    def create(self, name: str) -> Created:
        """name: whose it is, or what for, for those who read the list."""
        if not name.strip() or not name.isprintable():
            raise UserError(f"keys create {name!r}: give it a name, such as who uses it")
        created = Created(f"key_{secrets.token_hex(8)}", _secret())
        with Session(self._engine) as session, session.begin():
            session.add(
                Key(
                    id=created.id,
                    name=name.strip(),
                    prefix=created.secret[:_SHOWN],
                    digest=_digest(created.secret),
                    created_at=int(time.time()),
                )
            )
        return created

    def all(self) -> list[Key]:
        """In the order in which they were made, revoked ones too."""
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(sqlalchemy.select(Key).order_by(Key.number)))

    def revoke(self, id: str) -> None:
        """Ends what a key may do; what was made with it stays. UserError where there is none of that id."""
        with Session(self._engine) as session, session.begin():
            key = _find(session, id)
            key.revoked_at = key.revoked_at or int(time.time())

    def renew(self, id: str) -> Created:
        """Another secret for the same owner, of whom the old one, known to others or lost, no longer is."""
        secret = _secret()
        with Session(self._engine) as session, session.begin():
            key = _find(session, id)
            key.prefix, key.digest, key.revoked_at = secret[:_SHOWN], _digest(secret), None
        return Created(id, secret)

    def owner(self, secret: str) -> str | None:
        """The id of a key that holds, else None."""
        digest = _digest(secret)
        with Session(self._engine) as session:
            key = session.scalar(sqlalchemy.select(Key).where(Key.digest == digest))
            if key is None or key.revoked_at is not None or not hmac.compare_digest(key.digest, digest):
                return None
            return key.id


def _find(session: Session, id: str) -> Key:
    key = session.scalar(sqlalchemy.select(Key).where(Key.id == id))
    if key is None:
        raise UserError(f"there is no key {id}; `keys list` shows their ids")
    return key


def _secret() -> str:
    return f"tml-{secrets.token_urlsafe(32)}"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
