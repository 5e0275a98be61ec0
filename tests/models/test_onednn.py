"""config.model.matmul='onednn': products of bfloat16, or where the CPU has no instructions for that of float32, against
float64 NumPy and torch's autocast.
"""

import functools
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.family_configs import CONFIGS
from support.tiny import CONFIG, batch_of, documents, logits, numpy_params, spec
from support.witness import from_torch, torch_llama

from ftjax import choices, quant, tree
from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.models import onednn
from ftjax.models.adapter import low_rank
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.layers import Linear
from ftjax.objectives.sft import make_sft
from ftjax.sampling.narrowed import narrowed

multiplies = pytest.mark.skipif(bool(onednn.lacks()), reason=onednn.lacks())
rounds = onednn.operands() == jnp.bfloat16  # or else products are those of float32


def rounded(x, dtype=None):
    """float64 of the nearest values of what is multiplied here, or of `dtype`."""
    return np.asarray(jnp.asarray(x, dtype or onednn.operands()), np.float64)


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


# Rows of the left side, what is summed over, columns: as in models and, of each, nothing that divides well.
SIZES = [((2, 64), 96, 160), ((1,), 576, 49), ((3, 5, 7), 33, 1), ((1000,), 16, 65), ((4,), 1, 300), ((0,), 8, 8)]


@multiplies
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_a_product_is_that_of_the_rounded_values_summed_in_float32(rows, inner, columns, turned, record_figure):
    x, kernel = arrays((*rows, inner), (columns, inner) if turned else (inner, columns))
    found = onednn.product(x, kernel, jnp.float32, turned)
    wanted = rounded(x) @ (rounded(kernel).T if turned else rounded(kernel))
    assert (found.shape, found.dtype) == (wanted.shape, jnp.float32)
    record_figure("of the sum", np.abs(found - wanted).max(initial=0))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * inner)


@multiplies
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_its_gradients_are_products_of_the_rounded_gradient(rows, inner, columns, turned):
    x, kernel, out = arrays((*rows, inner), (columns, inner) if turned else (inner, columns), (*rows, columns))
    _, back = jax.vjp(lambda x, kernel: onednn.product(x, kernel, jnp.float32, turned), x, kernel)
    d_x, d_kernel = back(jnp.asarray(out))
    wanted = rounded(out) @ (rounded(kernel) if turned else rounded(kernel).T)
    np.testing.assert_allclose(d_x, wanted, rtol=0, atol=1e-6 * columns)
    count = int(np.prod(rows))
    left, right = rounded(x).reshape(count, inner), rounded(out).reshape(count, columns)
    wanted = right.T @ left if turned else left.T @ right
    np.testing.assert_allclose(d_kernel, wanted, rtol=0, atol=1e-6 * max(count, 1))


@multiplies
def test_what_has_no_product_is_refused():
    x, kernel, a, b = (jnp.ones(shape) for shape in ((4, 64), (32, 16), (64, 8), (8, 16)))
    with pytest.raises(ValueError, match=r"\(4, 64\) and \(32, 16\) have no product: 64 and 32 differ"):
        onednn.product(x, kernel, jnp.float32)
    with pytest.raises(ValueError, match="have no product"):
        onednn.product(x, kernel, jnp.float32, turned=True)
    for given in ((x, kernel, a, b), (x, jnp.ones((64, 32)), a, b), (x, jnp.ones((64, 16)), a, b.T)):
        with pytest.raises(ValueError, match=r"have no product|have other shapes"):
            onednn.adapted(*given, jnp.float32)
    with pytest.raises(ValueError, match="kernels with 32 inputs have no product"):
        onednn.product_with_layer(x, quant.panels(kernel[None]), jnp.int32(0), jnp.float32)
    of_kernel, of_a, of_b = (quant.panels(jnp.ones((1, *shape))) for shape in ((64, 32), (64, 16), (16, 48)))
    with pytest.raises(ValueError, match="does not fit kernels of"):
        onednn.product_with_layer(x, of_kernel, jnp.int32(0), jnp.float32, of_a, of_b)


@multiplies
def test_results_and_gradients_have_the_dtypes_of_what_they_are_of():
    x, kernel = (jnp.asarray(each, jnp.bfloat16) for each in arrays((5, 64), (64, 32)))
    out, back = jax.vjp(lambda x, kernel: onednn.product(x, kernel, jnp.bfloat16), x, kernel.astype(jnp.float32))
    assert [each.dtype for each in (out, *back(out))] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    # Rounded once, after the sum: half a unit of the last of eight bits.
    np.testing.assert_allclose(np.asarray(out, np.float64), rounded(x) @ rounded(kernel), rtol=2**-8, atol=1e-5)


@multiplies
def test_many_at_once_do_not_disturb_each_other():
    """XLA runs what does not depend on each other on several threads."""
    pairs = [arrays((64 + i, 256), (256, 96 + i)) for i in range(24)]
    run = jax.jit(lambda pairs: [onednn.product(*pair, jnp.float32) for pair in pairs])
    wanted = [rounded(x) @ rounded(kernel) for x, kernel in pairs]
    for _ in range(10):
        for found, its in zip(run(pairs), wanted, strict=True):
            np.testing.assert_allclose(found, its, rtol=0, atol=1e-3)


@multiplies
def test_the_parts_of_a_batch_are_what_each_is_alone():
    x, kernel = arrays((3, 7, 40), (40, 24))
    each = jnp.stack([onednn.product(row, kernel, jnp.float32) for row in x])
    np.testing.assert_array_equal(jax.vmap(lambda row: onednn.product(row, kernel, jnp.float32))(x), each)


@multiplies
def test_adapters_multiply_by_it_where_it_is_used():
    x, a, b = arrays((6, 64), (64, 8), (8, 48))
    with onednn.used(True):
        found = low_rank(x, a, b)
        assert "ftjax_product" in str(jax.make_jaxpr(low_rank)(x, a, b))
    inner = rounded(x) @ rounded(a)
    np.testing.assert_allclose(found, rounded(inner.astype(np.float32)) @ rounded(b), rtol=0, atol=0.05)
    assert (np.abs(found - low_rank(x, a, b)).max() > 1e-3) == rounds  # which multiplies float32


@multiplies
@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_an_adapter_beside_a_kernel_is_the_sum_of_their_products(rows, inner, columns, record_figure):
    x, kernel, a, b, out = arrays((*rows, inner), (inner, columns), (inner, 8), (8, columns), (*rows, columns))
    found, back = jax.vjp(lambda *given: onednn.adapted(*given, jnp.float32), x, kernel, a, b)

    def alone(x, kernel, a, b):
        return onednn.product(x, kernel, jnp.float32) + low_rank(x, a, b)

    with onednn.used(True):
        wanted, wanted_back = jax.vjp(alone, x, kernel, a, b)
    for one, its in zip((found, *back(out)), (wanted, *wanted_back(out)), strict=True):
        np.testing.assert_allclose(one, its, rtol=0, atol=1e-5 * max(1, np.abs(its).max(initial=0)))


@multiplies
@pytest.mark.parametrize("kind", ["plain", "dropout off", "dropout", "dora"])
def test_layers_give_the_same_with_the_adapter_in_one_product_or_apart(kind):
    """Where it is in one: without dropout at work and without DoRA."""
    x, kernel, a, b = arrays((6, 64), (64, 48), (64, 8), (8, 48))
    lora = {"lora_a": a, "lora_b": b, "lora_scale": np.float32(0.5)}
    lora |= {"lora_dropout": np.float32(0.5)} if "dropout" in kind else {}
    lora |= {"lora_magnitude": np.linalg.norm(kernel, axis=0)} if kind == "dora" else {}
    variables = {"params": {"kernel": kernel}, "lora": lora}
    linear = Linear(48, ("embed", "mlp"), jnp.float32, jnp.float32)
    rngs = {"dropout": jax.random.key(0)} if kind == "dropout" else {}

    def run(x):
        return linear.apply(variables, x, rngs=rngs)

    with onednn.used(True):
        found = run(x)
        fused = "ftjax_sum_of_two" in str(jax.make_jaxpr(run)(x))
    wanted = run(x)
    assert fused == (kind in ("plain", "dropout off"))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.01 * np.abs(wanted).max())
    assert (np.abs(found - wanted).max() > 1e-4) == rounds  # which multiplies float32


@multiplies
def test_quantized_kernels_are_multiplied_by_it():
    x, kernel = arrays((6, 64), (64, 64))
    linear = Linear(64, ("embed", "mlp"), jnp.float32, jnp.float32)
    packed = quant.quantize(jnp.asarray(kernel), "int8")
    with onednn.used(True):
        found, back = jax.vjp(lambda x: linear.apply({"quant": packed}, x), x)
    whole = np.asarray(quant.dequantize(packed, jnp.float32))
    np.testing.assert_allclose(found, rounded(x) @ rounded(whole), rtol=0, atol=1e-4)
    np.testing.assert_allclose(back(found)[0], rounded(found) @ rounded(whole).T, rtol=0, atol=1e-3)


@multiplies
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_as_near_to_float32_as_torch_under_autocast(tied, record_figure):
    """Logits, and gradients of every parameter: torch rounds the same products, and attention's besides."""
    config = CONFIG | {"tie_word_embeddings": tied}
    exact, ours = (Decoder(spec(tie_word_embeddings=tied), matmul=name) for name in ("xla", "onednn"))
    params = numpy_params(exact)
    docs = documents(1, [11, 17])
    batch = batch_of([docs[:1], docs[1:]], 17)

    def run(model):
        def loss(params):
            return make_sft(model)({"params": params}, batch, jax.random.key(0)).sum

        hidden, _ = model.apply({"params": params}, *(batch[name] for name in ("tokens", "positions", "segment_ids")))
        return model.apply({"params": params}, hidden, method=model.unembed), tree.flatten(jax.grad(loss)(params))

    def torch_run(autocast):
        model, rows, total = torch_llama(config, params), [], 0.0
        for tokens, trained in docs:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                theirs = model(torch.tensor(tokens[None]).long()).logits[0].float()
            rows.append(theirs.detach().numpy())
            losses = torch.nn.functional.cross_entropy(theirs[:-1], torch.tensor(tokens[1:]).long(), reduction="none")
            total = total + (losses * torch.tensor(trained[1:])).sum()
        total.backward()
        names = {name: parameter.grad for name, parameter in model.named_parameters()}
        return rows, from_torch(names, params)

    run = jax.jit(run, static_argnums=0)
    (found, gradients), (exact_logits, exact_gradients) = run(ours), run(exact)
    (theirs, their_gradients), (torch_logits, torch_gradients) = torch_run(True), torch_run(False)
    for row, wanted in enumerate(torch_logits):  # the float32 of both is the same
        np.testing.assert_allclose(exact_logits[row, : len(wanted)], wanted, atol=1e-4)
    our_error = max(np.abs(found[row, : len(its)] - its).max() for row, its in enumerate(torch_logits))
    their_error = max(np.abs(one - its).max() for one, its in zip(theirs, torch_logits))
    record_figure("logits", our_error)
    record_figure("torch's", their_error)
    assert our_error < (1.5 * their_error if rounds else 1e-4)
    assert (our_error > 1e-4) == rounds

    def error(found):
        squares = [[np.sum((found[path] - its) ** 2), np.sum(its**2)] for path, its in torch_gradients.items()]
        return np.sqrt(np.divide(*np.sum(squares, axis=0)))

    record_figure("gradients, relative", error(gradients))
    assert error(exact_gradients) < 1e-4
    assert error(gradients) < (1.5 * error(their_gradients) if rounds else 1e-4)
    assert (error(gradients) > 1e-4) == rounds


def test_it_is_chosen_where_it_is_to_be_had():
    assert onednn.choose("xla", "cpu", 1) == ("xla", "")
    assert onednn.choose("auto", "tpu", 1) == ("xla", "oneDNN is for one CPU, and these are 1 devices (tpu)")
    assert onednn.choose("auto", "cpu", 8)[0] == "xla"
    assert onednn.choose("auto", "cpu", 1) == ("xla" if onednn.lacks() else "onednn", onednn.lacks())


@pytest.mark.parametrize(("platform", "count"), [("gpu", 1), ("cpu", 2)])
def test_where_it_cannot_be_it_is_refused_and_auto_does_without(platform, count):
    config = configs.changed(configs.defaults(), {"model.matmul": "onednn"})
    with pytest.raises(UserError, match=r"config.model.matmul='onednn': oneDNN is for one CPU, and these are"):
        choices.by_devices(config, platform, count)
    config = configs.changed(config, {"model.matmul": "auto"})
    assert choices.by_devices(config, platform, count).model.matmul == "xla"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("system", "oneDNN is used on Linux on x86-64, and this is darwin"),
        ("cpu", r"this CPU has no instructions of AVX2 \(avx2, fma\)"),
        ("package", r"onednn-devel-cpu-gomp is not installed: pip install 'ftjax\[onednn\]'"),
        ("compiler", "there is no C\\+\\+ compiler nowhere/c\\+\\+: install g\\+\\+, or name another one in CXX"),
    ],
)
def test_what_is_missing_is_said(what, message, monkeypatch):
    monkeypatch.setattr(onednn, "_cpu_flags", lambda: {"avx2", "avx"} | ({"fma"} if what != "cpu" else set()))
    monkeypatch.setattr(sys, "platform", "darwin" if what == "system" else "linux")
    there = {"onednn-cpu-gomp", *(() if what == "package" else ["onednn-devel-cpu-gomp"])}
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [name] if name in there else [])
    monkeypatch.setenv("CXX", "nowhere/c++" if what == "compiler" else sys.executable)
    onednn.lacks.cache_clear()
    try:
        reason = onednn.lacks()
    finally:
        onednn.lacks.cache_clear()
    assert re.search(message, reason)


@pytest.mark.skipif(not rounds, reason="what is multiplied here are float32 values, so that the other tests show it")
def test_cpus_without_instructions_for_bfloat16_multiply_float32():
    """All other tests of this, on this CPU, as if it had none."""
    older = "import sys, pytest; from ftjax.models import onednn; onednn._cpu_flags = lambda: {'avx2', 'fma'}; "
    names = [str(path) for path in sorted(Path(__file__).parent.glob("test_onednn*.py"))]
    options = [*names, "-p", "no:cacheprovider", "-k", "not compile and not package"]
    done = in_a_process(f"{older}assert str(onednn.operands()) == 'float32'; sys.exit(pytest.main({options}))")
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


PRODUCT = "import jax; from ftjax.models import onednn; x = jax.numpy.ones((2, 2)); onednn.product(x, x, 'float32')"
CHOICE = "from ftjax.models import onednn; print(onednn.choose('auto', 'cpu', 1))"


def in_a_process(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@multiplies
def test_a_package_without_its_library_is_no_fault_of_auto(tmp_path):
    without = "import importlib.metadata; importlib.metadata.Distribution.files = property(lambda self: [])\n"
    chosen = in_a_process(without + CHOICE, FTJAX_CACHE=str(tmp_path))
    assert chosen.returncode == 0, chosen.stderr
    assert re.match(r"\('xla', \"onednn-\S+ \S+ has no \S+: pip install 'ftjax\[onednn\]'\"\)", chosen.stdout)


@multiplies
def test_a_compiler_that_fails_is_named_and_auto_does_without(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'onednn.cc:1: error: no header' >&2\nexit 1\n")
    broken.chmod(0o755)
    source = Path(onednn.__file__).with_suffix(".cc")
    told = f"{broken} cannot compile {source}: onednn.cc:1: error: no header; name another"
    environment = {"CXX": str(broken), "FTJAX_CACHE": str(tmp_path)}
    assert f"config.model.matmul='onednn': {told}" in in_a_process(PRODUCT, **environment).stderr
    chosen = in_a_process(CHOICE, **environment)
    assert "('xla'" in chosen.stdout
    assert told in chosen.stdout
    assert not any((tmp_path / "onednn").iterdir())


@multiplies
def test_what_is_compiled_is_made_again_where_it_is_damaged(tmp_path):
    """By a compiler with arguments, such as CXX='ccache g++', into a directory with a space in its name."""
    environment = {"CXX": "/usr/bin/env g++", "FTJAX_CACHE": str(tmp_path / "of all")}
    assert in_a_process(CHOICE, **environment).stdout == "('onednn', '')\n"
    (made,) = (tmp_path / "of all/onednn").iterdir()
    made.write_text("no library")
    again = in_a_process(PRODUCT, **environment)
    assert again.returncode == 0
    assert f"{made} cannot be loaded" in again.stderr
    assert made.stat().st_size > 10_000


@multiplies
@pytest.mark.parametrize("rows", [0, 1, 7, 16, 17, 64, 65, 200])
@pytest.mark.parametrize(("inner", "columns"), [(64, 96), (2, 16), (34, 160), (4100, 32)])
def test_panels_of_a_layer_multiply_as_its_kernel(rows, inner, columns, record_figure):
    """Threads share the panels of few rows and of more the rows; long panels are multiplied a part after the other."""
    x, kernels = arrays((rows, inner), (3, inner, columns))
    packed = quant.panels(jnp.asarray(kernels))
    assert (packed.shape, packed.dtype) == ((3, columns // 16, inner // 2, 16, 2), jnp.uint16)
    run = jax.jit(lambda layer: onednn.product_with_layer(x, packed, layer, jnp.float32))
    for layer, kernel in enumerate(kernels):
        whole = quant.dequantize({"panels": packed, "layer": jnp.int32(layer)}, jnp.float32)
        halves = rounded(kernel, jnp.bfloat16)  # as panels have them, whatever is multiplied
        np.testing.assert_array_equal(whole, halves)
        wanted = rounded(x) @ halves
        found = run(jnp.int32(layer))
        record_figure(f"layer {layer}", np.abs(found - wanted).max(initial=0))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * inner)


@multiplies
@pytest.mark.parametrize("rows", [1, 7, 64, 65])
@pytest.mark.parametrize("rank", [3, 16, 40])
def test_an_adapter_of_panels_adds_what_it_does(rows, rank):
    """Its products are of values rounded to bfloat16: of x and A, of x A as this CPU multiplies, and of B."""
    x, kernels, a, b = arrays((rows, 64), (3, 64, 96), (3, 64, rank), (3, rank, 96))
    variables = {"layers/q_proj/lora_a": a, "layers/q_proj/lora_b": b, "layers/q_proj/lora_scale": np.full(3, 0.5)}
    given = {"params": {"layers": {"q_proj": {"kernel": jnp.asarray(kernels)}}}, "lora": tree.unflatten(variables)}
    narrow = narrowed(Decoder(spec(tie_word_embeddings=False), matmul="onednn"), given)
    assert set(narrow) == {"quant", quant.STACKS}
    packed = narrow[quant.STACKS]["layers"]["q_proj"]
    for layer in range(3):
        found = onednn.product_with_layer(x, layer=jnp.int32(layer), dtype=jnp.float32, **packed)
        halves = [rounded(its[layer], jnp.bfloat16) for its in (kernels, a, 0.5 * b)]
        low = rounded((rounded(x) @ halves[1]).astype(np.float32))
        wanted = rounded(x) @ halves[0] + low @ halves[2]
        # On its way through bfloat16 x A may be rounded to either side.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.3 if rounds else 2e-4)


@multiplies
@pytest.mark.parametrize("rows", [4, 200])
def test_rows_of_zeros_are_not_multiplied(rows):
    """They have zeros whatever the kernel is, and the other rows what they have without them."""
    x, kernels, a, b = arrays((rows, 64), (1, 64, 96), (1, 64, 16), (1, 16, 96))
    packed, *adapter = (quant.panels(jnp.asarray(its)) for its in (kernels, a, b))
    there = np.random.default_rng(1).random(rows) < 0.5
    run = functools.partial(onednn.product_with_layer, layer=jnp.int32(0), dtype=jnp.float32)
    for its in ({}, dict(zip(("a_panels", "b_panels"), adapter))):
        found, alone = (run(given, packed, **its) for given in (np.where(there[:, None], x, 0), x[there]))
        np.testing.assert_array_equal(found[~there], 0)
        np.testing.assert_array_equal(found[there], alone)
    not_a_number = jnp.full_like(packed, 0x7FC0)
    np.testing.assert_array_equal(run(np.where(there[:, None], 0.0, -0.0).repeat(64, 1), not_a_number), 0)
    assert np.isnan(run(x, not_a_number)).all()


@multiplies
def test_panels_of_a_layer_that_is_not_there_are_those_of_the_last():
    x, kernels = arrays((4, 32), (2, 32, 16))
    packed = quant.panels(jnp.asarray(kernels))
    found = onednn.product_with_layer(x, packed, jnp.int32(7), jnp.float32)
    np.testing.assert_allclose(found, rounded(x) @ rounded(kernels[1], jnp.bfloat16), rtol=0, atol=1e-4)


@multiplies
@pytest.mark.parametrize("name", ["llama", "untied", "mixtral", "gpt2", "qwen3_next", "deepseek_v3"])
def test_kernels_kept_in_panels_multiply_as_those_that_are_rounded_each_time(name, record_figure):
    """What generates keeps them so, where panels fit their sizes; of experts nothing is changed."""
    changes = {"vocab_size": 64, "tie_word_embeddings": name != "untied"}
    config = CONFIG | changes if name in ("llama", "untied") else CONFIGS[name]
    model = Decoder(spec_from_config(config), matmul="onednn")
    variables = {"params": numpy_params(model)}
    narrow = narrowed(model, variables)
    before, after = (set(tree.flatten(its["params"])) for its in (variables, narrow))
    kept, packed = before & after, {path.rpartition("/")[0] for path in tree.flatten(narrow[quant.STACKS])}
    assert packed == {path.rpartition("/")[0] for path in tree.flatten(narrow["quant"])}
    assert {path.rpartition("/")[0] for path in before - after} == packed - {"embed_tokens"}
    assert not any("experts" in path for path in packed)
    assert ("embed_tokens" in packed) == (name == "llama")
    assert ("lm_head" in packed) == (name == "untied")
    if name in ("llama", "untied"):
        assert not any(path.endswith("_proj/kernel") for path in kept)
    batch = batch_of([documents(2, [7, 9])], 16)
    found, wanted = (logits(model, its, batch) for its in (narrow, variables))
    record_figure("logits", np.abs(found - wanted).max())
    # Other orders of the same sums; what is rounded anew after them may fall to the other side.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())
    assert narrowed(model.clone(matmul="xla"), variables) is variables


@multiplies
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_of_kernels_in_panels_are_in_panels_too(tied, record_figure):
    """What one adds is as it was to bfloat16; the table's and DoRA's are left."""
    changes = {"vocab_size": 64, "tie_word_embeddings": tied, "hidden_size": 64}
    model = Decoder(spec(**changes), matmul="onednn")
    base = {"params": numpy_params(model)}
    adapted = ["layers/self_attn/q_proj", "layers/mlp/down_proj", "embed_tokens", *([] if tied else ["lm_head"])]
    leaves, rng, lora = tree.flatten(base["params"]), np.random.default_rng(3), {}
    for module in adapted:
        *layers, inner, out = leaves[f"{module}/{'embedding' if module == 'embed_tokens' else 'kernel'}"].shape
        for name, shape in (("lora_a", (inner, 4)), ("lora_b", (4, out))):
            lora[f"{module}/{name}"] = rng.standard_normal((*layers, *shape)).astype(np.float32) * inner**-0.5
        lora[f"{module}/lora_scale"] = np.full(layers, 0.5, np.float32)
    norms = np.linalg.norm(leaves["layers/mlp/down_proj/kernel"], axis=1)
    lora["layers/mlp/down_proj/lora_magnitude"] = norms * rng.uniform(0.5, 1.5, norms.shape).astype(np.float32)
    variables = base | {"lora": tree.unflatten(lora)}
    narrow = narrowed(model, variables)
    assert set(tree.by_module(narrow["lora"])) == {"layers/mlp/down_proj", "embed_tokens"}
    with pytest.raises(ValueError, match=r"by onednn.product_with_layer alone"):  # and not as if it had no adapter
        logits(model.clone(matmul="xla"), narrow, batch_of([documents(2, [7])], 16))
    batch = batch_of([documents(2, [7, 9])], 16)
    found, wanted, without = (logits(model, its, batch) for its in (narrow, variables, base))
    record_figure("logits", np.abs(found - wanted).max())
    record_figure("what the adapters do", np.abs(wanted - without).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())
    assert np.abs(wanted - without).max() > 0.2 * np.abs(wanted).max()
