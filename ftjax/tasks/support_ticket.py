"""A customer's message becomes a support ticket: JSON with order, customer, item, quantity and issue.

Messages are put together from sentence templates, so every fact of a ticket is known. The test split has sentences,
names, items and order numbers that the training split never shows (`ftjax.tasks.support_phrases`).
"""

import json
import random

from ftjax import strict_json
from ftjax.errors import UserError
from ftjax.tasks.support_phrases import ORDER_FORMS, QUANTITY_WORDS, TEST, TRAIN, Phrases

KEYS = ("order", "customer", "item", "quantity", "issue")
ISSUES = ("damaged", "missing", "wrong_item", "late", "refund")
SYSTEM = "Write a JSON ticket: order, customer, item, quantity, issue (damaged, missing, wrong_item, late or refund)."
MAX_EXAMPLES = 10_000  # order numbers are not repeated, and the test split has 12,857 of them


def train_examples(n: int | None = None, seed: int = 0) -> list[dict]:
    """`n` (800) training examples, each `{"messages": [system, user, assistant]}`; the first n of one stream."""
    return _examples(TRAIN, 800 if n is None else n, f"train {seed}", test=False)


def test_examples(n: int | None = None, seed: int = 0) -> list[dict]:  # noqa: PT028 (not a pytest test)
    """`n` (200) test examples of the same form, from phrases that training never shows."""
    return _examples(TEST, 200 if n is None else n, f"test {seed}", test=True)


def score(completion: str, example: dict) -> float:
    """1.0 where `completion` is exactly the expected JSON object, in any layout and key order, else 0.0.

    Only white space may surround the object, and no key may occur twice; 2.0 and "2" are not 2.
    """
    expected = json.loads(example["messages"][-1]["content"])
    try:
        ticket = strict_json.loads(completion)
    except (ValueError, RecursionError):
        return 0.0
    if type(ticket) is not dict or ticket != expected:
        return 0.0
    return float(all(type(ticket[key]) is type(expected[key]) for key in expected))


def valid(completion: str, example: dict) -> bool:
    """Whether `completion` is a ticket, right or wrong: a JSON object with the five keys and no others."""
    try:
        ticket = strict_json.loads(completion)
    except (ValueError, RecursionError):
        return False
    return type(ticket) is dict and ticket.keys() == set(KEYS)


def _examples(phrases: Phrases, n: int, seed: str, *, test: bool) -> list[dict]:
    if not 1 <= n <= MAX_EXAMPLES:
        raise UserError(f"support_ticket: {n} examples asked for; give 1 to {MAX_EXAMPLES}")
    rng = random.Random(seed)
    used: set[int] = set()
    examples = []
    for i in range(n):
        issue = ISSUES[i % len(ISSUES)]
        sentences = phrases.sentences[issue]
        # Sentences take turns, so that all of them occur equally often whatever n is.
        sentence = sentences[i // len(ISSUES) % len(sentences)]
        order = _draw_order(rng, used, test=test)
        examples.append(_example(rng, phrases, issue, sentence, order))
    return examples


def _draw_order(rng: random.Random, used: set[int], *, test: bool) -> int:
    """A five-digit number not drawn before. Multiples of 7 are the test split's: a property that no digit shows."""
    while True:
        order = rng.randrange(10_000, 100_000)
        if (order % 7 == 0) == test and order not in used:
            used.add(order)
            return order


def _example(rng: random.Random, phrases: Phrases, issue: str, sentence: str, order: int) -> dict:
    customer, (singular, plural) = rng.choice(phrases.names), rng.choice(phrases.items)
    quantity = rng.randrange(1, len(QUANTITY_WORDS))
    single = quantity == 1
    item = singular if single else plural
    article = "an" if item[0] in "aeiou" else "a"
    counts = [str(quantity), QUANTITY_WORDS[quantity]] if quantity > 1 else [article, article, "one", "1"]
    what = f"{rng.choice(counts)} {item}"
    number = rng.choice(ORDER_FORMS).format(order)
    body = sentence.format(
        **{"what": what, "What": _capital(what), "order": number, "Order": _capital(number)},
        **{"it": "it" if single else "they", "them": "it" if single else "them"},
        **{"was": "was" if single else "were", "has": "has" if single else "have"},
    )
    message = rng.choice(phrases.frames).format(body=body, name=customer)
    ticket = dict(zip(KEYS, (str(order), customer, item, quantity, issue)))
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message},
            {"role": "assistant", "content": json.dumps(ticket, separators=(",", ":"), ensure_ascii=False)},
        ]
    }


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
