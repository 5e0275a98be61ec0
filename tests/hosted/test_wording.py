"""The parts of a text as its tokens come: whole characters, together what the tokenizer decodes."""

import random

import pytest
from support.chat_templates import make_tokenizer
from support.families import FAMILIES

from ftjax.hosted.wording import Text
from ftjax.sampling import stop_strings

TEXTS = [
    "Where is my order? It comes tomorrow.",
    " two  spaces,\n\n\ttabs and\r\nlines ",
    "Grüße aus 東京 — 🦒🦒 and 👩‍👩‍👧, naïve café",
    "東京都渋谷区" * 30,
    "🦒" * 60,
    "plain words again and again " * 20,
]
TOKENIZERS = {"bytes": make_tokenizer} | {
    name: FAMILIES[name].tokenizer for name in ("Llama 3.1", "Gemma 2", "Mistral v3", "Qwen 2.5") if name in FAMILIES
}


def parts_of(text, tokens, rng, most):
    out, tokens = [], list(tokens)
    while tokens:
        size = rng.randint(1, most)
        out.append(text.add(tokens[:size]))
        tokens = tokens[size:]
    return [*out, text.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_parts_are_together_what_the_tokenizer_decodes(name):
    tokenizer, rng = TOKENIZERS[name](), random.Random(0)
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for most in (1, 3, 40):
            made = Text(tokenizer)
            parts = parts_of(made, tokens, rng, most)
            assert "".join(parts) == made.text == whole
            assert [token.id for token in made.tokens] == tokens
            assert made.tokens[-1].end <= len(whole)
            if "\ufffd" not in whole:
                assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_tokens_at_all_give_one_text_however_they_come(name):
    tokenizer, rng = TOKENIZERS[name](), random.Random(1)
    for _ in range(20):
        tokens = [rng.randrange(len(tokenizer)) for _ in range(150)]
        texts = []
        for most in (1, 7, 200):
            made = Text(tokenizer)
            assert "".join(parts_of(made, tokens, rng, most)) == made.text
            texts.append(made.text)
        assert len(set(texts)) == 1


def test_nothing_of_a_stop_string_is_said():
    tokenizer, rng = make_tokenizer(), random.Random(2)
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        for _ in range(20):
            begin = rng.randrange(len(text))
            stops = [text[begin : begin + rng.randint(1, 5)], "never there"]
            ends = stop_strings.stops_at(stops, tokenizer)
            until = next(count for count in range(1, len(tokens) + 1) if ends(tokens[:count]))
            made, kept = Text(tokenizer, stops), stop_strings.before(text, stops)
            said = ""
            for part in parts_of(made, tokens[:until], rng, 4):
                said += part
                assert kept.startswith(said)
            assert said == made.text == kept
            assert made.cut
            assert all(token.start < len(kept) for token in made.tokens)


def test_special_tokens_are_no_text():
    tokenizer = make_tokenizer()
    ends = tokenizer.convert_tokens_to_ids(["<s>", "<|im_end|>"])
    tokens = tokenizer.encode("a lamp", add_special_tokens=False)
    made = Text(tokenizer)
    made.add([ends[0], *tokens, ends[1], *tokens])
    made.finish()
    assert made.text == "a lampa lamp"
