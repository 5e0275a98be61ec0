"""What a model's name in a request stands for."""

from pathlib import Path
from typing import NamedTuple, Protocol


class Served(NamedTuple):
    """A base, which all adapters share, or an adapter over it.

    created: seconds since 1970.
    adapter: the folder of a PEFT adapter; None for the base itself.
    owner: the id of the key that made it; None for the base, which everyone may use.
    """

    name: str
    created: int
    adapter: Path | None = None
    owner: str | None = None


class Models(Protocol):
    def find(self, name: str, owner: str) -> Served:
        """Refused (404, "model_not_found") where there is none of that name, or it is another's."""
        ...

    def all(self, owner: str) -> list[Served]: ...
