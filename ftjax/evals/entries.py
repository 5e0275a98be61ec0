"""What `data.eval` says: which entries are answered, which have a loss, and what their metrics are called. Nothing of
them is read.
"""

from pathlib import PurePath
from typing import Any

from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax.config import GRADER, REWARD
from ftjax.data.read.sources import TASK
from ftjax.tasks import registry

TASK_SCORE = "score"  # the name of a task's own

# Of these nothing is answered: the likelihoods of what stands there are compared (`ftjax.evals.likely`).
MULTIPLE_CHOICE, PERPLEXITY = LIKELY = ("multiple_choice", "perplexity")


def split_entries(config: ConfigDict) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the entries of data.eval that are answered and scored, those that have a loss)."""
    entries = _entries(config)
    scored = [entry for entry in entries if "score" in entry and entry["score"] not in LIKELY]
    return scored, [entry for entry in entries if "score" not in entry]


def likely_entries(config: ConfigDict) -> list[dict[str, Any]]:
    """The entries of data.eval that are measured by likelihoods (`ftjax.evals.likely`)."""
    return [entry for entry in _entries(config) if entry.get("score") in LIKELY]


def metric_names(config: ConfigDict) -> list[str]:
    """The metrics that entries are scored with, the higher, the better, in their order and without reading them."""
    entries = [entry for entry in _entries(config) if entry.get("score", PERPLEXITY) != PERPLEXITY]
    return [f"eval_{entry_name(entry)}/{score_name(entry)}" for entry in entries]


def _entries(config: ConfigDict) -> list[dict[str, Any]]:
    """Those of data.eval; a task has its own split, and its own score if any, where it is given no others."""
    entries = configs.sources(config, "eval")
    return [_own(entry["source"]) | entry if entry["source"].startswith(TASK) else entry for entry in entries]


def _own(source: str) -> dict[str, str]:
    """The options of a task's entry."""
    has_score = hasattr(registry.get(source.removeprefix(TASK)), "score")
    return {"split": "test"} | ({"score": TASK_SCORE} if has_score else {})


def best_metric(config: ConfigDict) -> tuple[str | None, str]:
    """What decides unless config.evaluate.best does, and "max" or "min": the first score, else the held-out loss."""
    if names := metric_names(config):
        return names[0], "max"
    entries = configs.sources(config, "eval")
    if entries and all(entry.get("score") == PERPLEXITY for entry in entries) and not config.data.holdout:
        return f"eval_{entry_name(entries[0])}/{PERPLEXITY}", "min"
    return ("eval_loss" if configs.evaluates(config) else None), "min"


def entry_name(entry: dict[str, Any]) -> str:
    source, split = entry["source"], entry.get("split")
    if source.startswith(TASK):
        return source.removeprefix(TASK).rpartition("/")[2] + (f"[{split}]" if split != "test" else "")
    path = source.partition("?")[0].removeprefix("hf:").removeprefix("tfds:").rstrip("/")
    return (PurePath(path).name.partition(".")[0] or source) + (f"[{split}]" if split else "")


def score_name(entry: dict[str, Any]) -> str:
    kind, _, name = entry["score"].partition(":")
    return kind if kind in (REWARD, GRADER) and name else entry["score"].rpartition(":")[2]
