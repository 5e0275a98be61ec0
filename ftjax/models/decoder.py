"""The decoder: embedding, scanned stacks of blocks (groups.py says which), final norm, head."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ftjax.models import onednn
from ftjax.models.altup import AltUp, Laurel, Streams, others_added
from ftjax.models.attention import seen_until
from ftjax.models.attention_layer import Attention, Context, blanked, norm_of
from ftjax.models.beside import mixture_beside
from ftjax.models.cache import Both, Cache, InPlace, State, write
from ftjax.models.delta import GatedConvolution, GatedDelta
from ftjax.models.groups import Group, Stack, groups, nested, stacks
from ftjax.models.kernels import choose
from ftjax.models.layers import Embedding, Linear, scaled
from ftjax.models.lent import lenders, lends, lent
from ftjax.models.mamba import Mamba2
from ftjax.models.mlp import MLP, Mixture
from ftjax.models.neftune import noise
from ftjax.models.perlayer import PerLayerInputs, gated
from ftjax.models.remat import REMAT_POLICIES
from ftjax.models.rope import sequence_lengths, table_of_layers, tables
from ftjax.models.routing import NOTES
from ftjax.models.spec import DecoderSpec
from ftjax.models.tower import Tower
from ftjax.models.vision import Images, last_seen, with_images
from ftjax.quant import STACKS
from ftjax.sharding import constrain

MLP_BLOCK = 1024  # tokens of a row at a time in the MLP, where memory matters more than speed
NO_WINDOW = 2**30  # for a layer that sees all, where others have a window


class Block(nn.Module):
    """One layer, shaped for `nn.scan`: (x, this layer's cache, what is its own) -> (x, what of it is new)."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel: str
    mlp_block: int | None  # see MLP

    @nn.compact
    def __call__(self, x, layer_cache, layer, context):
        spec, dtypes = self.spec, (self.dtype, self.param_dtype)

        def norm(name, wanted, x):
            return norm_of(spec, *dtypes, name)(x) if wanted else x

        # Hugging Face calls the norm before the MLP by another name where there is one after attention as well.
        before_mlp = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
        x = checkpoint_name(constrain(x, "batch", "length", "width"), "layer_input")
        x = blanked(x, context.there)
        if spec.altup is not None:
            altup = AltUp(spec, *dtypes, name="altup")
            predicted, x = altup.predict(x)
        new = None
        if spec.only != "mlp":
            before = norm("input_layernorm", spec.pre_norms, x)
            out, new = self._mixed(before, layer_cache, layer, context)
            x = x + scaled(norm("post_attention_layernorm", spec.post_norms, out), spec.residual_scale)
        if spec.laurel_rank is not None:
            x = (x + Laurel(spec, *dtypes, name="laurel")(before)) * jnp.asarray(2.0**-0.5, self.dtype)
        if spec.only != "mixer":
            before = before if spec.parallel else norm(before_mlp, spec.pre_norms, x)
            out = self._fed_forward(x, before, context.segment_ids)
            x = x + scaled(norm("post_feedforward_layernorm", spec.post_norms, out), spec.residual_scale)
        if spec.altup is not None:
            streams, x = altup.correct(predicted, x)
            x = others_added(streams, gated(spec, dtypes, x, layer["per_layer"]))
        elif spec.per_layer is not None:
            x = x + gated(spec, dtypes, x, layer["per_layer"])
        if spec.layer_scalar:
            init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
            x = x * jax.lax.stop_gradient(self.param("layer_scalar", init, (1,), self.param_dtype)).astype(self.dtype)
        return constrain(x, "batch", "length", "width"), new

    def _mixed(self, x, layer_cache, layer, context):
        """What attention gives, or what is in its place or beside it: [B, T, D], and what is new for the cache."""
        spec, dtypes, factors = self.spec, (self.dtype, self.param_dtype), self.spec.multipliers
        attended, state = layer_cache if isinstance(layer_cache, Both) else (layer_cache, layer_cache)
        if spec.delta:
            return GatedDelta(spec, *dtypes, name="linear_attn")(x, state, context)
        if spec.convolution:
            return GatedConvolution(spec, *dtypes, name="conv")(x, state, context)
        parts, new = [], []
        if spec.mamba:
            out, its = Mamba2(spec, *dtypes, name="mamba")(scaled(x, factors.mamba_in), state, context)
            parts, new = [scaled(out, factors.mamba_out)], [its]
        if spec.attends:
            attention = Attention(spec, *dtypes, self.kernel, name="self_attn")
            out, its = attention(scaled(x, factors.attention_in), attended, layer, context)
            parts, new = [*parts, scaled(out, factors.attention_out)], [its, *new]
        return sum(parts[1:], start=parts[0]), Both(*new) if len(new) > 1 else new[0]

    def _fed_forward(self, x, before, segment_ids):
        """What the MLP or the mixture gives of `before`, which is x under its norm."""
        spec, dtypes = self.spec, (self.dtype, self.param_dtype)
        if spec.experts and spec.experts.beside:
            return mixture_beside(spec, dtypes, x, before, segment_ids, self.mlp_block)
        if spec.experts:
            return Mixture(spec, *dtypes, name="mlp")(before, segment_ids)
        return MLP(spec, *dtypes, block=self.mlp_block, name="mlp")(before)


class InOrder(nn.Module):
    """Unlike layers or groups of layers, one after the other, each under its own name; to be called as a Block is.

    parts: (name, what makes the module of that name) of each; lend: a function of a part's cache and what it returns
    for each, to what later parts may use of it (`Context.lent`), where there is such.
    """

    parts: tuple[tuple[str, Callable[..., nn.Module]], ...]
    lend: tuple[Callable[[Any, Any], dict[int, Any]], ...] = ()

    @nn.compact
    def __call__(self, x, caches, layers, context):
        """caches, layers: a tuple with what each part takes. Returns x and a tuple of what each returns beside it."""
        out = []
        for number, ((name, make), cache, layer) in enumerate(zip(self.parts, caches, layers, strict=True)):
            x, new = make(name=name)(x, cache, layer, context)
            out.append(new)
            if self.lend:
                context = context._replace(lent=context.lent | self.lend[number](cache, new))
        return x, tuple(out)


class Decoder(nn.Module):
    """A decoder-only language model, which also reads images where its spec has `vision`.

    `apply({"params": p}, ...)` is the base model; with a `lora` collection beside it, the adapted one. Quantized
    kernels are in a `quant` collection. Adapters drop inputs out where `apply` gets an rng called "dropout".
    dtype: of activations and matrix products (norms, softmax, routing and logits are float32 regardless); param_dtype:
    of stored parameters; remat: one of REMAT_POLICIES; attention: config.model.attention, see kernels.py; neftune: the
    alpha of noise on the embeddings, which like adapters' dropout is there where `apply` gets the rng "dropout";
    matmul: config.model.matmul, of the products with kernels, see onednn.py; shares: whether documents of whole
    rows may share what they begin with, see attention.seen_until.
    """

    spec: DecoderSpec
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    neftune: float = 0.0
    matmul: str = "xla"
    shares: bool = False

    def setup(self):
        spec, dtypes = self.spec, (self.dtype, self.param_dtype)
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size, *dtypes)
        if spec.learned_positions:
            self.embed_positions = Embedding(spec.max_position_embeddings, spec.hidden_size, *dtypes, row_axis=None)
        shared = (*dtypes, self.attention, MLP_BLOCK if self._saves_memory() else None)
        parts = groups(spec)
        scans = [(group.name, functools.partial(_scan, group, shared, self.remat)) for group in parts]
        lend = tuple(functools.partial(lent, spec, group) for group in parts)
        self.layers = scans[0][1]() if len(scans) == 1 else InOrder(tuple(scans), lend)
        if spec.per_layer is not None:
            self.per_layer = PerLayerInputs(spec, *dtypes)
        if spec.altup is not None:
            self.altup = Streams(spec, *dtypes)
        if spec.vision is not None:
            self.vision = Tower(spec.vision, spec.hidden_size, *dtypes, self.remat)
        self.norm = norm_of(spec, *dtypes, None)
        if not spec.tie_word_embeddings:
            head = {"out_dtype": jnp.float32, "use_bias": spec.head_bias}
            self.lm_head = Linear(spec.vocab_size, ("embed", "vocab"), *dtypes, **head)

    def _saves_memory(self) -> bool:
        """Whether the MLP goes over a row in blocks: where memory is short, and only when kernels are frozen.

        Otherwise each block would all-reduce kernel gradients.
        """
        return self.remat in ("full", "offload") and bool(self.variables.get("lora"))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: Cache | None = None,
        images: Images | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """tokens, positions, segment_ids: int32 [B, T] (segment 0 is padding; the tokens of a segment lie one after the
        other, at positions that count up by one). images: of these tokens, those of an image all at once.

        With a cache, a row is one segment, which goes on after what is in the cache. Returns the hidden states after
        the final norm, [B, T, D] (see `unembed`), and the cache with these tokens in.
        """
        if cache is None:
            # Layers return their keys and values where later ones use them.
            x, _ = self._hidden(
                tokens, positions, segment_ids, images, lambda stack: () if lends(self.spec, stack) else None, None
            )
            return x, None
        attending = (stack for stack in stacks(self.spec) if stack.spec.attends and stack.spec.kv_layer is None)
        leaves = zip(*map(jax.tree.leaves, (cache.keys, cache.values)), strict=True)
        pairs = {stack.path: pair for stack, pair in zip(attending, leaves, strict=True)}
        states = iter(jax.tree.leaves(cache.states, is_leaf=_is_state))
        in_place = pairs if tokens.shape[1] == 1 and self._reads_in_place() else {}

        def cached(stack: Stack) -> Any:
            if stack.spec.kv_layer is not None:
                return ()
            pair = pairs.get(stack.path)
            if stack.path in in_place:
                pair = InPlace(stack.path, jnp.arange(len(stack.layers), dtype=jnp.int32))
            of = [part for part in (pair, next(states) if stack.spec.carries else None) if part is not None]
            return Both(*of) if len(of) > 1 else next(iter(of), None)

        x, new = self._hidden(tokens, positions, segment_ids, images, cached, cache.reach, in_place)
        places = (positions, segment_ids)
        keys, values, states = _parted(new)
        cache = cache.replace(
            states=states,
            keys=jax.tree.map(lambda old, fresh: write(old, fresh, *places), cache.keys, keys),
            values=jax.tree.map(lambda old, fresh: write(old, fresh, *places), cache.values, values),
        )
        return x, cache

    def _reads_in_place(self) -> bool:
        """Whether the next token finds the keys of those before where they lie; not where layers lend theirs."""
        if self.matmul != "onednn" or self.dtype != jnp.float32 or lenders(self.spec):
            return False
        mesh = jax.sharding.get_abstract_mesh()
        return choose(self.attention, self.spec, self.dtype, 1, mesh, self.matmul).name == "onednn"

    def prefill(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        reach: jax.Array,
        images: Images | None = None,
    ) -> tuple[jax.Array, tuple[Any, Any, Any]]:
        """`__call__` without a cache, by the same kernels as training, that returns what a cache would hold.

        A row is one segment, padded on the right. reach: int32 [B], see Cache. Beside the hidden states: keys, values
        [layers, B, kv_heads, T, d] and states of each stack, as Cache has them.
        """
        x, new = self._hidden(tokens, positions, segment_ids, images, lambda stack: (), reach)
        return x, _parted(new)

    def _hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        images: Images | None,
        cache_of: Callable[[Stack], Any],
        reach: jax.Array | None,
        in_place: dict[str, tuple[jax.Array, jax.Array]] | None = None,
    ) -> tuple[jax.Array, Any]:
        """[B, T, D] after the final norm, and what the layers return beside it.

        reach: None where rows are whole. in_place: see Context.cached.
        """
        spec = self.spec
        with onednn.used(self.matmul == "onednn"):
            x = self.embed_tokens(tokens)
            if self.neftune and self.has_rng("dropout"):
                added = noise(self.make_rng("dropout"), positions, segment_ids, spec.hidden_size, self.neftune)
                x = x + added.astype(self.dtype)
            x = scaled(x, spec.embedding_scale)
            last, turned_by = None, positions
            if images is not None and images.patches is not None:
                x = with_images(spec.vision, x, tokens, self.vision(images))
                last = last_seen(spec.vision, tokens, positions, segment_ids) if spec.vision.two_way else None
            if images is not None and images.rope_positions is not None:
                turned_by = images.rope_positions
            if spec.learned_positions:
                x = x + self.embed_positions(positions)
            x = constrain(x, "batch", "length", "width")
            of_rows = (lambda: sequence_lengths(positions, segment_ids)) if reach is None else (lambda: reach[:, None])
            until = seen_until(positions, segment_ids) if self.shares and reach is None else None
            there = segment_ids > 0 if self.matmul == "onednn" and reach is not None else None
            turns = tables(spec, turned_by, of_rows)
            context = Context(positions, segment_ids, turns, {}, in_place or {}, last, until, there)
            parts = None if spec.per_layer is None else self.per_layer(tokens, x)
            own = nested(spec, lambda stack: _per_layer(stack) | _own_part(stack, parts))
            x = x if spec.altup is None else self.altup.split(x)
            x, new = self.layers(x, nested(spec, cache_of), own, context)
            return self.norm(x if spec.altup is None else self.altup.joined(x)), new

    def unembed(self, hidden: jax.Array, token_index: jax.Array | None = None) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., vocab]; token_index: int32 [...], as in layers.Linear."""
        spec = self.spec
        with onednn.used(self.matmul == "onednn"):
            tied = spec.tie_word_embeddings
            logits = self.embed_tokens.attend(hidden) if tied else self.lm_head(hidden, token_index)
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        if spec.logit_softcap is not None:
            logits = spec.logit_softcap * jnp.tanh(logits / spec.logit_softcap)
        return logits

    def init_all(self, tokens: jax.Array) -> None:
        """For `init` only: touches every parameter, the untied head included."""
        ones, images, vision = jnp.ones_like(tokens), None, self.spec.vision
        if vision is not None:
            shape = (len(tokens), vision.merge**2)
            patches = jnp.zeros((*shape, 3 * vision.patch**2), jnp.uint8)
            images = Images(patches, jnp.zeros((*shape, 2), jnp.int32), jnp.ones(shape, jnp.int32))
        self.unembed(self(tokens, ones, ones, images=images)[0])


def _is_state(part: Any) -> bool:
    return isinstance(part, State)


def _parted(new: Any) -> tuple[Any, Any, Any]:
    """`nested` (keys, values), State or Both -> nested keys, nested values, nested states; None where a stack has none,
    () where it uses another's.
    """

    def is_of_stack(part: Any) -> bool:
        return isinstance(part, State | Both) or (bool(part) and isinstance(part[0], jax.Array))

    def parts(part: Any) -> tuple[Any, Any, Any]:
        if isinstance(part, Both):
            return *part.attended, part.state
        return (None, None, part) if _is_state(part) else (*part, None)

    def each(place: int) -> Any:
        return jax.tree.map(lambda part: parts(part)[place], new, is_leaf=is_of_stack)

    return each(0), each(1), each(2)


def _scan(group: Group, shared: tuple[Any, ...], remat: str, name: str | None = None) -> nn.Module:
    """The layers of a group as one module, to be called as a Block is: its parameters, and what it takes and returns
    for each layer, have the group's rounds in front. shared: of a Block's arguments those after the spec.
    """
    policy, rounds = REMAT_POLICIES[remat], len(group.stacks[0].layers)
    # Inside a scan XLA cannot undo the rematerialization, so its guard against that would only cost time; but of one
    # round it makes no loop. Each layer of a period is rematerialized on its own, so that one is held at a time.
    block = nn.remat(Block, policy=policy, prevent_cse=rounds == 1) if policy else Block
    if len(group.stacks) == 1:
        body, arguments = block, (group.stacks[0].spec, *shared)
    else:
        parts = ((stack.name, functools.partial(block, stack.spec, *shared)) for stack in group.stacks)
        body, arguments = InOrder, (tuple(parts),)
    scan = nn.scan(
        body,
        variable_axes={"params": 0, "lora": 0, "quant": 0, NOTES: 0},
        variable_broadcast=STACKS,  # whole in each layer
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, 0, nn.broadcast),
        length=rounds,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scan(*arguments, name=name)


def _per_layer(stack: Stack) -> dict[str, jax.Array]:
    """Arrays [layers] of what the layers of a stack differ in; what is the same in all of them is static instead."""
    spec = stack.spec
    out = {
        "rope": table_of_layers(spec),
        "window": [NO_WINDOW if window is None else window for window in spec.layer_windows],
        "chunk": [NO_WINDOW if chunk is None else chunk for chunk in spec.layer_chunks],
        "scale": list(spec.attention_scales),
    }
    return {name: jnp.asarray(values) for name, values in out.items() if len(set(values)) > 1}


def _own_part(stack: Stack, parts: jax.Array | None) -> dict[str, jax.Array]:
    """What the layers of a stack get of `parts` [layers, B, T, width]."""
    first, last = stack.layers[0], stack.layers[-1]
    step = max(1, (last - first) // max(1, len(stack.layers) - 1))
    return {} if parts is None else {"per_layer": parts[first : last + 1 : step]}
