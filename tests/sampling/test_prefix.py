"""What many prompts begin with is read once: the same text and log-probabilities as of prompts that are read alone."""

import numpy as np
import pytest
from sampling.test_reuse import DRAWN, NEW, check_same, finish, made, text
from sampling.test_row_adapters import adapter
from support import printed_on_devices

from ftjax.sampling import engine, prefix
from ftjax.sampling.adapters import stack
from ftjax.sampling.engine import Engine, Request, generate
from ftjax.sampling.sizes import padded

SHOTS = 12  # tokens that prompts have in common


@pytest.fixture(autouse=True)
def few_are_worth_it(monkeypatch):
    monkeypatch.setattr(prefix, "SHORTEST", 4)
    monkeypatch.setattr(prefix, "WORTH", 16)


@pytest.fixture
def read(monkeypatch):
    """The shapes of prompts that are read, and where: of whole ones, or of what comes after a prefix."""
    shapes = []

    def record(name):
        original = getattr(engine.compiled, name)

        def recorded(model, variables, *args):
            start = int(args[1]) if name == "read_after" else 0
            shapes.append((start, int((args[-1].lengths > 1).sum()), int(args[-1].lengths.max())))
            return original(model, variables, *args)

        monkeypatch.setattr(engine.compiled, name, recorded)

    record("read")
    record("read_after")
    return shapes


def asked(shots, rests, **how):
    """A request for each rest of so many tokens, whose first tokens differ."""
    prompts = [np.concatenate([shots, [number], text(length - 1)]) for number, length in enumerate(rests)]
    return [Request(prompt.astype(np.int32), NEW, DRAWN, number=number, **how) for number, prompt in enumerate(prompts)]


def alone(model, variables, requests):
    return [finish(Engine(model, variables, 1), [request])[0] for request in requests]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_prompts_go_on_from_what_all_begin_with(name, read):
    """Windows and states as well; more prompts than slots, of which the later ones find it read; one token after it."""
    model, variables = made(name)
    requests = asked(text(SHOTS), [5, 1, 9, 3, 20, 1, 2])
    expected = alone(model, variables, requests)
    read.clear()
    check_same(finish(Engine(model, variables, 4), requests), expected)
    assert read[0] == (0, 1, SHOTS + 1)
    assert [start for start, *_ in read[1:]] == [SHOTS] * len(read[1:])
    assert len(read) > 2
    assert max(longest for *_, longest in read[1:]) == 20


def test_prompts_that_end_where_the_positions_do(read):
    """What pads them is beyond the positions that the model has a row for."""
    model, variables = made("gpt2")
    positions, shots = model.spec.max_position_embeddings, 35
    longest = positions - shots - NEW
    assert shots + padded(longest, 1, model) > positions
    requests = asked(text(shots), [longest - 1, 3, longest])
    completions = finish(Engine(model, variables, 3), requests)
    assert [start for start, *_ in read] == [0, shots]
    check_same(completions, alone(model, variables, requests))


def test_generate_reads_it_once(read):
    model, variables = made("llama")
    prompts = [request.prompt for request in asked(text(SHOTS), [3] * 10)]
    found = generate(model, variables, prompts, NEW, (), engine.Sampling(), batch_size=4)
    assert [start for start, *_ in read].count(0) == 1
    for one, prompt in zip(found, prompts, strict=True):
        check_same([one], generate(model, variables, [prompt], NEW, (), engine.Sampling()))


def test_samples_of_a_prompt_read_its_rest_once(read):
    """Groups of reinforcement learning under one system message."""
    model, variables = made("llama")
    requests = [
        Request(request.prompt, NEW, DRAWN, number=3 * number + sample)
        for number, request in enumerate(asked(text(SHOTS), [4, 6, 8]))
        for sample in range(3)
    ]
    completions = finish(Engine(model, variables, 9), requests)
    assert read == [(0, 1, SHOTS + 1), (SHOTS, 3, 8)]
    check_same(completions, alone(model, variables, requests))
    assert len({tuple(one.tokens) for one in completions}) == 9


def test_a_small_part_of_long_prompts_is_read_with_each(monkeypatch, read):
    """Attention over whole prompts has better kernels than that after a prefix."""
    model, variables = made("llama")
    requests = asked(text(SHOTS), [5, 2 * SHOTS + 1, 4])
    check_same(finish(Engine(model, variables, 3), requests), alone(model, variables, requests))
    assert read[0] == (0, 3, 3 * SHOTS + 1)
    monkeypatch.setattr(prefix, "LONGEST_REST", 8)
    read.clear()
    finish(Engine(model, variables, 2), asked(text(SHOTS), [5, 9]))
    assert read == [(0, 2, SHOTS + 9)]


def test_a_later_group_with_more_in_common_has_a_prefix_of_its_own(read):
    model, variables = made("llama")
    shots = text(SHOTS)
    near, far = asked(shots, [4, 5, 6]), asked(np.concatenate([shots, text(20)]), [9, 7, 8])
    many = Engine(model, variables, 3)
    check_same(finish(many, near), alone(model, variables, near))
    expected = alone(model, variables, far)
    read.clear()
    check_same(finish(many, far), expected)
    assert read == [(0, 1, SHOTS + 21), (SHOTS + 20, 3, 9)]


def test_another_adapter_and_another_length_of_ropes_are_not_gone_on_from(read):
    model, variables = made("llama")
    adapters = [adapter(model, "all-linear", 2, 1.0, seed) for seed in (1, 2, 3)]
    many = Engine(model, variables, 6, adapters=stack(model, variables, adapters[:2]))
    shots = text(SHOTS)

    def ask(which, its):
        requests = asked(shots, [3, 4, 5], adapter=which)
        beside = Engine(model, variables if its is None else variables | {"lora": its}, 1)
        plain = [Request(request.prompt, NEW, DRAWN, number=request.number) for request in requests]
        expected = [finish(beside, [request])[0] for request in plain]
        read.clear()
        check_same(finish(many, requests), expected)
        return [start for start, *_ in read]

    assert ask(0, adapters[0]) == [0, SHOTS]
    assert ask(0, adapters[0]) == [SHOTS]
    assert ask(1, adapters[1]) == [0, SHOTS]
    assert ask(None, None) == [0, SHOTS]
    assert ask(1, adapters[1]) == [0, SHOTS]
    many.set_adapter(1, adapters[2])
    assert ask(1, adapters[2]) == [0, SHOTS]

    # In turn, they are read together as before, and whole.
    read.clear()
    requests = [
        request for pair in zip(asked(shots, [3, 4, 5], adapter=0), asked(shots, [6, 7, 8])) for request in pair
    ]
    finish(many, requests)
    assert read == [(0, 6, SHOTS + 8)]

    model, variables = made("phi3")
    assert max(rope.long_after for rope in model.spec.ropes) == 8
    short = [Request(np.array([5, 6, 7, number], np.int32), 2, number=number) for number in range(9)]
    long = [Request(np.array([5, 6, 7, number], np.int32), 9, number=number) for number in range(9, 18)]
    one = Engine(model, variables, 18)
    check_same(finish(one, [*short, *long]), alone(model, variables, [*short, *long]))


def test_prompts_of_two_kinds_are_read_whole_or_each_after_its_own(read):
    model, variables = made("llama")
    ours, theirs = asked(text(SHOTS), [3] * 5), asked((text(SHOTS) + 1) % 61, [4] * 5)
    expected = alone(model, variables, [*ours, *theirs])
    for requests in ([*ours, *theirs], [one for pair in zip(ours, theirs) for one in pair]):
        order = [expected[[*ours, *theirs].index(request)] for request in requests]
        check_same(finish(Engine(model, variables, 2), requests), order)


@pytest.mark.parametrize(
    ("common", "rests", "found"),
    [(12, [1, 2, 3], 12), (12, [1], 0), (12, [1, 1], 0), (12, [0, 1, 2, 5], 11)],
    ids=["three", "one", "too little to gain", "up to the last token of one"],
)
def test_how_many_tokens_prompts_have_in_common(common, rests, found):
    beginning = text(common)
    prompts = [np.concatenate([beginning, 61 + number + np.arange(length)]) for number, length in enumerate(rests)]
    assert prefix.in_common(prompts) == found


MESH_PROGRAM = """
import jax, numpy as np
from ftjax import sharding
from ftjax.models.params import abstract_params
from ftjax.sampling import engine, prefix
from sampling.test_prefix import SHOTS, alone, asked
from sampling.test_reuse import check_same, finish, made, text

prefix.SHORTEST, prefix.WORTH = 4, 16
model, variables = made("llama")
mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
layouts = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
placed = {"params": jax.device_put(variables["params"], layouts)}
requests = asked(text(SHOTS), [3, 5, 1, 4, 7])
with jax.set_mesh(mesh):
    said = finish(engine.Engine(model, placed, 4), requests)
    assert engine.compiled.read_after._cache_size()
with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
    check_same(said, alone(model, variables, requests))
print("same")
"""


def test_on_a_mesh_as_on_one_device():
    assert printed_on_devices(MESH_PROGRAM, 4).endswith("same\n")
