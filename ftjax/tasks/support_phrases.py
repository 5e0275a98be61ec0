"""The phrases of the support-ticket task: what training shows, and what it never shows.

In a sentence {what} is the item with its count ("two desk lamps"), {order} the order number as the customer writes it
and {it}, {them}, {was}, {has} agree with the count; {What} and {Order} begin with a capital. No sentence contains the
name of its issue. A frame puts the customer's name around the sentence.
"""

import json
from pathlib import Path
from typing import NamedTuple


class Phrases(NamedTuple):
    sentences: dict[str, list[str]]  # by issue
    frames: list[str]
    names: list[str]
    items: list[tuple[str, str]]  # singular, plural


QUANTITY_WORDS = ("", "one", "two", "three", "four", "five", "six")  # by quantity
ORDER_FORMS = (
    "order {}", "#{}", "order #{}", "order no. {}", "ref no. {}", "order number {}", "reference {}", "order ref {}",
)  # fmt: skip

_STORED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TRAIN, TEST = (Phrases(**_STORED[split]) for split in ("train", "test"))
