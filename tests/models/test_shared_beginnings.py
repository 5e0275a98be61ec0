"""Documents that share what they begin with: each is what it is in a row of its own, and so are all gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_configs import CONFIGS
from support.tiny import numpy_params, one_device

from ftjax.models import onednn, onednn_attention
from ftjax.models.attention import attention_of_rows, seen_until
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.kernels import choose

multiplies = pytest.mark.skipif(bool(onednn.lacks()), reason=onednn.lacks())
rounds = onednn.operands() == jnp.bfloat16

# Of each row (begin, own tokens) of its documents: a prefix that all share, pairs of which the second shares more, a
# document that begins anew in the middle, and a row of one.
TREES = [
    [(0, 90), (20, 31), (20, 60), (70, 9), (20, 2), (0, 30), (29, 40)],
    [(0, 40), (39, 3), (5, 100), (90, 60), (64, 30)],
    [(0, 333)],
    [(0, 5), (1, 2), (2, 150), (150, 64), (1, 64), (0, 48)],
]
LENGTH = 340


def laid(trees, length=LENGTH):
    """(positions, segment_ids int32 [B, T]; of each row the places of each document's tokens, shared ones first)"""
    positions, segments = np.zeros((2, len(trees), length), np.int32)
    paths = []
    for row, documents in enumerate(trees):
        of_row, start = [], 0
        for number, (begin, count) in enumerate(documents, 1):
            positions[row, start : start + count] = np.arange(begin, begin + count)
            segments[row, start : start + count] = number
            before = of_row[-1][:begin] if begin else []
            assert len(before) == begin
            of_row.append([*before, *range(start, start + count)])
            start += count
        paths.append(of_row)
    return positions, segments, paths


def seen(paths, positions, window):
    """bool [B, T, T]: what each token sees, by the places of its document; padding itself."""
    out = np.zeros((*positions.shape, positions.shape[1]), bool)
    out[:, np.arange(positions.shape[1]), np.arange(positions.shape[1])] = True
    for row, documents in enumerate(paths):
        for places in documents:
            for i, place in enumerate(places):
                out[row, place] = False
                out[row, place, places[max(0, i + 1 - (window or len(places))) : i + 1]] = True
    return out


def exact(queries, keys, values, gradient, visible, softcap=None, sinks=None):
    """The result and the three gradients, in float64; one head of keys to two of queries."""
    queries, keys, values, gradient = (jnp.asarray(x) for x in (queries, keys, values, gradient))

    def result(queries, keys, values):
        keys, values = (jnp.repeat(x, queries.shape[2] // x.shape[2], axis=2) for x in (keys, values))
        scores = 0.3 * jnp.einsum("bthd,bshd->bhts", queries, keys)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(visible[:, None], jnp.exp(scores), 0)
        total = scores.sum(axis=-1, keepdims=True) + (0 if sinks is None else jnp.exp(sinks)[:, None, None])
        return jnp.einsum("bhts,bshe->bthe", scores / total, values)

    out, back = jax.vjp(result, queries, keys, values)
    return [np.asarray(x) for x in (out, *back(gradient))]


def arrays(batch, length):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, length, heads, width)) for heads, width in ((4, 16), (2, 16), (2, 12), (4, 12))]


def errors(found, wanted):
    return [float(np.linalg.norm(x - its) / np.linalg.norm(its)) for x, its in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("window", [None, 25])
def test_until_says_what_the_documents_say(window):
    positions, segments, paths = laid(TREES)
    until, index = np.asarray(seen_until(positions, segments)), np.arange(LENGTH)
    found = (index <= index[:, None]) & (index[:, None] < until[:, None])
    if window:
        found &= positions[:, :, None] - positions[:, None] < window
    real = segments > 0
    np.testing.assert_array_equal(found[real], seen(paths, positions, window)[real])


def test_until_is_found_without_a_number_for_each_two_tokens():
    given = [jax.ShapeDtypeStruct((2, 4096), jnp.int32)] * 2
    used = jax.jit(seen_until).lower(*given).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * 2 * 4096 * 4096 / 16


@pytest.mark.parametrize("options", [{}, {"window": 25}, {"softcap": 1.5}, {"sinks": np.linspace(-1, 1, 4)}], ids=str)
def test_attention_of_rows_equals_float64(options, record_figure):
    positions, segments, paths = laid(TREES)
    given = arrays(len(TREES), LENGTH)
    given[3] *= (segments > 0)[..., None, None]
    with jax.enable_x64(True):
        visible = seen(paths, positions, options.get("window"))
        wanted = exact(*given, visible, **{k: v for k, v in options.items() if k != "window"})
    narrow = [x.astype(np.float32) for x in given]
    options = {name: np.float32(value) if name == "sinks" else value for name, value in options.items()}

    @jax.jit
    def run(queries, keys, values):
        until = seen_until(positions, segments)
        return attention_of_rows(queries, keys, values, positions, segments, 0.3, until=until, **options)

    out, back = jax.vjp(run, *narrow[:3])
    out = np.where((segments > 0)[..., None, None], out, wanted[0])
    found = errors([out, *map(np.asarray, back(narrow[3]))], wanted)
    record_figure("result and gradients", max(found))
    assert max(found) < 2e-6


@multiplies
def test_the_kernel_of_cpus_equals_float64(record_figure):
    positions, segments, paths = laid(TREES)
    given = arrays(len(TREES), LENGTH)
    given[3] *= (segments > 0)[..., None, None]
    with jax.enable_x64(True):
        wanted = exact(*given, seen(paths, positions, None))
    narrow = [jnp.asarray(x, jnp.float32) for x in given]
    places = {"positions": jnp.asarray(positions), "until": seen_until(positions, segments)}

    def run(queries, keys, values):
        return onednn_attention.attention(queries, keys, values, jnp.asarray(segments), 0.3, None, **places)

    out, back = jax.vjp(run, *narrow[:3])
    out = np.where((segments > 0)[..., None, None], out, wanted[0])
    found = errors([out, *map(np.asarray, back(narrow[3]))], wanted)
    record_figure("result and gradients", max(found))
    assert max(found) < (0.01 if rounds else 2e-6)


# Windows, soft caps, sinks, learned positions, latent attention, experts, layers that lend keys and values.
FAMILIES = ("llama", "mistral", "gemma2", "gemma3n", "gpt_oss", "gpt2", "glm4_moe_lite", "qwen3_moe", "gemma4")


@pytest.mark.parametrize("name", FAMILIES)
def test_documents_of_any_family_are_what_they_are_alone(name, record_figure):
    spec = spec_from_config(CONFIGS[name])
    model = Decoder(spec, shares=True)
    params = numpy_params(model)
    rng, trees = np.random.default_rng(1), [[(0, 15), (6, 3), (6, 5), (10, 4)], [(0, 8), (7, 2), (3, 9)]]
    positions, segments, paths = laid(trees, 32)
    tokens = rng.integers(0, spec.vocab_size, positions.shape).astype(np.int32)
    direction = rng.standard_normal((*positions.shape, spec.hidden_size)).astype(np.float32)

    def together(params):
        hidden, _ = model.apply({"params": params}, tokens, positions, segments)
        return jnp.sum(hidden * direction * (segments > 0)[..., None]), hidden

    documents = [(row, places) for row, of_row in enumerate(paths) for places in of_row]
    alone = np.zeros((3, len(documents), 16), np.int32)  # tokens, positions, segments
    own_direction = np.zeros((len(documents), 16, spec.hidden_size), np.float32)  # 0 at what is another's
    for number, (row, places) in enumerate(documents):
        alone[0, number, : len(places)] = tokens[row, places]
        alone[1, number, : len(places)] = np.arange(len(places))
        alone[2, number, : len(places)] = 1
        is_own = segments[row, places] == segments[row, places[-1]]
        own_direction[number, : len(places)] = direction[row, places] * is_own[:, None]

    def apart(params):
        hidden, _ = Decoder(spec).apply({"params": params}, *alone)
        return jnp.sum(hidden * own_direction), hidden

    (_, found), gradients = jax.jit(jax.value_and_grad(together, has_aux=True))(params)
    (_, wanted), theirs = jax.jit(jax.value_and_grad(apart, has_aux=True))(params)
    found, wanted = np.asarray(found), np.asarray(wanted)
    for number, (row, places) in enumerate(documents):
        np.testing.assert_allclose(found[row, places], wanted[number, : len(places)], atol=2e-5, rtol=2e-5)
    differences = jax.tree.map(
        lambda x, y: np.abs(x - y).max() / max(np.abs(y).max(), 1e-3), gradients, jax.device_get(theirs)
    )
    worst = max(jax.tree.leaves(differences))
    record_figure("gradients", worst)
    assert worst < 2e-4


def test_kernels_that_cannot_share_leave_it_to_xla_and_say_so():
    spec = spec_from_config(CONFIGS["llama"])
    mesh = one_device()
    assert choose("auto", spec, jnp.float32, 256, mesh, "onednn", True).name == ("xla" if onednn.lacks() else "onednn")
    windowed = dataclasses.replace(spec, layer_windows=(8,) * spec.num_hidden_layers)
    chosen = choose("auto", windowed, jnp.float32, 256, mesh, "onednn", True)
    assert chosen == ("xla", "onednn cannot serve windows over a shared beginning")
