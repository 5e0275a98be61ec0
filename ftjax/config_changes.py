"""What of a config may be another when a run goes on."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from ftjax import config as configs

# Keys that may differ between a run and its resumption: they change nothing that is learned.
FREE_TO_CHANGE = (
    "log_every",
    "trackers",
    "checkpoint_every",
    "checkpoint.",
    "evaluate.",
    "rollouts.batch_size",
    "eval_every",
    "accumulate",
    "eval_epochs",
    "mesh.",
    "model.remat",
    "model.attention",
    "model.matmul",
    "data.eval",
    "data.checks",
    "max_hours",
    "export_formats",
    "data.long_text",  # the tokens decide whether a run may go on
)

# Keys that may differ as well, with consequences that a run says (`resume.going_on`).
LENGTH = ("steps", "epochs")


def changes(saved: ConfigDict, now: ConfigDict, places: Sequence[str] = configs.PLACES) -> list[str]:
    """What differs in a way that a resumed run must not differ: ["adapter.rank: 16 -> 8", ...].

    places: the keys of PLACES whose contents are known to be compared, so that their names need not be.
    """
    before, after = (configs.flat(ConfigDict(configs.as_json(config))) for config in (saved, now))
    # How evenly experts are loaded is a product of means, of each micro-batch.
    balanced = any(after[f"objective.{key}"] for key in ("router_balance", "router_z_loss"))
    free = tuple(key for key in FREE_TO_CHANGE if key != "accumulate" or not balanced)
    keys = [key for key in after if key not in (*places, *LENGTH) and not key.startswith(free)]
    return [f"{key}: {before[key]!r} -> {after[key]!r}" for key in keys if before[key] != after[key]]
