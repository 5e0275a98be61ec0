"""The answers of `support_preference` one by one, each called good or bad: thumbs up and down."""

from ftjax.tasks import support_preference


def train_examples(n: int | None = None, seed: int = 0) -> list[dict]:
    """Two rows `{"prompt": [system, user], "completion": [answer], "label": bool}` of each of `n` (400) pairs."""
    return _unpaired(support_preference.train_examples(n, seed))


def test_examples(n: int | None = None, seed: int = 0) -> list[dict]:  # noqa: PT028 (not a pytest test)
    """The same of `n` (200) test pairs."""
    return _unpaired(support_preference.test_examples(n, seed))


def _unpaired(pairs: list[dict]) -> list[dict]:
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
