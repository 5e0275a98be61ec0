"""Generation, held against transformers' `generate` (torch) and against itself: batched, alone, streamed, on a mesh."""

import itertools

import jax
import numpy as np
import pytest
import torch
from support import printed_on_devices
from support.filters import transformers_filter
from transformers import LlamaConfig, LlamaForCausalLM

from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.sampling import engine, sizes
from ftjax.sampling.engine import generate, stream
from ftjax.sampling.sampler import Sampling
from ftjax.tree import unflatten

GREEDY = Sampling()
DRAWN = Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=5)
NEW = 12


@pytest.fixture(scope="module")
def torch_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # large, so that the choices are clear and not a matter of rounding
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ours(torch_model):
    return Decoder(spec_from_config(torch_model.config.to_dict())), {"params": params_of(torch_model)}


@pytest.fixture(scope="module")
def prompts(torch_model):
    random = np.random.default_rng(1)
    return [random.integers(0, 131, length).astype(np.int32) for length in (3, 20, 1, 7, 16, 30, 17)]


def params_of(torch_model):
    """The torch model's weights in ftjax's tree: layers stacked, linear weights transposed."""
    weights = {name: tensor.detach().numpy() for name, tensor in torch_model.state_dict().items()}
    leaves = {
        "embed_tokens/embedding": weights["model.embed_tokens.weight"],
        "norm/scale": weights["model.norm.weight"],
        "lm_head/kernel": weights["lm_head.weight"].T,
    }
    for name in [name for name in weights if name.startswith("model.layers.0.")]:
        module = name.removeprefix("model.layers.0.").removesuffix(".weight")
        layers = torch_model.config.num_hidden_layers
        stacked = np.stack([weights[f"model.layers.{i}.{module}.weight"].T for i in range(layers)])
        leaves[f"layers/{module.replace('.', '/')}/{'scale' if 'norm' in module else 'kernel'}"] = stacked
    return unflatten(leaves)


def torch_generate(model, prompt, count, **options):
    """Tokens after the prompt, by transformers: greedy, one prompt at a time, without padding."""
    inputs = torch.tensor(prompt[None].astype(np.int64))
    with torch.no_grad():
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False, **options
        )
    return out[0, len(prompt) :].numpy()


def rows(completions):
    return [completion.tokens.tolist() for completion in completions]


def test_greedy_tokens_are_those_of_transformers(torch_model, ours, prompts):
    completions = generate(*ours, prompts, NEW, (), GREEDY, batch_size=3)
    assert rows(completions) == [torch_generate(torch_model, prompt, NEW).tolist() for prompt in prompts]
    assert all(c.tokens.dtype == np.int32 and len(c.tokens) == NEW and not c.stopped for c in completions)


@pytest.mark.parametrize("sampling", [pytest.param(GREEDY, marks=pytest.mark.slow), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_a_rows_tokens_do_not_depend_on_the_batch_it_is_in(ours, prompts, sampling, batch_size):
    in_threes = rows(generate(*ours, prompts, NEW, (), sampling, batch_size=3))
    assert rows(generate(*ours, prompts, NEW, (), sampling, batch_size)) == in_threes


def test_a_draw_depends_on_the_seed_and_on_the_prompts_number(ours, prompts):
    same = [prompts[0]] * 3
    first, again = (rows(generate(*ours, same, NEW, (), DRAWN)) for _ in range(2))
    other_seed = rows(generate(*ours, same, NEW, (), Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=6)))
    assert first == again
    assert len({tuple(row) for row in first + other_seed}) == 6


def test_every_stop_token_ends_a_row_and_is_left_out(torch_model, ours, prompts):
    free = [torch_generate(torch_model, prompt, NEW) for prompt in prompts]
    stops = (int(free[0][4]), int(free[1][2]), int(free[3][NEW - 1]))
    completions = generate(*ours, prompts, NEW, stops, GREEDY, batch_size=3)
    expected = [list(itertools.takewhile(lambda token: token not in stops, row.tolist())) for row in free]
    assert rows(completions) == expected
    assert [c.stopped for c in completions] == [len(tokens) < NEW for tokens in expected]
    assert {c.stopped for c in completions} == {True, False}
    by_transformers = torch_generate(torch_model, prompts[0], NEW, eos_token_id=list(stops))
    assert [*expected[0], by_transformers[-1]] == by_transformers.tolist()


def steps_of(decoded, monkeypatch):
    """Records what `slots.decode` did in `decoded`: (steps that it took, rows that were there in each)."""
    decode = engine.compiled.decode

    def recorded(*args):
        out = decode(*args)
        there = np.asarray(out[2])
        decoded.append((int(there.any(axis=1).sum()), there.sum(axis=1)))
        return out

    monkeypatch.setattr(engine.compiled, "decode", recorded)


def test_decoding_ends_when_every_row_has_stopped(ours, prompts, monkeypatch):
    model, variables = ours
    chosen = generate(model, variables, prompts[:1], NEW, (), GREEDY)[0].tokens
    later = next(i for i in range(1, NEW) if chosen[i] not in chosen[:i])
    decoded = []
    steps_of(decoded, monkeypatch)
    for last in (0, later):
        assert rows(generate(model, variables, prompts[:1], NEW, (chosen[last],), GREEDY)) == [chosen[:last].tolist()]
    assert [steps for steps, _ in decoded] == [1, later + 1]


def test_a_row_that_ends_makes_room_at_once_and_the_next_one_is_the_same_as_alone(ours, prompts, monkeypatch):
    """Rows of other lengths, prompts, settings, stop tokens and biases pass through three slots."""
    random = np.random.default_rng(3)
    requests = [
        engine.Request(prompts[i % 7], int(n), GREEDY if i % 3 else DRAWN, (i,), i, {int(b): 3.0} if i % 2 else {})
        for i, (n, b) in enumerate(zip(random.integers(1, 30, 12), random.integers(0, 131, 12)))
    ]
    alone = [complete(ours, [request], 1)[0] for request in requests]
    decoded = []
    steps_of(decoded, monkeypatch)
    together = complete(ours, requests, 3)
    assert rows(together) == rows(alone)
    assert [one.stopped for one in together] == [one.stopped for one in alone]
    for one, other in zip(together, alone):
        np.testing.assert_allclose(one.logps, other.logps, rtol=1e-4, atol=1e-5)
    assert len({len(one.tokens) for one in together}) > 5
    busy = np.concatenate([there[:steps] for steps, there in decoded])
    waited = busy[: len(busy) - 30]  # at the end nothing is left to fill slots with
    assert waited.mean() > 0.9 * 3


def complete(ours, requests, slots):
    made = engine.Engine(*ours, slots, biases=1)
    for request in requests:
        made.add(request)
    completions = {}
    while made.busy:
        completions |= made.step()[1]
    return [completions[i] for i in range(len(requests))]


def test_the_same_prompt_with_other_ends_and_fewer_slots_and_a_stop_token_that_ends_the_prompt(ours, prompts):
    prompt, most = prompts[0], [5, 1, 3, 5, 1]
    expected = complete(ours, [engine.Request(prompt, 5)], 1)[0].tokens.tolist()
    assert prompt[-1] not in expected
    requests = [engine.Request(prompt, count, stop_tokens=(int(prompt[-1]),)) for count in most]
    assert rows(complete(ours, requests, 3)) == [expected[:count] for count in most]
    with pytest.raises(ValueError, match="for 8 stop tokens"):
        engine.Engine(*ours, 2).add(engine.Request(prompt, 1, stop_tokens=range(9)))


def test_a_row_near_its_end_needs_no_room_for_what_another_is_to_say(ours, prompts, monkeypatch):
    monkeypatch.setattr(engine.compiled, "grow", None)  # beyond the model's 64 positions
    long = np.concatenate(prompts)[:60]
    made = complete(ours, [engine.Request(long, 4), engine.Request(long[:3], 20)], 3)
    assert [len(one.tokens) for one in made] == [4, 20]


def test_equal_prompts_are_read_once(ours, prompts, monkeypatch):
    read = []
    original = engine.compiled.read
    monkeypatch.setattr(engine.compiled, "read", lambda *args: read.append(args[2].lengths) or original(*args))
    same = [prompts[0]] * 4 + [prompts[3]]
    made = complete(ours, [engine.Request(p, NEW - i % 2, DRAWN, (), i) for i, p in enumerate(same)], 5)
    assert [lengths.tolist() for lengths in read] == [[3, 7]]
    assert len({tuple(row) for row in rows(made)}) == 5


def test_a_long_prompt_is_read_in_parts_with_the_same_result(ours, torch_model, prompts, monkeypatch, record_figure):
    prompt = np.concatenate(prompts)[:50]
    whole = generate(*ours, [prompt], NEW, (), GREEDY)[0]
    monkeypatch.setattr(engine, "PART", 16)
    parts = []
    original = engine.compiled.read_on
    monkeypatch.setattr(engine.compiled, "read_on", lambda *args: parts.append(int(args[-1])) or original(*args))
    in_parts = generate(*ours, [prompt, prompts[0]], NEW, (), GREEDY)
    assert parts == [16, 16, 16, 1]  # the last token is read as the next one is chosen
    assert in_parts[0].tokens.tolist() == whole.tokens.tolist() == torch_generate(torch_model, prompt, NEW).tolist()
    difference = np.abs(in_parts[0].full_logps - whole.full_logps).max()
    record_figure("log-probabilities", difference)
    assert difference < 1e-5
    assert in_parts[1].tokens.tolist() == torch_generate(torch_model, prompts[0], NEW).tolist()


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(0.7, seed=1), Sampling(1.4, top_k=20, top_p=0.9, seed=2), Sampling(1, min_p=0.1)]
)
def test_the_log_probabilities_are_those_of_a_forward_pass(torch_model, ours, prompts, sampling, record_figure):
    """Under the distribution that was drawn from, and under the whole one; the stop token's too."""
    stop = int(generate(*ours, prompts[3:4], NEW, (), sampling)[0].tokens[5])
    worst = 0.0
    for prompt, made in zip(prompts, generate(*ours, prompts, NEW, (stop,), sampling, batch_size=4)):
        tokens = [*made.tokens.tolist(), *([made.stop_token] if made.stopped else [])]
        assert len(made.logps) == len(made.full_logps) == len(tokens)
        with torch.no_grad():
            logits = torch_model(torch.tensor([[*prompt.tolist(), *tokens]])).logits[0, len(prompt) - 1 : -1]
        places = range(len(tokens)), tokens
        full = torch.log_softmax(logits.double(), -1)[places].numpy()
        kept = full * 0
        if sampling.temperature:
            kept = torch.log_softmax(torch.tensor(transformers_filter(logits.numpy(), sampling)).double(), -1)
            kept = kept[places].numpy()
        worst = max(worst, np.abs(made.full_logps - full).max(), np.abs(made.logps - kept).max())
    record_figure(f"{sampling.temperature}", worst)
    assert worst < 1e-4


def test_slots_grow_with_their_rows(ours, prompts, torch_model, monkeypatch):
    monkeypatch.setattr(sizes, "CAPACITY", 8)
    capacities = []
    original = engine.compiled.grow
    monkeypatch.setattr(engine.compiled, "grow", lambda *args: capacities.append(args[1]) or original(*args))
    monkeypatch.setattr(engine, "DISPATCH", 4)
    made = generate(*ours, prompts[:3], 25, (), GREEDY)
    assert capacities == [64]  # of 32, for the longest prompt
    assert rows(made) == [torch_generate(torch_model, prompt, 25).tolist() for prompt in prompts[:3]]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_stream_yields_what_the_batch_returns(ours, prompts, sampling):
    for prompt in prompts[:4]:
        whole = rows(generate(*ours, [prompt], NEW, (), sampling))[0]
        assert list(stream(*ours, prompt, NEW, (), sampling)) == whole
        stops = (whole[3], whole[7])
        cut = rows(generate(*ours, [prompt], NEW, stops, sampling))[0]
        assert list(stream(*ours, prompt, NEW, stops, sampling)) == cut
        assert len(cut) < len(whole)


def test_the_adapters_take_part(ours, prompts):
    model, variables = ours
    kernel = variables["params"]["layers"]["mlp"]["down_proj"]["kernel"]
    random = np.random.default_rng(2)
    a = random.standard_normal((3, kernel.shape[1], 4)).astype(np.float32)
    b = random.standard_normal((3, 4, kernel.shape[2])).astype(np.float32)
    adapter = {"lora_a": a, "lora_b": b, "lora_scale": np.full(3, 0.1, np.float32)}
    adapted = variables | {"lora": {"layers": {"mlp": {"down_proj": adapter}}}}
    merged = jax.tree.map(np.copy, variables)
    merged["params"]["layers"]["mlp"]["down_proj"]["kernel"] += 0.1 * a @ b
    completions = rows(generate(model, adapted, prompts[:3], NEW, (), GREEDY))
    assert completions == rows(generate(model, merged, prompts[:3], NEW, (), GREEDY))
    assert completions != rows(generate(model, variables, prompts[:3], NEW, (), GREEDY))


def test_no_setting_compiles_anything_and_a_longer_turn_rarely(ours, prompts):
    def shapes():
        functions = ("empty", "read", "enter", "decode", "grow")
        return sum(getattr(engine.compiled, name)._cache_size() for name in functions)

    def call(sampling, stops, count=NEW, prompt=prompts[0]):
        generate(Decoder(ours[0].spec), ours[1], prompts[:3], count, stops, sampling)
        list(stream(*ours, prompt, count, stops, sampling))

    call(DRAWN, (1,))
    before = shapes()
    call(Sampling(0.3, top_k=2, top_p=0.4, seed=1, min_p=0.1), (2, 3))
    call(GREEDY, (), count=3)
    # Turns of a chat, each with all before it.
    for length in range(4, 32, 3):
        list(stream(*ours, np.arange(length, dtype=np.int32), NEW, (), GREEDY))
    assert shapes() == before


def test_progress_counts_prompts(ours, prompts):
    seen = []
    generate(*ours, prompts, NEW, (), GREEDY, batch_size=3, on_progress=lambda *counts: seen.append(counts))
    assert seen == [(3, 7), (6, 7), (7, 7)]  # all of one length, so three at a time


def test_no_prompts_no_completions(ours):
    assert generate(*ours, [], NEW, (), GREEDY) == []


def test_a_prompt_may_fill_the_positions_to_the_last(torch_model, ours):
    prompt = np.arange(64 - NEW, dtype=np.int32)
    assert rows(generate(*ours, [prompt], NEW, (), GREEDY)) == [torch_generate(torch_model, prompt, NEW).tolist()]


@pytest.mark.parametrize(
    ("prompt", "count", "stops", "message"),
    [
        ([], NEW, (), "prompt 1 is empty"),
        ([131], NEW, (), "prompt 1 has token ids outside the model's vocabulary of 131"),
        ([-1], NEW, (), "prompt 1 has token ids outside"),
        (range(60), 5, (), "60 tokens.*max_new_tokens=5.*64 positions; shorten the prompt or lower max_new_tokens"),
        (range(64), 1, (), "64 tokens.*64 positions"),
        ([1], 0, (), "max_new_tokens=0"),
        ([1], 4, (2, 131), r"stop tokens \[131\]"),
    ],
)
def test_what_cannot_be_generated_is_refused(ours, prompts, prompt, count, stops, message):
    prompt = np.array(prompt, np.int32)
    with pytest.raises(UserError, match=message):
        generate(*ours, [prompts[0], prompt], count, stops, GREEDY)
    with pytest.raises(UserError, match=message.replace("prompt 1", "prompt 0")):
        stream(*ours, prompt, count, stops, GREEDY)


def test_a_batch_size_below_one_is_refused(ours, prompts):
    with pytest.raises(UserError, match="batch_size=0"):
        generate(*ours, prompts, NEW, (), GREEDY, batch_size=0)


MESH_PROGRAM = """
import sys
import jax, numpy as np
from ftjax import sharding
from ftjax.models.decoder import Decoder
from ftjax.models.params import abstract_params
from ftjax.models.families import spec_from_config
from ftjax.sampling import slots
from ftjax.sampling.engine import generate, stream
from ftjax.sampling.sampler import Sampling
from support.tiny import random_params

sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
spec = spec_from_config({"model_type": "llama", **sizes, **heads, "max_position_embeddings": 64})
model = Decoder(spec)
random = np.random.default_rng(0)
prompts = [random.integers(0, 96, length).astype(np.int32) for length in (5, 9, 1, 17, 3)]

def tokens(sizes, devices, parts):
    mesh = sharding.make_mesh(sizes, devices)
    variables = {"params": random_params(model, 0, abstract_params(model, mesh))}
    # Random weights of the usual size give almost equal logits; larger ones make the choices clear.
    variables = jax.tree.map(lambda leaf: 8 * leaf, variables)
    kernel = variables["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert len(kernel.sharding.device_set) == len(devices)
    assert kernel.addressable_shards[0].data.size == kernel.size // parts
    with jax.set_mesh(mesh):
        greedy = [c.tokens.tolist() for c in generate(model, variables, prompts, 10, (), Sampling())]
    # Sharded weights alone will do: the mesh need not be set.
    drawn = list(stream(model, variables, prompts[1], 10, (), Sampling(temperature=1.0, top_p=0.9, seed=3)))
    return [*greedy, drawn]

one = tokens({}, jax.devices()[:1], parts=1)
print(one)
assert one == tokens({"fsdp": 4, "tensor": 2}, jax.devices(), parts=8)
assert len({tuple(row) for row in one}) == 6 and len(set(one[0])) > 1

# What the planner takes for the slots is what they are.
mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
said = slots.abstract(model, 6, 32, 8, 0, mesh)
with jax.set_mesh(mesh):
    real = slots.empty(model, 6, 32, 8, 0)
for one, other in zip(jax.tree.leaves(said), jax.tree.leaves(real), strict=True):
    assert one.dtype == other.dtype and one.sharding.shard_shape(one.shape) == other.addressable_shards[0].data.shape
keys = jax.tree.leaves(real.cache.keys)[0]
assert keys.addressable_shards[0].data.size == keys.size // 4
print("same tokens")
"""


def test_a_mesh_generates_the_tokens_of_one_device():
    assert printed_on_devices(MESH_PROGRAM, 8).endswith("same tokens\n")
