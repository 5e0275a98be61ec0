"""The data sets of reasoning-gym as tasks, `task:reasoning_gym/NAME`: made by rule, and scored by its own verifiers.

Stojanovski et al. 2025, arXiv 2505.24760. An entry follows from a seed and its index, and is made again where it is
scored, so that rows stay plain JSON.
"""

import functools
from types import SimpleNamespace
from typing import Any

from ftjax.errors import UserError, did_you_mean

PREFIX = "reasoning_gym/"
TRAIN, TEST = 1000, 100  # entries
_APART = 10**8  # between the seeds of the two splits: entry i of a seed is made of seed + i


def task(name: str) -> SimpleNamespace:
    """What `registry` wants of a task, of the data set called `name`.

    Raises:
      UserError: reasoning-gym is not installed, or has no data set of that name.
    """
    known = _package().factory.DATASETS
    if name not in known:
        raise UserError(f"task:{PREFIX}{name}: reasoning-gym has no such data set{did_you_mean(name, known)}")

    def train_examples(n: int | None = None, seed: int = 0) -> list[dict]:
        return _examples(name, seed, TRAIN if n is None else n)

    def test_examples(n: int | None = None, seed: int = 0) -> list[dict]:
        trained = {_question(row) for row in train_examples(seed=seed)}
        rows = _examples(name, _APART + seed, TEST if n is None else n)
        return [row for row in rows if _question(row) not in trained]

    return SimpleNamespace(train_examples=train_examples, test_examples=test_examples, score=score)


def score(completion: str, example: dict) -> float:
    """That of the data set's own verifier, in [0, 1], of what stands between <answer> and </answer>, else of all."""
    where = example["reasoning_gym"]
    answer = _package().utils.extract_answer(completion)
    data = _dataset(where["name"], where["seed"], where["size"])
    return float(data.score_answer(completion.strip() if answer is None else answer, data[where["index"]]))


@functools.lru_cache(maxsize=8)  # some data sets take a minute
def _examples(name: str, seed: int, count: int) -> list[dict]:
    """Of so many entries those with an answer, each question once."""
    data, found = _dataset(name, seed, count), {}
    for index in range(count):
        entry = data[index]
        if str(entry["answer"] or "").strip():
            turns = [{"role": "user", "content": entry["question"]}]
            turns.append({"role": "assistant", "content": str(entry["answer"])})
            where = {"name": name, "seed": seed, "size": count, "index": index}
            row = {"messages": turns, "reasoning_gym": where}
            found.setdefault(entry["question"], row)
    return list(found.values())


def _question(row: dict) -> str:
    return row["messages"][0]["content"]


@functools.lru_cache(maxsize=64)
def _dataset(name: str, seed: int, size: int) -> Any:
    return _package().create_dataset(name, seed=seed, size=size)


def _package() -> Any:
    try:
        import reasoning_gym
        from reasoning_gym import factory, utils  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"task:{PREFIX}...: reasoning-gym is not installed ({error}); pip install 'ftjax[gym]'"
        ) from error
    return reasoning_gym
