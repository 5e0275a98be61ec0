"""Environments and tools for runs of small models, named as support.games:NAME."""

import math

import numpy as np

from ftjax import distributed
from ftjax.environments import Turn


class Echo:
    """Says back how long each turn was, three times; the reward is the share of the letter e in each turn."""

    def reset(self, example, seed):
        self.turns = 0
        return [{"role": "user", "content": f"the game is {seed % 1000}"}]

    def step(self, completion):
        self.turns += 1
        reward = completion.count("e") / max(len(completion), 1)
        return Turn([{"role": "user", "content": f"{len(completion)} letters, again"}], self.turns == 3, reward)


class OfOneProcess(Echo):
    """Is never asked in another process than the first."""

    def step(self, completion):
        assert distributed.is_first()
        return super().step(completion)


class Short(Echo):
    """Says nothing first, and ends at once."""

    def reset(self, example, seed):
        return None

    def step(self, completion):
        return (), True, 1.0


class Raises(Echo):
    def step(self, completion):
        if self.turns:
            raise LookupError("the board is gone")
        return super().step(completion)


class NoNumber(Echo):
    def step(self, completion):
        return super().step(completion)._replace(reward=math.nan)


class Speaks(Echo):
    def step(self, completion):
        return Turn([{"role": "assistant", "content": "I am the model"}])


class Silent(Echo):
    def step(self, completion):
        return Turn()


class Leaves(Echo):
    def step(self, completion):
        raise SystemExit(0)


class Changes(Echo):
    """Changes what it is given, and takes none that was changed before; its numbers are of NumPy."""

    def reset(self, example, seed):
        assert example["messages"][0].pop("role") == "user"
        return super().reset(example, seed)

    def step(self, completion):
        turn = super().step(completion)
        return turn._replace(reward=np.float32(turn.reward))


class Nothing(Echo):
    def step(self, completion):
        return None


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b


def fails(text: str) -> str:
    """
    Never works.

    Args:
        text: Anything.
    """
    raise ValueError(f"no {text} here")


def untyped(a):
    """Has no types."""
    return a
