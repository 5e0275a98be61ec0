"""Seeds of what is drawn, which follow from the one of a command and names, so that a later start draws the same."""

from ftjax.labeling.draws import draw


def numbered(seed: int, *names: str) -> int:
    """A seed of its own for each sequence of names, from 0 to 2**32 - 1."""
    return int(draw(seed, *names) * 2**32)
