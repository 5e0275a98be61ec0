"""The objectives by the names that config.objective.name gives them: each makes one from a model."""

from collections.abc import Callable

from ftjax.models.decoder import Decoder
from ftjax.objectives.loss import Objective
from ftjax.objectives.sft import make_sft

OBJECTIVES: dict[str, Callable[[Decoder], Objective]] = {"sft": make_sft}
