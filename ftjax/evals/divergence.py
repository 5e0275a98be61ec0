"""How far a model's next-token distributions are from those of the model that it was."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ftjax import sharding
from ftjax.evals.likelihood import Item, batches, placed
from ftjax.models.decoder import Decoder
from ftjax.objectives.divergence import kl_per_token
from ftjax.objectives.head import head_of, make_unembed
from ftjax.tree import Tree


def divergences(
    model: Decoder,
    tuned: Tree,
    base: Tree,
    items: Sequence[Item],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """KL(base || tuned) at every place that predicts a token of a continuation, float32 [tokens], in nats.

    Each is the exact sum over the vocabulary of p_base (log p_base - log p_tuned). Where the continuation is what the
    base wrote, their sum is an estimate of the divergence of the whole answers, with the least variance that one sample
    allows ("RL's Razor", Shenfeld et al. 2025, arXiv 2509.04259, finds that it predicts forgetting).

    tuned, base: variables of one model, which may share arrays; the rest is as in `likelihood.log_likelihoods`.
    """
    found, done = {}, 0
    for batch in batches(model, items):
        values = jax.device_get(_forward(model, tuned, base, placed(batch.arrays)))
        found.update(zip(batch.indices.tolist(), batch.of_items(values), strict=True))
        done += len(batch.indices)
        if on_progress is not None:
            on_progress(done, len(items))
    return [found[index] for index in range(len(items))]


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Decoder, tuned: Tree, base: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 [B, T]: the divergence of each place, 0 where it is not wanted."""

    def hidden(variables: Tree) -> jax.Array:
        return model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"])[0]

    ours, theirs = ((head_of(model, variables), hidden(variables)) for variables in (tuned, base))
    values = kl_per_token(make_unembed(model), None, *ours, *theirs, batch["wanted"], None)
    return sharding.constrain(values, None, None)  # whole, for every host
