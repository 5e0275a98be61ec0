"""What a model has forgotten: general text, and the task's own prompts, with the tuned variables and with the base.

The base is what training started from (`objectives/reference.py`), however it trains.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ftjax import assemble, tree
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.data.batch.loader import Loader
from ftjax.data.tokens.chat import render_prompt
from ftjax.evals import general, instructions, multiple_choice
from ftjax.evals.divergence import divergences
from ftjax.evals.drift import drift
from ftjax.evals.general import METRICS, Text
from ftjax.evals.intervals import interval
from ftjax.evals.likelihood import Item, log_likelihoods
from ftjax.models.decoder import Decoder
from ftjax.objectives.reference import REFERENCE, frozen_with_reference, policy_and_reference
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.tree import Tree

LONGEST = 64  # tokens of a text or a prompt during training
PROMPTS = 8  # of the task during training
ANSWER = 64  # tokens of an answer whose form is checked, at most
LITTLE, MUCH = 0.05, 0.2  # nats per token: less is little, more is much; perplexity is then 5 % and 22 % higher

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


def prompts_of(loader: Loader | None, most: int = 1000) -> list[np.ndarray]:
    """The prompts of `most` held-out rows at most, int32 [n] each: what precedes the first trained token, and of a
    `text` row, which has none, all of it."""
    prompts = []
    for index in _spread(range(len(loader.examples)), most) if loader is not None else []:
        tokens, trained, _ = loader.examples.documents_of(index)[0]
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
        self._prompts = _prompt_items(_spread(prompts, PROMPTS), LONGEST) if texts else []
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


def forgetting(
    base: Base,
    tuned: Tree,
    reference: Tree,
    texts: Sequence[Text],
    prompts: Sequence[np.ndarray] = (),
    answers: Sequence[np.ndarray] = (),
    abilities: bool = False,
    layers: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """What the tuned model has forgotten, in the form of "forgetting" in evaluation.json; plain JSON values.

    Called alike by every process of a run, under `jax.set_mesh`.

    Args:
      tuned, reference: variables of `base.model`: those of a run, and those that it began with (`reference_of`).
      texts: general text, such as `general.read([{"source": "general"}], tokenizer, positions)`.
      prompts: token ids of the task's held-out prompts, int32 [n] each. `kl` is the mean over the last LONGEST tokens
        of each, as during training.
      answers: what the base generated for each prompt, int32 [n] each. With them there is also `kl_of_answers`, the
        mean over their tokens: an estimate of what "RL's Razor" finds to predict forgetting, per token.
      abilities: also multiple choice by log-likelihood and checks of the form of generated answers, of what ships.
      layers: also how far the weights of each layer moved.
      on_progress: called with (what is measured, done, all of it) after each batch.

    Returns:
      "categories": [{"name", "language", "tokens", "texts", "base", "tuned"}], nats per token, each text counting
      alike; "base", "tuned", "change" of all texts, and the "interval" of the change (95 %, bootstrap over texts);
      "kl", "kl_of_answers": KL(base || tuned), nats per token, null without prompts or answers; "abilities":
      [{"name", "examples", "base", "tuned", "change", "interval"}], shares that are right; "drift": [{"layer",
      "relative"}], and "drift_outside": [{"name", "relative"}] of what is trained outside the layers; "verdict".
    """

    def progress(what: str) -> OnProgress:
        return lambda done, total: on_progress(what, done, total)

    model = base.model
    before = losses(model, reference, texts, progress("general text, base"))
    after = losses(model, tuned, texts, progress("general text, tuned"))
    of_base, of_tuned, changes = by_category(texts, before), by_category(texts, after), after - before
    out = {
        "categories": [
            {
                "name": name,
                "language": ", ".join(dict.fromkeys(text.language for text in texts if text.category == name)),
                "tokens": sum(text.tokens for text in texts if text.category == name),
                "texts": sum(text.category == name for text in texts),
                "base": of_base[name],
                "tuned": of_tuned[name],
            }
            for name in of_base
        ],
        "base": float(before.mean()),
        "tuned": float(after.mean()),
        "change": float(changes.mean()),
        "interval": interval(changes),
        "kl": _kl(model, tuned, reference, _prompt_items(prompts, LONGEST), progress("KL on prompts")),
        "kl_of_answers": None,
    }
    if answers:
        pairs = [Item(*pair) for pair in zip(prompts, answers, strict=True) if len(pair[1])]
        out["kl_of_answers"] = _kl(model, tuned, reference, pairs, progress("KL on the base's answers"))
    if abilities:
        out["abilities"] = [
            _ability(
                name,
                measure(base, reference, progress(f"{name}, base")),
                measure(base, tuned, progress(f"{name}, tuned")),
            )
            for name, measure in (("multiple choice", _multiple_choice), ("instructions", _instructions))
        ]
    if layers:
        of_layers, outside = drift(model.spec, tuned, reference)
        out["drift"] = [{"layer": layer, "relative": value} for layer, value in of_layers.items()]
        out["drift_outside"] = [{"name": name, "relative": value} for name, value in outside.items() if value]
    return out | {"verdict": verdict(out)}


def verdict(found: Mapping[str, Any]) -> str:
    """What `forgetting` found, in words."""
    change, bounds = found["change"], found["interval"]
    worst = max(found["categories"], key=lambda its: its["tuned"] - its["base"])
    at_worst = worst["tuned"] - worst["base"]
    text = f"general text: {change:+.3f} nats per token" + (f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]" if bounds else "")
    if at_worst > 0 and len(found["categories"]) > 1:
        text += f", most in {worst['name']} ({at_worst:+.3f})"
    if change <= 0:
        said = "nothing was forgotten"
    elif bounds and bounds[0] <= 0:
        said = "no forgetting can be told from chance"
    else:
        said = ("little" if change < LITTLE else "something" if change < MUCH else "much") + " was forgotten"
    lost = [
        f"{its['name']} {its['base']:.0%} -> {its['tuned']:.0%}"
        for its in found.get("abilities", ())
        if its["interval"] and its["interval"][1] < 0
    ]
    return f"{text}: {said}" + (f"; worse at {', '.join(lost)}" if lost else "")


def reference_of(config: ConfigDict, base: Base, variables: Tree) -> Tree:
    """The variables that a run began with, of its config and those that `assemble.load_run` gives.

    They share what was not trained. Where training began with more than fresh LoRA, what was trained is read again, as
    it was then. To be called under `jax.set_mesh` with the mesh of the variables.
    """
    mesh = jax.sharding.get_mesh()
    abstract, is_trained = assemble.abstract_variables(config, base.model, mesh)
    if assemble.starts_as_base(config, tree.partition(abstract, is_trained)[0]):
        return policy_and_reference(variables)[1]
    # Fresh DoRA and PiSSA are made of the kernels that they adapt, so those are read as well.
    wanted = is_trained if config.adapter.kind == "none" else lambda path: True
    initial = tree.partition(assemble.load_variables(config, base, abstract, wanted), is_trained)[0]
    return policy_and_reference(frozen_with_reference(variables, initial))[1]


def _kl(model: Decoder, tuned: Tree, reference: Tree, items: Sequence[Item], on_progress: OnProgress) -> float | None:
    """The mean over all tokens; None without any."""
    if not items:
        return None
    return float(np.concatenate(divergences(model, tuned, reference, items, on_progress)).mean())


def _ability(name: str, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """before, after: float [examples], 1 where it is right, else 0."""
    shares = {"base": float(before.mean()), "tuned": float(after.mean()), "change": float((after - before).mean())}
    return {"name": name, "examples": len(before)} | shares | {"interval": interval(after - before)}


def _multiple_choice(base: Base, variables: Tree, on_progress: OnProgress) -> np.ndarray:
    questions = multiple_choice.read([multiple_choice.SHIPPED])
    chosen = multiple_choice.choose(base.model, variables, base.tokenizer, questions, on_progress).by_sum
    return (chosen == [question.answer for question in questions]).astype(float)


def _instructions(base: Base, variables: Tree, on_progress: OnProgress) -> np.ndarray:
    wanted = instructions.shipped()
    prompts = [render_prompt(one.prompt, base.tokenizer) for one in wanted]
    ends = base.end_tokens
    done = generate(base.model, variables, prompts, ANSWER, ends, Sampling(), len(wanted), on_progress)
    texts = [base.tokenizer.decode(completion.tokens, skip_special_tokens=True) for completion in done]
    return np.array([float(instructions.follows(text, one)) for text, one in zip(texts, wanted, strict=True)])
