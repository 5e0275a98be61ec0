"""What checks of data find: each kind once, with how often it occurs and the first places."""

import re
from dataclasses import dataclass, field

ERROR, WARNING = "error", "warning"
_PLACES = 3
_VARIES = re.compile(r"\d+|'[^']*'")  # what may differ between two findings of one kind


@dataclass(frozen=True)
class Finding:
    """One kind of trouble in a data set.

    Attributes:
      severity: "error" (training on it would be in vain, or its evaluation) or "warning".
      code: its short name, a key of `checks.KINDS`.
      origin: the first place, "file.jsonl:12"; "" where it concerns the whole set.
      message: what is wrong, how often, where (at most three places) and the mend; one line.
      count: how many rows it concerns.
      places: the first three.
    """

    severity: str
    code: str
    origin: str
    message: str
    count: int = 1
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.code}]"


@dataclass
class _Group:
    severity: str
    code: str
    what: str
    mend: str
    count: int = 0
    places: list[str] = field(default_factory=list)


class Findings:
    """Gathers findings in memory that does not grow with their number: ten thousand equal ones are one line."""

    def __init__(self):
        self._groups: dict[tuple[str, str], _Group] = {}

    def add(self, severity: str, code: str, what: str, mend: str, place: str = "", detail: str = "", count: int = 1):
        """One more row of the kind (code, what); `detail` is said of the places that are kept ("as rows.jsonl:3")."""
        group = self._groups.setdefault(_key(code, what), _Group(severity, code, what, mend))
        group.count += count
        if place and len(group.places) < _PLACES:
            group.places.append(f"{place} ({detail})" if detail else place)

    def wants_place(self, code: str, what: str) -> bool:
        """Whether the place of one more of this kind would be kept."""
        group = self._groups.get(_key(code, what))
        return group is None or len(group.places) < _PLACES

    def all(self) -> list[Finding]:
        """Errors first, then warnings, each in the order in which they were first met."""
        groups = sorted(self._groups.values(), key=lambda group: group.severity != ERROR)
        return [_finding(group) for group in groups]


def _key(code: str, what: str) -> tuple[str, str]:
    return code, _VARIES.sub("#", what)


def _finding(group: _Group) -> Finding:
    where = ", ".join(group.places)
    if len(group.places) == 1 and group.count == 1:
        text = f"{where}: {group.what}"
    elif group.places:
        more = ", ..." if group.count > len(group.places) else ""
        text = f"{group.count:,} rows: {group.what}: {where}{more}"
    else:
        text = group.what
    first = group.places[0].split(" (")[0] if group.places else ""
    return Finding(group.severity, group.code, first, f"{text}; {group.mend}", group.count, tuple(group.places))
