"""Stop strings: against transformers' `stop_strings`, and against the definition over random texts and strings."""

import numpy as np
import pytest
import torch
from support.chat_templates import CHATML, make_tokenizer
from support.tiny import numpy_params, spec
from transformers import LlamaConfig, LlamaForCausalLM

from ftjax.errors import UserError
from ftjax.generate import stream_text
from ftjax.models.decoder import Decoder
from ftjax.sampling import slots
from ftjax.sampling.engine import Engine, Request, generate, stream
from ftjax.sampling.sampler import Sampling
from ftjax.sampling.stop_strings import UNFINISHED, before, settled, stops_at

NEW = 24
DRAWN = Sampling(1.5, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML)


@pytest.fixture(scope="module")
def ours(tokenizer):
    model = Decoder(spec(vocab_size=len(tokenizer), max_position_embeddings=64))
    return model, {"params": numpy_params(model)}


def first_end(tokens, strings, tokenizer):
    """How many tokens there are when the text first has one of the strings; None where it never has."""
    texts = (tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(1, len(tokens) + 1))
    return next((n for n, text in enumerate(texts, 1) if any(string in text for string in strings)), None)


def test_a_row_ends_with_the_first_token_after_which_its_text_has_a_string(tokenizer):
    """Texts of characters of one to four bytes, special tokens among them, as whatever tokens there are."""
    random = np.random.default_rng(0)
    pieces = np.array(["a", "b", "ab", " ", "\n", "é", "漢", "😀", "the", ", "])
    found = 0
    for _ in range(150):
        text = "".join(random.choice(pieces, 40))
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        for at in random.integers(0, len(tokens), 3):
            tokens.insert(int(at), tokenizer.all_special_ids[0])
        strings = ["".join(random.choice(pieces, random.integers(1, 7))) for _ in range(2)]
        expected = first_end(tokens, strings, tokenizer)
        ends = stops_at(strings, tokenizer)
        assert next((n for n in range(1, len(tokens) + 1) if ends(tokens[:n])), None) == expected
        found += expected is not None
    assert 50 < found < 150


def test_what_streams_is_what_is_kept_and_nothing_is_taken_back():
    random = np.random.default_rng(1)
    for _ in range(300):
        text = "".join(random.choice(list("abc"), 12))
        strings = ["".join(random.choice(list("abc"), random.integers(1, 5))) for _ in range(2)]
        ends = [n for n in range(13) if any(text[:n].endswith(string) for string in strings)]
        whole = text[: ends[0]] if ends else text
        longest = max((len(string) for string in strings if whole.endswith(string)), default=0) if ends else 0
        assert before(text, strings) == whole[: len(whole) - longest]
        shown = ""
        for n in range(len(whole) + 1):
            assert settled(text[:n], strings).startswith(shown)
            shown = settled(text[:n], strings)
        assert before(whole, strings).startswith(shown)


def whole(text, size):
    """A part of a text, not at its beginning, of whole characters."""
    places = range(4, len(text) - size)
    return next(text[i : i + size] for i in places if UNFINISHED not in text[i : i + size])


def test_rows_that_end_by_text_make_room_and_are_those_that_ran_on(ours, tokenizer):
    """One slot, three prompts; the strings are of what the rows say when nothing ends them."""
    random = np.random.default_rng(2)
    prompts = [random.integers(0, len(tokenizer), n).astype(np.int32) for n in (5, 9, 3)]
    free = generate(*ours, prompts, NEW, (), DRAWN, batch_size=1)
    texts = [tokenizer.decode(one.tokens, skip_special_tokens=True) for one in free]
    strings = [whole(texts[0], 2), whole(texts[2], 3)]
    ends = stops_at(strings, tokenizer)
    made = generate(*ours, prompts, NEW, (), DRAWN, batch_size=1, stops_at=ends)
    for one, longer in zip(made, free, strict=True):
        expected = first_end(longer.tokens.tolist(), strings, tokenizer)
        np.testing.assert_array_equal(one.tokens, longer.tokens[:expected])
        np.testing.assert_array_equal(one.logps, longer.logps[:expected])
        assert one.stopped == (expected is not None)
    assert sum(one.stopped for one in made) >= 2
    streamed = list(stream(*ours, prompts[0], NEW, (), DRAWN, ends))
    assert streamed == made[0].tokens.tolist()
    text = tokenizer.decode(streamed, skip_special_tokens=True)
    assert "".join(stream_text(tokenizer, iter(streamed), strings)) == before(text, strings)


def test_a_freed_slot_stays_idle_and_nothing_compiles(ours, tokenizer):
    model, variables = ours
    engine = Engine(model, variables, 2)
    prompt = np.arange(4, dtype=np.int32)
    engine.add(Request(prompt, NEW, DRAWN, stops_at=lambda tokens: len(tokens) == 2))
    engine.add(Request(prompt, NEW, DRAWN, number=1))
    engine.step()
    assert [row is None for row in engine._rows] == [True, False]
    programs = slots.decode._cache_size()
    engine.step(limit=1)
    assert slots.decode._cache_size() == programs
    assert np.asarray(engine._slots.active).tolist() == [False, True]


def test_transformers_ends_the_same_greedy_text_at_the_same_token(tokenizer):
    """Its `stop_strings` keep the string, and the whole token that completes it, as `rollouts.stop_strings` do."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, eos_token_id=None, pad_token_id=0, **sizes)
    model = LlamaForCausalLM(config).eval()
    inputs = torch.arange(1, 6)[None]
    given = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 40, "do_sample": False}
    free = model.generate(inputs, **given)[0, 5:].tolist()
    text = tokenizer.decode(free, skip_special_tokens=True)
    for strings in ([whole(text, 2)], [whole(text[8:], 3), "never"]):
        theirs = model.generate(inputs, **given, stop_strings=strings, tokenizer=tokenizer)[0, 5:].tolist()
        ends = stops_at(strings, tokenizer)
        assert next(n for n in range(1, 41) if ends(free[:n])) == len(theirs) < 40


@pytest.mark.parametrize("string", ["", "\ufffd", "a<|im_end|>", "a" * 1001])
def test_what_no_text_ends_with_is_refused(tokenizer, string):
    with pytest.raises(UserError, match="--stop: "):
        stops_at([string], tokenizer)
