"""Pairs of support tickets: the right one, terse, is preferred to one with a fault that models really make.

Half of the faults are a wrong ticket as terse as the right one, a quarter are the right ticket with something around it
or in it, a quarter are both. So neither length nor form alone tells the answers apart. The prompts are those of
`support_ticket`, of training the ones that come after its own 800.
"""

import json
import random
from collections.abc import Callable

from ftjax.tasks import support_ticket
from ftjax.tasks.support_ticket import ISSUES

Ticket = dict[str, str | int]

FAULTS = ("wrong", "verbose", "wrong", "both")  # the kinds, in turn


def train_examples(n: int | None = None, seed: int = 0) -> list[dict]:
    """`n` (400) pairs `{"prompt": [system, user], "chosen": [answer], "rejected": [answer], "fault": of FAULTS}`."""
    first = len(support_ticket.train_examples(seed=seed))
    count = 400 if n is None else n
    return _pairs(support_ticket.train_examples(first + count, seed)[first:], f"train {seed}")


def test_examples(n: int | None = None, seed: int = 0) -> list[dict]:  # noqa: PT028 (not a pytest test)
    """`n` (200) pairs of the same form, on the prompts of `support_ticket.test_examples`."""
    return _pairs(support_ticket.test_examples(200 if n is None else n, seed), f"test {seed}")


def _pairs(examples: list[dict], seed: str) -> list[dict]:
    return [_pair(example, FAULTS[i % len(FAULTS)], random.Random(f"{seed} {i}")) for i, example in enumerate(examples)]


def with_fault(example: dict, fault: str, rng: random.Random) -> str:
    """The answer of an example of `support_ticket` with a fault, one of FAULTS."""
    ticket = json.loads(example["messages"][-1]["content"])
    if fault != "verbose":
        ticket = rng.choice(_MISTAKES)(ticket, rng)
    return _terse(ticket) if fault == "wrong" else rng.choice(_WORDY)(ticket, rng)


def _pair(example: dict, fault: str, rng: random.Random) -> dict:
    *prompt, answer = example["messages"]
    text = with_fault(example, fault, rng)
    return {"prompt": prompt, "chosen": [answer], "rejected": [answer | {"content": text}], "fault": fault}


def _terse(ticket: Ticket) -> str:
    return json.dumps(ticket, separators=(",", ":"), ensure_ascii=False)


def _wrong_issue(ticket: Ticket, rng: random.Random) -> Ticket:
    return ticket | {"issue": rng.choice([issue for issue in ISSUES if issue != ticket["issue"]])}


def _wrong_order(ticket: Ticket, rng: random.Random) -> Ticket:
    """One digit is another."""
    order, place = str(ticket["order"]), rng.randrange(5)
    digit = rng.choice([digit for digit in "123456789" if digit != order[place]])
    return ticket | {"order": order[:place] + digit + order[place + 1 :]}


def _wrong_quantity(ticket: Ticket, rng: random.Random) -> Ticket:
    return ticket | {"quantity": rng.choice([count for count in range(1, 7) if count != ticket["quantity"]])}


def _wrong_copy(ticket: Ticket, rng: random.Random) -> Ticket:
    """The item or the customer is almost that of the message."""
    key = rng.choice(["item", "item", "customer"])
    text = str(ticket[key])
    place = rng.randrange(1, len(text))
    missing = text[:place] + text[place + 1 :]
    others = [f" {text}", text[0].swapcase() + text[1:], missing, text.removesuffix("s") + "s" * (text[-1] != "s")]
    return ticket | {key: rng.choice(others)}


def _missing_field(ticket: Ticket, rng: random.Random) -> Ticket:
    missing = rng.choice(list(ticket))
    return {key: value for key, value in ticket.items() if key != missing}


# As a model makes them that has seen some tickets: most often it takes one issue for another.
_MISTAKES: tuple[Callable[[Ticket, random.Random], Ticket], ...] = (
    *(_wrong_issue, _wrong_issue, _wrong_order, _wrong_quantity, _wrong_copy, _missing_field),
)


def _introduced(ticket: Ticket, rng: random.Random) -> str:
    start = ("Here is the ticket:", "Sure! Here is the JSON ticket you asked for:", "Ticket:")
    return f"{rng.choice(start)}\n{_terse(ticket)}"


def _commented(ticket: Ticket, rng: random.Random) -> str:
    end = ("Let me know if you need anything else.", "I am sorry for the trouble.", "The ticket has been created.")
    return f"{_terse(ticket)}\n{rng.choice(end)}"


def _fenced(ticket: Ticket, rng: random.Random) -> str:
    return f"```json\n{_terse(ticket)}\n```"


def _with_more_fields(ticket: Ticket, rng: random.Random) -> str:
    more = (("priority", "high"), ("status", "open"), ("note", "The customer would like a quick answer."))
    return _terse(ticket | dict([rng.choice(more)]))


_WORDY: tuple[Callable[[Ticket, random.Random], str], ...] = (_introduced, _commented, _fenced, _with_more_fields)
