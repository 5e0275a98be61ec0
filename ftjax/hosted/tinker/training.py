"""A model in training: its adapter, gradients that have come together, the optimizer's moments; and what is compiled.

The programs are one for each shape of a batch and rank of an adapter, for all models over the base, whose arrays they
share. Log-probabilities are `objectives/logps.py`'s, as every objective has them.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax import lora, sharding, tree
from ftjax.assemble import Base
from ftjax.hosted.refusals import Refused
from ftjax.hosted.tinker import batches
from ftjax.hosted.tinker.losses import LOSSES
from ftjax.hosted.tinker.wire import NOTHING, Datum, Topk
from ftjax.models.params import abstract_params, logical_axes, shapes
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import token_logps
from ftjax.tree import Tree

ALPHA = 32.0  # of every adapter, as Tinker's are: https://thinkingmachines.ai/blog/lora
BLOCK = 64  # positions of a prompt whose logits are there at a time
_RATE = 1e-4


class Shape(NamedTuple):
    """What an adapter adapts, and of which rank."""

    rank: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


class Adam(NamedTuple):
    """The settings of one step, with the defaults of Tinker's client: torch.optim.AdamW's, but for two of them."""

    learning_rate: float = _RATE
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class Moments(NamedTuple):
    """What Adam keeps: means of gradients and of their squares, trees like the adapter's, and the number of steps."""

    mean: Tree
    square: Tree
    steps: int


class Programs:
    """What is compiled, over one base.

    Args:
      base: see adapted.load_model.
      params: those of the base, on a mesh; they are read, never donated.
      tokens: of a batch that is computed at a time, see `batches.padded`.
      longest: the most tokens of a datum; of a model of fewer positions, these.
      turns: held while anything is computed, where other threads compute on the same devices.
    """

    def __init__(
        self,
        base: Base,
        params: Tree,
        tokens: int = 4096,
        longest: int = 32768,
        turns: contextlib.AbstractContextManager | None = None,
    ):
        self.base, self.params, self.tokens = base, params, tokens
        self._turns = turns or contextlib.nullcontext()
        self.mesh = jax.tree.leaves(params)[0].sharding.mesh
        self.longest = min(longest, base.model.spec.max_position_embeddings)
        # What a layer computes is computed again going backward, where memory is dear.
        self.model = base.model.clone(remat="none" if sharding.platform(self.mesh) == "cpu" else "full")
        self.unembed = make_unembed(self.model)
        self.forward = jax.jit(self._forward, static_argnames="loss")
        self.backward = jax.jit(self._backward, static_argnames="loss", donate_argnames="sums")
        self.update = jax.jit(_update)
        self.likeliest = jax.jit(self._likeliest, static_argnames="count")

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """What anything that is compiled is called in."""
        with self._turns, jax.set_mesh(self.mesh):
            yield

    def targets(self, shape: Shape) -> list[str]:
        """The kernels that an adapter of this shape adapts; Refused where there are none, or they are experts'."""
        found = lora.adaptable(shapes(self.model))
        kernels = [path for path in found if path.endswith("/kernel") and lora.FUSED not in path]
        if shape.train_mlp and any("/experts/" in path for path in kernels):
            raise Refused(
                "this base has experts, which have no adapters here; create the model with train_mlp=False",
                param="lora_config.train_mlp",
            )
        kinds = dict.fromkeys(_MIXERS, shape.train_attn) | {"lm_head": shape.train_unembed}
        chosen = [path for path in kernels if kinds.get(_kind(path), shape.train_mlp)]
        if not chosen:
            raise Refused("the adapter adapts nothing of this base; train more of it", param="lora_config")
        return chosen

    @property
    def ties(self) -> bool:
        """Whether the base has no unembedding of its own, so that `train_unembed` adapts nothing."""
        return self.base.model.spec.tie_word_embeddings

    def abstract(self, shape: Shape) -> Tree:
        """The adapter's arrays, described."""
        params, axes = abstract_params(self.model, self.mesh), logical_axes(self.model)
        return lora.abstract_adapters(params, axes, self.targets(shape), shape.rank, self.mesh)

    def place(self, padded: batches.Padded) -> tuple[Tree, Tree]:
        """(batch, inputs) on the devices."""
        place = functools.partial(sharding.place, self.mesh, ("batch", "length"))
        return jax.tree.map(place, padded.batch), jax.tree.map(place, padded.inputs)

    def _losses(self, adapter: Tree, params: Tree, batch: Tree, inputs: Tree, settings: Tree, loss: str) -> tuple:
        """(log p(target), losses), float32 [B, T] each, 0 at padding."""
        logps = token_logps(self.model, self.unembed, _with(params, adapter), batch, None)
        return logps, LOSSES[loss].function(logps, inputs, settings) * batch["weights"]

    def _forward(self, adapter: Tree, params: Tree, batch: Tree, inputs: Tree, settings: Tree, *, loss: str) -> tuple:
        return self._losses(adapter, params, batch, inputs, settings, loss)

    def _backward(
        self, trained: Tree, fixed: Tree, params: Tree, sums: Tree, batch: Tree, inputs: Tree, settings: Tree, *, loss
    ) -> tuple:
        """(sums and the gradients of this batch, log p(target), losses)"""

        def total(trained: Tree) -> tuple[jax.Array, tuple]:
            logps, losses = self._losses(tree.combine(trained, fixed), params, batch, inputs, settings, loss)
            return losses.sum(), (logps, losses)

        gradients, (logps, losses) = jax.grad(total, has_aux=True)(trained)
        return jax.tree.map(jnp.add, sums, gradients), logps, losses

    def _likeliest(self, adapter: Tree, params: Tree, batch: Tree, *, count: int) -> tuple[jax.Array, jax.Array]:
        """The likeliest next tokens at each position of a row, int32 [T, count], and their logps, float32."""
        variables = _with(params, adapter)
        hidden, _ = self.model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"])

        def of_block(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = self.model.apply(variables, hidden, method=self.model.unembed).astype(jnp.float32)
            return jax.lax.top_k(jax.nn.log_softmax(logits), count)

        blocks = hidden[0].reshape(-1, min(BLOCK, hidden.shape[1]), hidden.shape[-1])
        logps, tokens = jax.lax.map(of_block, blocks)
        return tokens.reshape(-1, count), logps.reshape(-1, count)


class Learner:
    """A model in training. Not for several threads at a time."""

    def __init__(self, programs: Programs, shape: Shape, adapter: Tree, moments: Moments | None = None):
        self.programs, self.shape = programs, shape
        self.trained, self.fixed = tree.partition(adapter, lambda path: _TRAINED.search(path) is not None)
        self.moments = moments or Moments(_zeros(self.trained), _zeros(self.trained), 0)
        self._sums: Tree | None = None  # of the gradients since the last step
        self._failed: str | None = None  # what went wrong since then

    @classmethod
    def begin(cls, programs: Programs, shape: Shape, seed: int) -> "Learner":
        """With a fresh adapter, with which the model is its base."""
        with programs.computing():
            adapter = lora.init_adapters(programs.abstract(shape), seed, lora.scale(shape.rank, ALPHA, rslora=False))
        return cls(programs, shape, adapter)

    @property
    def gradients(self) -> Tree | None:
        """Their sum since the last step, a tree like `trained`; None where there are none."""
        return self._sums

    @property
    def adapter(self) -> Tree:
        """As lora.py has them."""
        return tree.combine(self.trained, self.fixed)

    def run(
        self, data: Sequence[Datum], loss: str, settings: Mapping[str, float], forward_only: bool = False
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
        """Forward, and backward unless `forward_only`: the gradients are added to those since the last step.

        Returns of each datum its `logprobs` and `elementwise_loss`, float32 [n], and the metrics of all.

        Raises:
          Refused: data that the loss cannot be computed of, or a loss that is infinite or no number. Nothing is added
            then, and the next step is refused.
        """
        try:
            return self._run(data, loss, settings, forward_only)
        except Exception as error:
            if not forward_only:
                self.fail(str(error) if isinstance(error, Refused) else "the server failed")
            raise

    def fail(self, why: str) -> None:
        """Says that a gradient which was asked for is not there."""
        self._failed = self._failed or why

    def step(self, settings: Adam) -> dict[str, float]:
        """One step of AdamW by the gradients since the last one; returns its metrics.

        Raises:
          Refused: there are none, not all that were asked for, or they are no numbers; the adapter stays as it is, and
            the gradients are dropped.
        """
        sums, failed, self._sums, self._failed = self._sums, self._failed, None, None
        if failed is not None:
            raise Refused(f"a forward_backward before this step failed, so that there is no step: {failed}")
        if sums is None:
            raise Refused("there is no gradient: call forward_backward before optim_step")
        state = self.moments
        with self.programs.computing():
            trained, mean, square, norm = self.programs.update(
                self.trained, state.mean, state.square, np.int32(state.steps), sums, settings
            )
        if not np.isfinite(norm := float(norm)):
            raise Refused("the gradient is infinite or no number; there is no step")
        self.trained, self.moments = trained, Moments(mean, square, state.steps + 1)
        return {"grad_norm": norm}

    def _run(self, data, loss, settings, forward_only):
        programs, of_name = self.programs, batches.find_loss(loss)
        settings = {name: np.float32(value) for name, value in settings.items()}
        outputs: list[dict[str, np.ndarray]] = [{} for _ in data]
        with programs.computing():
            sums = None if forward_only else _zeros(self.trained)
            for padded in batches.padded(data, of_name, programs.tokens, sharding.row_parts(programs.mesh)):
                placed = *programs.place(padded), settings
                if forward_only:
                    logps, losses = programs.forward(self.adapter, programs.params, *placed, loss=loss)
                else:
                    sums, logps, losses = programs.backward(
                        self.trained, self.fixed, programs.params, sums, *placed, loss=loss
                    )
                logps, losses = np.asarray(logps), np.asarray(losses)
                for row, index in enumerate(padded.rows):
                    its = row, slice(0, len(data[index].tokens))
                    outputs[index] = {"logprobs": logps[its], "elementwise_loss": losses[its]}
            for index, output in enumerate(outputs):
                if not np.isfinite(output["elementwise_loss"]).all():
                    raise Refused(f"the loss of data[{index}] is infinite or no number", param=f"data[{index}]")
            if not forward_only:
                self._sums = sums if self._sums is None else jax.tree.map(jnp.add, self._sums, sums)
        total = sum(float(output["elementwise_loss"].sum(dtype=np.float64)) for output in outputs)
        return outputs, {"loss:sum": total}


def prompt_logps(
    programs: Programs, adapter: Tree | None, tokens: np.ndarray, likeliest: int = 0
) -> tuple[np.ndarray, Topk | None]:
    """How likely each token of a prompt is after those before it, float32 [n], NaN for the first; and what would be
    likeliest in its place, where that many are asked for.

    adapter: None for the base.
    """
    datum = Datum(tokens, {batches.TARGETS: np.append(tokens[1:], 0)})
    [padded] = batches.padded([datum], LOSSES["cross_entropy"], 1, sharding.row_parts(programs.mesh))
    with programs.computing():
        batch, inputs = programs.place(padded)
        logps, _ = programs.forward(adapter or {}, programs.params, batch, inputs, {}, loss="cross_entropy")
        found = np.concatenate([[np.nan], np.asarray(logps)[0, : len(tokens) - 1]]).astype(np.float32)
        if not likeliest:
            return found, None
        ids, their = programs.likeliest(adapter or {}, programs.params, batch, count=likeliest)
    ids, their = (np.asarray(leaf)[: len(tokens) - 1] for leaf in (ids, their))
    nothing = np.zeros((1, likeliest), np.int32), np.full((1, likeliest), NOTHING, np.float32)
    return found, Topk(np.concatenate([nothing[0], ids]), np.concatenate([nothing[1], their]))


_MIXERS = ("self_attn", "linear_attn", "conv", "mamba")  # attention, and what some layers have in its place
_TRAINED = re.compile(r"/lora_(a|b)$")


def _kind(path: str) -> str:
    return next((part for part in path.split("/") if part in (*_MIXERS, "lm_head")), "mlp")


def _with(params: Tree, adapter: Tree) -> Tree:
    return {"params": params} | ({"lora": adapter} if adapter else {})


def _zeros(like: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, device=leaf.sharding), like)


def _update(trained: Tree, mean: Tree, square: Tree, steps: Any, sums: Tree, settings: Adam) -> tuple:
    """(adapter, mean, square, global norm before clipping) after a step of torch.optim.AdamW."""
    norm = optax.tree.norm(sums)
    clip = settings.grad_clip_norm
    factor = jnp.where((clip > 0) & (norm > clip), clip / norm, 1.0)
    gradients = jax.tree.map(lambda leaf: leaf * factor, sums)
    adam = optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps)
    direction, state = adam.update(gradients, optax.ScaleByAdamState(steps, mean, square), trained)

    def moved(leaf: jax.Array, towards: jax.Array) -> jax.Array:
        return leaf - settings.learning_rate * (towards + settings.weight_decay * leaf)

    return jax.tree.map(moved, trained, direction), state.mu, state.nu, norm
