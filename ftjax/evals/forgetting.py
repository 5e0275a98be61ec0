"""What a model has forgotten: general text, and the task's own prompts, with the tuned variables and with the base.

The base is what training started from (`objectives/reference.py`), however it trains.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from ftjax import config as configs
from ftjax import tree
from ftjax.assemble import Base
from ftjax.data.batch.loader import Loader
from ftjax.evals import general
from ftjax.evals.divergence import divergences
from ftjax.evals.general import METRICS, Text
from ftjax.evals.likelihood import Item, log_likelihoods
from ftjax.models.decoder import Decoder
from ftjax.objectives.reference import REFERENCE, policy_and_reference
from ftjax.tree import Tree

LONGEST = 64  # tokens of a text or a prompt during training
LITTLE, MUCH = 0.02, 0.1  # nats per token: less is little, more is much (exp(0.1): perplexity is 10 % higher)

OnProgress = Callable[[int, int], None]


def losses(model: Decoder, variables: Tree, texts: Sequence[Text], on_progress: OnProgress | None = None) -> np.ndarray:
    """float64 [texts]: the mean of -log p over the tokens of each, in nats. See `likelihood.log_likelihoods`."""
    found = log_likelihoods(model, variables, [text.item for text in texts], on_progress)
    return np.array([-one.total / one.tokens for one in found])


def by_category(texts: Sequence[Text], values: np.ndarray) -> dict[str, float]:
    """{category: mean of its texts' values}, in the order in which they come."""
    groups: dict[str, list[float]] = {}
    for text, value in zip(texts, values, strict=True):
        groups.setdefault(text.category, []).append(float(value))
    return {name: float(np.mean(group)) for name, group in groups.items()}


def interval(changes: np.ndarray) -> list[float] | None:
    """The 95 % interval of the mean of `changes`, one of each text: bootstrap over texts (BCa). None for one text."""
    if len(changes) < 2:
        return None
    if np.ptp(changes) == 0:
        return [float(changes[0])] * 2
    found = stats.bootstrap((changes,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    return [float(found.low), float(found.high)]


def prompts_of(loader: Loader | None, most: int = 1000) -> list[np.ndarray]:
    """The prompts of `most` held-out rows at most, int32 [n] each: what precedes the first trained token, and of a
    `text` row, which has none, all of it."""
    prompts = []
    for index in _spread(range(len(loader.examples)), most) if loader is not None else []:
        tokens, trained = loader.examples.documents_of(index)[0]
        first = int(np.argmax(trained))
        prompts.append(tokens[:first] if first > 1 else tokens)
    return prompts


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """`most` of the values at most, evenly from all over them."""
    count = min(max(most, 1), len(values))
    return [values[len(values) * i // count] for i in range(count)]


def _prompt_items(prompts: Sequence[np.ndarray], longest: int) -> list[Item]:
    """The last `longest` tokens of each prompt, of which all but the first are predicted."""
    cut = (prompt[-longest:] for prompt in prompts)
    return [Item(prompt[:1], prompt[1:]) for prompt in cut if len(prompt) > 1]


class Watch:
    """watch(step, trainable, frozen) -> {"eval_general/...": float}, after `begin`.

    `loss`, and under its name that of each category: nats per token, each text counting alike, of at most
    config.evaluate.general_tokens tokens. `change`: that loss less the base's. `kl`: KL(base || tuned) per token of the
    task's prompts, where the base is in memory beside what is trained: always with adapters alone.

    prompts: token ids of the task's held-out prompts, see `prompts_of` for those of rows.
    """

    def __init__(self, config: ConfigDict, base: Base, prompts: Sequence[np.ndarray], on_progress: OnProgress):
        entries, tokens = configs.general_sources(config), config.evaluate.general_tokens
        self._model, self._on_progress = base.model, on_progress
        texts = general.read(entries, base.tokenizer, base.model.spec.max_position_embeddings)
        self._texts = general.within(texts, tokens, LONGEST) if texts else []
        self._prompts = _prompt_items(_spread(prompts, tokens // 2 // LONGEST), LONGEST) if texts else []
        self._of_base = None

    def begin(self, variables: Tree) -> None:
        """Measures the model that training starts from. variables: what is loaded, before anything is trained."""
        if self._texts:
            self._of_base = losses(self._model, variables, self._texts, self._on_progress)

    def __call__(self, step: int, trainable: Tree, frozen: Tree) -> dict[str, float]:
        if not self._texts:
            return {}
        tuned, base = policy_and_reference(tree.combine(trainable, frozen))
        found = self._of_base  # at step 0 there is nothing to compare yet
        if step:
            found = losses(self._model, tuned, self._texts, self._on_progress)
        out = {"loss": float(found.mean()), "change": float((found - self._of_base).mean())}
        if self._prompts and (REFERENCE in frozen or set(trainable) <= {"lora", "heads"}):
            out["kl"] = 0.0
            if step:
                found_kl = divergences(self._model, tuned, base, self._prompts, self._on_progress)
                out["kl"] = float(np.concatenate(found_kl).mean())
        return {f"{METRICS}{name}": value for name, value in (out | by_category(self._texts, found)).items()}


def in_short(metrics: Mapping[str, float]) -> str:
    """What `Watch` found, in a few words."""
    loss, change, kl = (metrics.get(METRICS + name) for name in ("loss", "change", "kl"))
    text = f"general text {loss:.3f} nats per token ({change:+.3f} by training)"
    return text if kl is None else f"{text}; on prompts {kl:.3f} from the base (KL)"
