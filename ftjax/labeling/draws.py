"""Random numbers that follow from a seed and names, so that they are the same whenever a command is started again."""

import hashlib


def draw(seed: int, *names: str) -> float:
    """A number that is uniform in [0, 1), another one for each seed and sequence of names."""
    text = "\0".join([str(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
