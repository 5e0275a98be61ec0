"""What the decoder promises besides parity: cache, rematerialization, dtypes, a program that depth leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import batch_of, documents, logits, numpy_params, one_device, random_params, spec

from ftjax import tree
from ftjax.models.cache import init_cache
from ftjax.models.decoder import Decoder
from ftjax.models.params import abstract_params, logical_axes
from ftjax.models.remat import REMAT_POLICIES

MODEL = Decoder(spec())
INPUTS = ("tokens", "positions", "segment_ids")


@pytest.fixture(scope="module")
def params():
    return numpy_params(MODEL)


@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 3, 5]], ids=["equal prompts", "unequal prompts"])
def test_parts_and_single_token_steps_equal_the_full_forward(params, lengths, record_figure):
    """Prompts that go into the cache in two parts, padded on the right, and then a token of each at a time."""
    new = 5
    docs = documents(4, [length + new for length in lengths])
    full = logits(MODEL, {"params": params}, batch_of([[doc] for doc in docs], 7 + new))
    variables = {"params": params}

    @jax.jit
    def forward(variables, cache, tokens, positions, segment_ids):
        hidden, cache = MODEL.apply(variables, tokens, positions, segment_ids, cache)
        return MODEL.apply(variables, hidden, method=MODEL.unembed), cache

    # Four slots more than are ever written.
    cache = init_cache(MODEL.spec, batch=3, slots=16, dtype=jnp.float32)
    batch = batch_of([[(doc[0][:n], doc[1][:n])] for doc, n in zip(docs, lengths)], 7)
    differences = []
    for part in (slice(0, 2), slice(2, 7)):
        inputs = (batch[name][:, part] for name in ("tokens", "segment_ids"))
        tokens, segment_ids = inputs
        places = np.broadcast_to(np.arange(7, dtype=np.int32)[part], tokens.shape)
        out, cache = forward(variables, cache, tokens, places, segment_ids)
        for row, n in enumerate(lengths):
            there = min(n, part.stop) - part.start
            differences.append(np.abs(out[row, :there] - full[row, part.start : part.start + there]).max())
    for step in range(new):
        places = np.array(lengths, np.int32) + step
        tokens = np.array([doc[0][place] for doc, place in zip(docs, places)], np.int32)
        out, cache = forward(variables, cache, tokens[:, None], places[:, None], np.ones((3, 1), np.int32))
        differences += [np.abs(out[row, 0] - full[row, place]).max() for row, place in enumerate(places)]
    record_figure("logits", max(differences))
    assert max(differences) < 1e-5


def test_every_remat_policy_has_the_same_gradients(params):
    batch = batch_of([documents(5, [6, 5])], 12)

    def gradients(remat):
        model = Decoder(MODEL.spec, remat=remat)

        def total(params):
            hidden, _ = model.apply({"params": params}, *(batch[name] for name in INPUTS))
            return jnp.sum(jnp.sin(hidden))

        program = jax.jit(jax.grad(total))
        # More where the backward pass makes those of the forward pass again.
        products = str(jax.make_jaxpr(jax.grad(total))(params)).count("dot_general")
        return tree.flatten(program(params)), products

    plain, products = gradients("none")
    assert max(np.abs(leaf).max() for leaf in plain.values()) > 0.1
    assert set(REMAT_POLICIES) == {"none", "full", "offload"}
    again = {}
    for remat in ("full", "offload"):
        other, again[remat] = gradients(remat)
        for path in plain:
            np.testing.assert_allclose(other[path], plain[path], rtol=0, atol=1e-5, err_msg=path)
    assert products < again["full"] == again["offload"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_bfloat16_computes_close_to_float32_and_returns_float32_logits(tied):
    sizes = spec(tie_word_embeddings=tied)
    params = numpy_params(Decoder(sizes))
    batch = batch_of([documents(6, [12])], 12)
    model = Decoder(sizes, dtype=jnp.bfloat16)
    hidden, _ = jax.eval_shape(lambda: model.apply({"params": params}, *(batch[name] for name in INPUTS)))
    assert hidden.dtype == jnp.bfloat16
    half = logits(model, {"params": params}, batch)
    assert half.dtype == np.float32
    difference = np.abs(half - logits(Decoder(sizes), {"params": params}, batch)).max()
    assert 1e-4 < difference < 0.2


def test_param_dtype_is_that_of_every_parameter():
    abstract = abstract_params(Decoder(MODEL.spec, param_dtype=jnp.bfloat16), one_device())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract)} == {"bfloat16"}


def test_the_program_does_not_grow_with_depth():
    """As many StableHLO operations in the gradient of eight layers as in that of two."""

    def operations(layers):
        model = Decoder(spec(num_hidden_layers=layers), remat="full")
        tokens = jnp.zeros((2, 8), jnp.int32)

        def total(params):
            return model.apply({"params": params}, tokens, tokens, tokens)[0].sum()

        return jax.jit(jax.grad(total)).lower(abstract_params(model, one_device())).as_text().count(" = ")

    assert operations(2) > 100
    assert operations(8) == operations(2)


def test_abstract_parameters_are_those_that_init_makes():
    model = Decoder(spec(tie_word_embeddings=False))
    abstract = abstract_params(model, one_device())
    made = random_params(model, 0, abstract)
    axes = logical_axes(model)
    shapes = tree.flatten(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), abstract))
    assert tree.flatten(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), made)) == shapes
    assert {path: len(names) for path, names in axes.items()} == {path: len(leaf[0]) for path, leaf in shapes.items()}
    assert axes["layers/self_attn/q_proj/kernel"] == ("layers", "embed", "heads")
    assert axes["lm_head/kernel"] == ("embed", "vocab")
    assert shapes["layers/self_attn/k_proj/kernel"][0] == (2, 32, 16)
    kernel = made["layers"]["mlp"]["up_proj"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0, "layers are initialized apart"
