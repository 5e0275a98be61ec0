"""A prompt that begins as an ended row goes on from what that left: the same text and log-probs, only the rest read."""

import logging

import jax
import numpy as np
import pytest
from sampling.test_row_adapters import adapter
from support import printed_on_devices
from support.family_configs import CONFIGS
from support.tiny import numpy_params

from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.sampling import engine
from ftjax.sampling.adapters import stack
from ftjax.sampling.engine import Engine, Request, conversation, stream_from
from ftjax.sampling.sampler import Sampling

NEW = 6
DRAWN = Sampling(temperature=1.0, top_k=30, seed=3)
rng = np.random.default_rng(0)


def made(name, **changes):
    model = Decoder(spec_from_config(CONFIGS[name] | changes))
    return model, {"params": numpy_params(model)}


def text(length):
    return rng.integers(0, 61, length).astype(np.int32)


def finish(made_, requests):
    numbers, completions = [made_.add(request) for request in requests], {}
    while made_.busy:
        completions |= made_.step()[1]
    return [completions[number] for number in numbers]


def check_same(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        for name in ("logps", "tempered_logps", "full_logps"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5)


@pytest.fixture
def parts(monkeypatch):
    """(first, how many) of each part that is read on."""
    read, original = [], engine.compiled.read_on
    recorded = lambda *args: read.append((int(args[-2]), int(args[-1]))) or original(*args)  # noqa: E731
    monkeypatch.setattr(engine.compiled, "read_on", recorded)
    return read


def talk(made_, variables, model, turns, **how):
    """Turns of so many tokens, each after all before it; the completions beside those of an engine without a past."""
    so_far = np.zeros(0, np.int32)
    for number, length in enumerate(turns):
        request = Request(np.concatenate([so_far, text(length)]), NEW, number=number, **how)
        (ours,) = finish(made_, [request])
        check_same([ours], finish(Engine(model, variables, 1), [request]))
        so_far = np.concatenate([request.prompt, ours.tokens])
    return so_far


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_turn_reads_only_what_is_new_and_says_the_same(name, parts):
    model, variables = made(name)
    talk(conversation(model, variables, ()), variables, model, [9, 4, 1, 7], sampling=DRAWN)
    # Without the last token of a prompt, which is read as the next one is chosen, as the last of an answer was not.
    assert parts == [(0, 8), (8 + NEW, 4), (12 + 2 * NEW, 1), (13 + 3 * NEW, 7)]


def test_a_turn_that_ends_where_the_positions_do(parts):
    """What pads its last part is beyond the positions that the model has a row for."""
    model, variables = made("gpt2")
    positions = model.spec.max_position_embeddings
    turns = [9, positions - 13 - 3 * NEW, 4]
    talk(conversation(model, variables, ()), variables, model, turns)
    assert sum(parts[-1]) + min(engine.LENGTHS, engine.PART) > positions


def test_long_ropes_other_frequencies_are_read_anew(parts):
    model, variables = made("phi3")
    assert max(rope.long_after for rope in model.spec.ropes) == 8
    one = conversation(model, variables, ())
    (first,) = finish(one, [Request(text(3), 2)])
    talk(one, variables, model, [9, 4])
    short = Request(np.array([5, 6, 7], np.int32), 2)
    check_same(finish(one, [short]), finish(Engine(model, variables, 1), [short]))
    grown = Request(np.array([5, 6, 7, 8, 9, 10, 11], np.int32), 4)
    check_same(finish(one, [grown]), finish(Engine(model, variables, 1), [grown]))
    assert [start for start, _ in parts] == [0, 0, 8 + NEW, 0, 0]
    assert len(first.tokens) == 2


def test_what_differs_from_what_was_said_is_read_from_there_on(parts):
    model, variables = made("llama")
    one, prompt = conversation(model, variables, ()), text(20)
    finish(one, [Request(prompt, NEW)])
    other = np.concatenate([prompt[:12], (prompt[12:15] + 1) % 61])
    for asked in (other, prompt[:7], other[:7]):
        check_same(finish(one, [Request(asked, NEW)]), finish(Engine(model, variables, 1), [Request(asked, NEW)]))
    assert parts == [(0, 19), (12, 2)]


def test_a_row_that_its_text_ended_while_the_device_went_on(parts):
    model, variables = made("llama")
    one, prompt = conversation(model, variables, ()), text(9)
    (said,) = finish(one, [Request(prompt, 12, stops_at=lambda tokens: len(tokens) == 3)])
    assert len(said.tokens) == 3
    turn = Request(np.concatenate([prompt, said.tokens, text(4)]), NEW)
    check_same(finish(one, [turn]), finish(Engine(model, variables, 1), [turn]))
    assert parts == [(0, 8), (11, 4)]


def test_conversations_that_share_slots_keep_their_own(parts, monkeypatch):
    monkeypatch.setattr(engine, "REUSED", 8)
    model, variables = made("llama")
    many, samplings = Engine(model, variables, 4, reuse=True), [engine.Sampling(), DRAWN, engine.Sampling()]
    prompts = [text(10 + 3 * i) for i in range(3)]
    for turn in range(3):
        order = np.roll(np.arange(3), turn)
        requests = [Request(prompts[i], NEW, samplings[i], number=int(i)) for i in order]
        completions = finish(many, requests)
        check_same(completions, finish(Engine(model, variables, 1), requests))
        read = sorted(parts)
        assert len(read) == (0 if turn == 0 else 3), "the first turns are read together"
        assert [start for start, _ in read] == ([] if turn == 0 else sorted(len(prompt) - 5 for prompt in prompts))
        parts.clear()
        for i, completion in zip(order, completions):
            prompts[i] = np.concatenate([prompts[i], completion.tokens, text(4)])


def test_samples_of_one_turn_read_its_rest_once(parts, monkeypatch):
    monkeypatch.setattr(engine, "REUSED", 8)
    model, variables = made("llama")
    many, prompt = Engine(model, variables, 3, reuse=True), text(12)
    (said,) = finish(many, [Request(prompt, NEW)])
    turn = np.concatenate([prompt, said.tokens, text(5)])
    requests = [Request(turn, NEW, DRAWN, number=number) for number in range(3)]
    completions = finish(many, requests)
    check_same(completions, finish(Engine(model, variables, 3), requests))
    assert len({tuple(one.tokens) for one in completions}) == 3
    assert parts == [(17, 5)]


def test_few_tokens_in_common_are_read_together_with_the_others(parts):
    model, variables = made("llama")
    many, prompt = Engine(model, variables, 2, reuse=True), text(40)
    finish(many, [Request(prompt, NEW)])
    turn = Request(np.concatenate([prompt, text(3)]), NEW)
    check_same(finish(many, [turn]), finish(Engine(model, variables, 1), [turn]))
    assert parts == []


def test_what_another_adapter_left_is_not_gone_on_from(parts):
    model, variables = made("llama")
    adapters = [adapter(model, "all-linear", 2, 1.0, seed) for seed in (1, 2, 3)]
    one = Engine(model, variables, 1, adapters=stack(model, variables, adapters[:2]), reuse=True)
    prompt = text(10)

    def ask(which, its):
        alone = Engine(model, variables if its is None else variables | {"lora": its}, 1)
        check_same(finish(one, [Request(prompt, NEW, adapter=which)]), finish(alone, [Request(prompt, NEW)]))

    ask(0, adapters[0])
    ask(0, adapters[0])  # again: nothing is read
    ask(1, adapters[1])
    ask(None, None)
    ask(1, adapters[1])
    one.set_adapter(1, adapters[2])
    ask(1, adapters[2])
    assert parts == [(0, 9)] * 5


def test_no_turn_after_the_first_compiles_anything(caplog):
    model, variables = made("llama")
    device = jax.devices()[0]
    variables = jax.device_put(variables, device)  # as a model that was loaded, on a device that is named
    one = conversation(model, variables, ())
    so_far = text(9)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for turn in range(5):
            said = list(stream_from(one, Request(so_far, 5, DRAWN if turn % 2 else engine.Sampling())))
            so_far = np.concatenate([so_far, said, text(1 + 2 * turn)]).astype(np.int32)
            compiled = [record.message for record in caplog.records if "Finished XLA compilation" in record.message]
            caplog.clear()
            assert bool(compiled) == (turn == 0), compiled


MESH_PROGRAM = """
import jax, numpy as np
from ftjax import sharding
from ftjax.models.params import abstract_params
from ftjax.sampling import engine
from sampling.test_reuse import check_same, finish, made, text

engine.REUSED = 8
model, variables = made("llama")
mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
layouts = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
placed = {"params": jax.device_put(variables["params"], layouts)}
prompts, programs = [text(10), text(13)], []
with jax.set_mesh(mesh):
    many = engine.Engine(model, placed, 2, reuse=True)
    for turn in range(4):
        sizes = [getattr(engine.compiled, name)._cache_size() for name in ("row", "read_on", "enter", "decode")]
        asked = [engine.Request(prompt, 5) for prompt in prompts]
        said = finish(many, asked)
        prompts = [np.concatenate([prompt, one.tokens, text(3)]) for prompt, one in zip(prompts, said)]
        with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
            check_same(said, finish(engine.Engine(model, variables, 2), asked))
        programs.append(sizes)
    assert [sizes[1] for sizes in programs] == [0, 0, 1, 1], programs
    assert programs[2] == programs[3]
print("same")
"""


def test_a_mesh_goes_on_as_one_device():
    assert printed_on_devices(MESH_PROGRAM, 4).endswith("same\n")
