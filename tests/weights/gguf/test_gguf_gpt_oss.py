"""GPT-OSS files as llama.cpp's converter lays them out are read as transformers' model, and by llama.cpp."""

import copy

import gguf
import jax
import numpy as np
import pytest
import torch
from support.chat_templates import CHATML, make_tokenizer
from support.llama_cpp import LlamaCpp
from support.llama_dirs import abstract
from support.tiny import batch_of
from support.torch_models import torch_model
from tokenizers import pre_tokenizers

from ftjax.errors import UserError
from ftjax.models.__main__ import formats
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.weights.gguf.config import architecture_of
from ftjax.weights.gguf.read import GGUFReader
from ftjax.weights.gguf.tokenizer_write import to_metadata
from ftjax.weights.hf.mxfp4 import dequantize as of_hugging_face
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

F32, MXFP4 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.MXFP4
EXPERTS, WIDTH, INNER, LAYERS = 4, 64, 96, 3
# As the released models but for sizes. The ramp of YaRN goes from pair 0.9 to 4.4 of 8, which llama.cpp makes 0 and 5.
YARN = {"rope_type": "yarn", "rope_theta": 3000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"original_max_position_embeddings": 512}
CONFIG = {
    "model_type": "gpt_oss",
    "vocab_size": 400,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "sliding_window": 7,
    "rope_parameters": YARN | {"truncate": False},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
METADATA = {
    "block_count": LAYERS, "context_length": 2048, "embedding_length": WIDTH, "feed_forward_length": INNER,
    "attention.head_count": 6, "attention.head_count_kv": 2, "rope.freq_base": 3000.0, "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512, "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0, "attention.layer_norm_rms_epsilon": 1e-5, "expert_count": EXPERTS,
    "expert_used_count": 2, "attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 7,
    "expert_feed_forward_length": INNER,
}  # fmt: skip
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks.weight", "mlp.router": "ffn_gate_inp",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tensors_of(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name in a GGUF file: values}: gate and up apart, experts' kernels [experts, out, in], all else as it is."""
    out = {}
    for name, values in state.items():
        if name in OUTSIDE:
            out[OUTSIDE[name]] = values
            continue
        layer, name = name.removeprefix("model.layers.").split(".", 1)
        block = f"blk.{layer}."
        if name.startswith("mlp.experts."):
            kind = "bias" if name.endswith("_bias") else "weight"
            values = values if kind == "bias" else values.transpose(0, 2, 1)
            if "down" in name:
                out[f"{block}ffn_down_exps.{kind}"] = values
            else:
                out[f"{block}ffn_gate_exps.{kind}"], out[f"{block}ffn_up_exps.{kind}"] = values[:, ::2], values[:, 1::2]
        else:
            module = next(module for module in NAMES if name.startswith(module))
            out[block + NAMES[module] + name.removeprefix(module)] = values
    return out


def write(path, tensors, experts=F32, packed=None, metadata=None):
    """`experts`: the type of their kernels; `packed`: tensors of it as they are to be in the file."""
    writer = gguf.GGUFWriter(path, "gpt-oss")
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in ({f"gpt-oss.{key}": value for key, value in METADATA.items()} | (metadata or {})).items():
        add.get(type(value), writer.add_array)(key, value)
    for name, values in tensors.items():
        if name in (packed or {}):
            writer.add_tensor(name, packed[name], raw_dtype=experts)
        elif name.endswith("exps.weight") and experts != F32:
            writer.add_tensor(name, gguf.quants.quantize(values, experts), raw_dtype=experts)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numpy_state(model) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in model.state_dict().items()}


def random_model(seed=0, **changes):
    """With biases of gate and up so large that some are clamped at 7, which no key of a file says."""
    model = torch_model(CONFIG | changes, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_up_proj_bias"):
                parameter.mul_(30)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def tensors(model):
    return tensors_of(numpy_state(model))


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "float32.gguf", tensors)


def loaded(reader):
    """(decoder, its parameters)"""
    spec = spec_from_config(reader.config)
    return Decoder(spec), load_params(reader, spec, abstract(spec))


def our_logits(reader, ids: np.ndarray) -> np.ndarray:
    """float32 [rows, length, vocab]"""
    decoder, params = loaded(reader)
    batch = batch_of([[(row, np.ones(len(row), bool))] for row in ids], ids.shape[1])

    @jax.jit
    def run(params, batch):
        hidden, _ = decoder.apply({"params": params}, *(batch[name] for name in ("tokens", "positions", "segment_ids")))
        return decoder.apply({"params": params}, hidden, method=decoder.unembed)

    return np.asarray(run(params, batch))


def their_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits.numpy()


IDS = np.random.default_rng(0).integers(0, 400, (2, 48)).astype(np.int32)


def test_the_decoder_is_that_of_the_hugging_face_directory(model, file, tmp_path):
    model.save_pretrained(tmp_path)
    config = GGUFReader(file).config
    assert spec_from_config(config) == spec_from_config(open_source(tmp_path).config)
    theirs = type(model.config)(**config)
    for field in ("swiglu_limit", "rope_parameters", "layer_types", "num_local_experts", "intermediate_size"):
        assert getattr(theirs, field) == getattr(model.config, field), field


def test_every_tensor_is_the_same_and_so_is_each_part_of_it(model, file):
    reader, state = GGUFReader(file), numpy_state(model)
    assert reader.names() == state.keys()
    for name, values in state.items():
        assert reader.shape(name) == values.shape
        np.testing.assert_array_equal(reader.read(name), values, err_msg=name)
    layer = "model.layers.1.mlp.experts."
    for index in (
        (slice(1, 3),),
        (slice(0, 4), slice(5, 30)),
        (slice(2, 3), slice(33, 34), slice(7, 20)),
        (slice(None), slice(None), slice(8, 9)),
        (slice(None), slice(None), slice(9, 10)),
        (slice(None), slice(None), slice(10, 10)),
    ):
        for name in ("gate_up_proj", "down_proj"):
            np.testing.assert_array_equal(reader.read(layer + name, index), state[layer + name][index])
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            np.testing.assert_array_equal(reader.read(layer + name, index[1:]), state[layer + name][index[1:]])


def test_logits_are_those_of_transformers(model, file, record_figure):
    ours, theirs = our_logits(GGUFReader(file), IDS), their_logits(model, IDS)
    record_figure("largest difference of logits", difference := float(np.abs(ours - theirs).max()))
    assert theirs.std() > 0.1
    assert difference < 1e-4
    for changes in ({"rope_parameters": YARN | {"truncate": True}}, {"swiglu_limit": 8.0}):  # so that these are seen
        assert np.abs(their_logits(random_model(**changes), IDS) - theirs).max() > 1e-2


def test_mxfp4_is_read_as_gguf_dequantizes_it(model, tensors, tmp_path, record_figure):
    reader = GGUFReader(write(tmp_path / "mxfp4.gguf", tensors, MXFP4))
    theirs = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                values = parameter.numpy().transpose(0, 2, 1)
                halves = [values[:, ::2], values[:, 1::2]] if "gate_up" in name else [values]
                halves = [gguf.quants.dequantize(gguf.quants.quantize(half, MXFP4), MXFP4) for half in halves]
                expected = np.stack(halves, axis=2).reshape(values.shape).transpose(0, 2, 1)
                np.testing.assert_array_equal(reader.read(name), expected)
                part = (slice(1, 2), slice(20, 50), slice(11, 40))
                np.testing.assert_array_equal(reader.read(name, part), expected[part])
                parameter.copy_(torch.from_numpy(expected.copy()))
    difference = float(np.abs(our_logits(reader, IDS) - their_logits(theirs, IDS)).max())
    record_figure("largest difference of logits", difference)
    assert difference < 1e-4


def test_mxfp4_of_a_hugging_face_file_is_the_same_in_a_gguf(tensors, tmp_path):
    """The converter moves the halves of bytes, and no value changes but that -0 is 0.

    Of a block of 32 Hugging Face has number 2 i in the low half of byte i and 2 i + 1 in the high one, GGUF i and
    i + 16, after the scale.
    """
    rng, packed, expected = np.random.default_rng(0), {}, {}
    for name, rows, blocks in (("gate", INNER, WIDTH // 32), ("up", INNER, WIDTH // 32), ("down", WIDTH, INNER // 32)):
        stored = rng.integers(0, 256, (EXPERTS, rows, blocks, 16), np.uint8)
        scales = rng.integers(100, 140, (EXPERTS, rows, blocks), np.uint8)
        numbers = np.stack([stored & 15, stored >> 4], axis=-1).reshape(EXPERTS, rows, blocks, 32)
        moved = numbers[..., :16] | numbers[..., 16:] << 4
        whole = np.concatenate([scales[..., None], moved], axis=-1).reshape(EXPERTS, rows, blocks * 17)
        packed[f"blk.2.ffn_{name}_exps.weight"] = whole
        expected[name] = of_hugging_face(stored, scales).astype(np.float32)
    reader = GGUFReader(write(tmp_path / "a.gguf", tensors, MXFP4, packed))
    layer = "model.layers.2.mlp.experts."
    np.testing.assert_array_equal(reader.read(f"{layer}down_proj"), expected["down"].swapaxes(1, 2))
    for part, name in enumerate(("gate", "up")):
        found = reader.read(f"{layer}gate_up_proj")[..., part::2]
        np.testing.assert_array_equal(found, expected[name].swapaxes(1, 2))


def test_windows_are_in_every_second_layer_unless_the_file_says_otherwise(tensors, tmp_path):
    assert spec_from_config(GGUFReader(write(tmp_path / "a.gguf", tensors)).config).layer_windows == (7, None, 7)
    other = write(tmp_path / "b.gguf", tensors, metadata={"gpt-oss.attention.sliding_window_pattern": 3})
    assert spec_from_config(GGUFReader(other).config).layer_windows == (7, 7, None)


def changed(drop=(), extra=None, metadata=None):
    return {"drop": drop, "extra": extra or {}, "metadata": metadata or {}}


REFUSED = {
    "no up": (
        changed(drop=["blk.1.ffn_up_exps.weight"]),
        r"up of .*gate_up_proj have the shapes \[\[4, 96, 64\]\], not",
    ),
    "no gate": (changed(drop=["blk.1.ffn_gate_exps.bias"]), r"gate_up_proj_bias have the shapes \[\[4, 96\]\], not"),
    "unlike": (
        changed(extra={"blk.0.ffn_up_exps.weight": np.ones((4, 95, 64), np.float32)}),
        r"shapes \[\[4, 96, 64\], \[4, 95, 64\]\], not two alike",
    ),
    "fewer experts": (
        changed(extra={"blk.0.ffn_down_exps.weight": np.ones((3, 64, 96), np.float32)}),
        r"shape: model.layers.0.mlp.experts.down_proj is \[3, 96, 64\], by the config \[4, 96, 64\]",
    ),
    "a vector for experts": (
        changed(extra={"blk.0.ffn_down_exps.weight": np.ones(64, np.float32)}),
        r"down_proj is \[64\], by the config",
    ),
    "no sinks": (changed(drop=["blk.2.attn_sinks.weight"]), r"missing: model.layers.2.self_attn.sinks \[6\]"),
    "no biases": (changed(drop=["blk.0.attn_q.bias"]), "missing: model.layers.0.self_attn.q_proj.bias"),
    "another theta": (changed(metadata={"gpt-oss.rope.freq_base_swa": 10.0}), "rope.freq_base_swa is not supported"),
    "scaled experts": (changed(metadata={"gpt-oss.expert_weights_scale": 2.0}), "expert_weights_scale is not supp"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_damaged_and_other_files_are_refused(tensors, tmp_path, changes, message):
    kept = {name: values for name, values in (tensors | changes["extra"]).items() if name not in changes["drop"]}
    path = write(tmp_path / "a.gguf", kept, metadata=changes["metadata"])
    with pytest.raises(UserError, match=message):
        loaded(GGUFReader(path))


def test_it_is_not_written_and_the_reason_is_said():
    assert (formats("gpt_oss").read, formats("gpt_oss").written) == (
        ("safetensors", "MXFP4", "GGUF"),
        ("safetensors", "PEFT"),
    )
    with pytest.raises(
        UserError, match=r"'gpt_oss' model cannot be written as GGUF: llama.cpp .* by up to 76 %; export"
    ):
        architecture_of("gpt_oss")


def test_by_how_much_rounding_the_ramp_moves_the_frequencies_of_the_released_models():
    """What the refusal above says; theirs are 150,000, 32, 4,096 and heads of 64."""
    rope = {"rope_theta": 150_000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    kept, rounded = (
        np.array(spec_from_config(
            CONFIG | {"head_dim": 64, "rope_parameters": YARN | rope | {"truncate": truncate}}
        ).ropes[0].frequencies)
        for truncate in (False, True)
    )  # fmt: skip
    assert round(100 * np.abs(rounded / kept - 1).max()) == 76


@pytest.mark.slow
def test_llama_cpp_reads_the_same_layout_with_a_rounded_ramp(tmp_path):
    """Its likeliest tokens are those of transformers' model whose config says `truncate`."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # a GGUF can name it
    models = {kind: random_model(1, rope_parameters=YARN | {"truncate": kind}) for kind in (True, False)}
    state = numpy_state(models[True])
    path = write(tmp_path / "a.gguf", tensors_of(state), metadata=to_metadata(tokenizer, CONFIG))
    for name, values in numpy_state(models[False]).items():
        np.testing.assert_array_equal(values, state[name])
    llama_cpp, rng, compared, unlike = LlamaCpp(path), np.random.default_rng(0), [], 0
    for length in range(20, 44):
        prompt = rng.integers(10, 300, length)
        logits, others = (their_logits(models[kind], prompt[None])[0, -1] for kind in (True, False))
        if np.diff(np.sort(logits)[-2:]) > 0.05:  # llama.cpp computes in 16 bits
            compared.append(int(logits.argmax()))
            assert llama_cpp.greedy(prompt.tolist(), 1)[0] == compared[-1:]
            unlike += int(others.argmax()) != compared[-1]
    assert len(compared) > 12
    assert len(set(compared)) > 5
    assert unlike > 0
