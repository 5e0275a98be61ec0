"""Small GGUF vocabularies written with the gguf library, and texts to try tokenizers on."""

import random
from pathlib import Path

import gguf

WORDS = ["the", "a", "parcel", "It's", "can't", "we'll", "Zürich", "naïve", "HTTP", "x", "y2k", "CamelCase", "of"]
UNICODE = [
    "漢字かな交じり文", "中文測試一二三", "한국어", "שלום עולם", "مرحبا بالعالم", "नमस्ते",
    "e\u0301a\u0308o\u0302", "🙂👩‍👩‍👧‍👦🇸🇪🏽",
    "½²³", "٣٤٥", "Ⅷ",
    "\u200b\u200d\ufeff", "\u00a0", "\u3000", "€£¥", "ß", "œ", "…—“”", "\u0000", "\x7f", "𝔘𝔫𝔦",
]  # fmt: skip
CODE = [
    "def f(x):\n\treturn x**2  # π\n", '{"order": "48213", "n": [1, 2.5e-3, null]}', "<a href='#x'>1 &amp; 2</a>",
    "a\r\n\r\nb", "x=[0]*10;  y = 0x1F  + 1_000", "$ ls -la | grep 'a b'  >  /tmp/o.txt",
]  # fmt: skip
SPACES = [" ", "  ", "    ", "\n", "\n\n", "\n \n", "\t", " \t", "\r\n", "   \n"]


def sample_strings(tokenizer, count: int) -> list[str]:
    """Mixtures of prose, numbers, whitespace runs, scripts, code and special tokens, and rendered chats."""
    rng = random.Random(0)

    def number():
        return str(rng.randrange(10 ** rng.randrange(1, 9)))

    def piece():
        pool = (WORDS, WORDS, UNICODE, CODE, SPACES, SPACES, tokenizer.convert_ids_to_tokens(range(17)), [number()])
        return rng.choice(rng.choice(pool)) + rng.choice(["", " ", " ", rng.choice(SPACES)])

    strings = ["", " ", *SPACES, *UNICODE, *CODE]
    while len(strings) < count:
        text = "".join(piece() for _ in range(rng.randrange(1, 14)))
        if rng.randrange(5) == 0:
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": number()}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=rng.randrange(2) == 0)
        strings.append(text)
    return strings


LETTERS = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 324) if c != 173]
MERGES = ["1 2", "12 3", "Ġ a", "Ġ Ġ", "h e", "' s", "Ċ Ċ", "Ã ©", "e Ì"]
TOKENS = ["<s>", "<end>", "<think>", *LETTERS, *(m.replace(" ", "") for m in MERGES), "hero", "<pad>"]
TYPES = [3, 3, 4, *[1] * (len(TOKENS) - 4), 5]
TEXTS = [
    "1234 he's HE'S  a\n\n5", "a 12  3\r\n\r\nb", "e\u0301 é", "hero hero", "<think>a<end>", "x\t\ty!!\n?",
    "  a", "½²12",
]  # fmt: skip


def write(path: Path, architecture: str = "llama", **changes) -> Path:
    """A file that holds a tokenizer alone: byte-level BPE unless `changes` say otherwise."""
    values = {
        "model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, "token_type": TYPES, "merges": MERGES,
        "bos_token_id": 0, "eos_token_id": 1,
    } | changes  # fmt: skip
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
        elif value is not None:
            writer.add_string(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
