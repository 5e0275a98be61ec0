"""Rows of one batch with adapters of their own: each as with that adapter alone, and as in the real peft."""

import functools
import logging

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import printed_on_devices
from support.family_configs import CONFIGS
from support.tiny import numpy_params, one_device
from support.torch_models import torch_model

from ftjax import lora, quant, tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params, logical_axes, shapes
from ftjax.sampling import engine
from ftjax.sampling.adapters import stack
from ftjax.sampling.engine import Engine, Request
from ftjax.sampling.sampler import Sampling
from ftjax.weights.load import load_params
from ftjax.weights.peft.adapter import open_adapter
from ftjax.weights.source import open_source

NEW = 10
DRAWN = Sampling(temperature=1.0, top_k=30, seed=3)
UNTIED = CONFIGS["llama"] | {"tie_word_embeddings": False}


def made(config):
    model = Decoder(spec_from_config(config))
    return model, {"params": numpy_params(model)}


def adapter(model, targets, rank, scale, seed=0):
    """As lora.py has it, so large that it changes what the model says."""
    rng, params = np.random.default_rng(seed), abstract_params(model, one_device())
    paths = lora.find_targets(targets, lora.adaptable(tree.flatten(params)))
    leaves = tree.flatten(lora.abstract_adapters(params, logical_axes(model), paths, rank, one_device()))
    sizes = {"lora_a": 0.3, "lora_b": 0.3}
    return tree.unflatten(
        {
            path: np.full(leaf.shape, scale, np.float32)
            if path.endswith("scale")
            else (sizes[path[-6:]] * rng.standard_normal(leaf.shape)).astype(np.float32)
            for path, leaf in leaves.items()
        }
    )


def three(model):
    """Of other ranks, scales and targets, one of which is the embedding's."""
    targets = ["embed_tokens", "down_proj"] if "lm_head/kernel" not in shapes(model) else ["lm_head", "embed_tokens"]
    some = "q_proj" if any("q_proj" in path for path in shapes(model)) else "qkv_proj"
    return [
        adapter(model, "all-linear", 4, 0.5, 1),
        adapter(model, some, 2, 2.0, 2),
        adapter(model, targets, 3, 1.0, 3),
    ]


PROMPTS = [np.random.default_rng(1).integers(0, 61, length).astype(np.int32) for length in (5, 9, 3, 14)]


def requests(which):
    """Each prompt with each adapter, of which prompts 0 and 1 are drawn from."""
    return [
        Request(prompt, NEW - number, DRAWN if number < 2 else engine.Sampling(), (), number, adapter=one)
        for number, prompt in enumerate(PROMPTS)
        for one in which
    ]


def complete(model, variables, asked, slots, adapters=None):
    return finish(Engine(model, variables, slots, adapters=adapters), asked)


def finish(made, asked):
    numbers, completions = [made.add(request) for request in asked], {}
    while made.busy:
        completions |= made.step()[1]
    return [completions[number] for number in numbers]


def check_each_is_as_alone(model, variables, adapters, slots=3):
    which = [None, *range(len(adapters))]
    together = complete(model, variables, requests(which), slots, stack(model, variables, adapters))
    worst, said = 0.0, set()
    for own in which:
        its = variables if own is None else variables | {"lora": adapters[own]}
        alone = complete(model, its, requests([None]), len(PROMPTS))
        for one, other in zip(together[which.index(own) :: len(which)], alone, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            np.testing.assert_allclose(one.full_logps, other.full_logps, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(one.logps, other.logps, rtol=1e-4, atol=1e-5)
            worst = max(worst, np.abs(one.full_logps - other.full_logps).max())
        said.add(str([one.tokens for one in alone]))
    assert len(said) == len(which)
    return worst


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "phi3", "qwen3_moe, every second layer")]


@pytest.mark.parametrize("name", ["llama", "untied", "gemma3", *SLOW])
def test_each_row_is_as_with_its_adapter_alone(name, record_figure):
    model, variables = made(UNTIED if name == "untied" else CONFIGS[name])
    record_figure("log-probabilities", check_each_is_as_alone(model, variables, three(model)))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_over_a_quantized_base(kind, record_figure):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model, variables = made(CONFIGS["llama"] | sizes)
    params, packed = tree.flatten(variables["params"]), {}
    for path in lora.linear_kernels(params):
        parts = jax.vmap(functools.partial(quant.quantize, kind=kind))(params.pop(path))
        packed |= {f"{path.rpartition('/')[0]}/{name}": leaf for name, leaf in parts.items()}
    variables = {"params": tree.unflatten(params), "quant": tree.unflatten(packed)}
    record_figure("log-probabilities", check_each_is_as_alone(model, variables, three(model)))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_two_adapters_of_other_ranks_and_alphas_in_one_batch_are_pefts(tmp_path, record_figure):
    torch_model(UNTIED).save_pretrained(tmp_path / "base")
    witnesses = {None: torch_model(UNTIED)}
    kinds = {"a": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}}
    kinds["b"] = {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"}
    for seed, (name, fields) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        model = get_peft_model(
            torch_model(UNTIED), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **fields)
        )
        model.save_pretrained(tmp_path / name)
        witnesses[name] = PeftModel.from_pretrained(torch_model(UNTIED), tmp_path / name).eval()
    reader = open_source(tmp_path / "base")
    model = Decoder(spec_from_config(reader.config))
    variables = {"params": load_params(reader, model.spec, abstract_params(model, one_device()))}
    adapters = [open_adapter(tmp_path / name, model.spec).read()[0] for name in kinds]
    order = [None, "a", "b"]
    asked = [Request(prompt, NEW, adapter=one) for prompt in PROMPTS for one in (None, 0, 1)]
    completions = complete(model, variables, asked, len(asked), stack(model, variables, adapters))
    worst, said = 0.0, set()
    for i, (request, completion) in enumerate(zip(asked, completions, strict=True)):
        row = torch.tensor([[*request.prompt.tolist(), *completion.tokens.tolist()]])
        with torch.no_grad():
            logits = witnesses[order[i % 3]](row).logits[0, len(request.prompt) - 1 : -1]
        assert completion.tokens.tolist() == logits.argmax(-1).tolist()
        expected = torch.log_softmax(logits.double(), -1)[range(NEW), completion.tokens.tolist()].numpy()
        worst = max(worst, np.abs(completion.full_logps - expected).max())
        said.add((i // 3, *completion.tokens.tolist()))
    record_figure("log-probabilities", worst)
    assert worst < 1e-4
    assert len(said) == len(asked)


def test_other_adapters_compile_nothing_and_may_come_and_go(caplog):
    model, variables = made(CONFIGS["llama"])
    first, second, third = three(model)
    made_ = Engine(model, variables, 4, adapters=stack(model, variables, [first, None], rank=4, targets=all_of(model)))
    finish(made_, [Request(prompt, NEW, adapter=0) for prompt in PROMPTS])
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        made_.set_adapter(1, second)
        mixed = finish(made_, [Request(prompt, NEW, adapter=i % 2) for i, prompt in enumerate(PROMPTS)])
        made_.set_adapter(0, third)
        new = finish(made_, [Request(prompt, NEW, adapter=0) for prompt in PROMPTS])
        made_.set_adapter(0, None)
        none = finish(made_, [Request(prompt, NEW, adapter=0) for prompt in PROMPTS])
    assert [record.message for record in caplog.records if "ompil" in record.message] == []
    for completions, trees in ((mixed, [first, second]), (new, [third]), (none, [{}])):
        alone = [complete(model, variables | {"lora": its}, requests_plain(), 4) for its in trees]
        for i, completion in enumerate(completions):
            assert completion.tokens.tolist() == alone[i % len(trees)][i].tokens.tolist()


def all_of(model):
    return [*lora.find_targets("all-linear", lora.adaptable(shapes(model))), "embed_tokens/embedding"]


def requests_plain():
    return [Request(prompt, NEW) for prompt in PROMPTS]


def test_an_adapter_in_use_keeps_its_place_and_one_that_there_is_not_is_refused():
    model, variables = made(CONFIGS["llama"])
    adapters = three(model)
    made_ = Engine(model, variables, 2, adapters=stack(model, variables, adapters[:2]))
    number = made_.add(Request(PROMPTS[0], NEW, adapter=1))
    with pytest.raises(ValueError, match="adapter 1 is in use"):
        made_.set_adapter(1, None)
    made_.step(limit=3)
    made_.set_adapter(0, adapters[1])  # while the other runs
    completion = {}
    while made_.busy:
        completion |= made_.step()[1]
    alone = complete(model, variables | {"lora": adapters[1]}, [Request(PROMPTS[0], NEW)], 1)[0]
    assert completion[number].tokens.tolist() == alone.tokens.tolist()
    for call in (lambda: made_.set_adapter(2, None), lambda: made_.add(Request(PROMPTS[0], 1, adapter=2))):
        with pytest.raises(ValueError, match="adapter 2: the engine has 2, counted from 0"):
            call()
    with pytest.raises(ValueError, match="have an adapter already"):
        Engine(model, variables | {"lora": adapters[0]}, 2, adapters=stack(model, variables, adapters[:1]))


def test_an_adapter_that_gives_infinities_gives_them_to_its_own_rows_only():
    model, variables = made(CONFIGS["llama"])
    broken, sound, _ = three(model)
    broken = jax.tree.map(lambda leaf: leaf * np.float32("inf"), broken)
    asked = [Request(PROMPTS[0], NEW, adapter=one) for one in (0, 1, None)]
    completions = complete(model, variables, asked, 3, stack(model, variables, [broken, sound]))
    assert [bool(np.isfinite(completion.full_logps).all()) for completion in completions] == [False, True, True]


def changed(adapter, change):
    """Each module's parts, changed."""
    return tree.unflatten({module: change(parts) for module, parts in tree.by_module(adapter).items()})


def test_what_no_row_can_have_of_its_own_is_refused_by_name():
    model, variables = made(CONFIGS["llama"])
    _, one, _ = three(model)
    name = "adapter 0: layers/self_attn/q_proj"
    cases = [
        (changed(one, lambda parts: parts | {"lora_magnitude": np.ones((2, 32))}), f"{name} has magnitudes.*merge it"),
        (changed(one, lambda parts: parts | {"lora_a0": parts["lora_a"]}), f"{name} is PiSSA's.*--format peft"),
        (
            {"layers": {"self_attn": {"z_proj": one["layers"]["self_attn"]["q_proj"]}}},
            "z_proj: the model has no linear",
        ),
        (
            changed(one, lambda parts: parts | {"lora_a": parts["lora_a"][:, 1:]}),
            f"{name} is .31, 32., and .32, 32. in",
        ),
    ]
    for adapter_, message in cases:
        with pytest.raises(UserError, match=message):
            stack(model, variables, [adapter_])
    with pytest.raises(UserError, match="adapters is empty"):
        stack(model, variables, [])
    with pytest.raises(UserError, match="no adapter adapts anything; say in `targets`"):
        stack(model, variables, [None])
    narrow = stack(model, variables, [adapter(model, "q_proj", 1, 1.0)])
    made_ = Engine(model, variables, 1, adapters=narrow)
    with pytest.raises(UserError, match="has rank 2, and the stack is for 1; make it with rank=2"):
        made_.set_adapter(0, one)
    with pytest.raises(UserError, match="k_proj is adapted, for which the stack has no place"):
        made_.set_adapter(0, adapter(model, "k_proj", 1, 1.0))
    mixture, its = made(CONFIGS["mixtral"])
    with pytest.raises(UserError, match=r"adapter 0: .*experts/up_proj adapts experts.*merge it"):
        stack(mixture, its, [adapter(mixture, "experts/up_proj", 2, 1.0)])


MESH_PROGRAM = """
import jax, numpy as np
from ftjax import lora, sharding, tree
from ftjax.models.params import abstract_params
from ftjax.sampling.adapters import stack
from sampling.test_row_adapters import CONFIGS, complete, made, requests, three

model, variables = made(CONFIGS["llama"])
adapters = three(model)

def tokens(sizes, devices):
    mesh = sharding.make_mesh(sizes, devices)
    layouts = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
    placed = {"params": jax.device_put(variables["params"], layouts)}
    stacked = stack(model, placed, adapters)
    b = stacked["layers"]["mlp"]["up_proj"]["lora_b"]
    assert b.addressable_shards[0].data.size == b.size // sizes.get("tensor", 1)
    with jax.set_mesh(mesh):
        return [c.tokens.tolist() for c in complete(model, placed, requests([None, 0, 1, 2]), 8, stacked)]

one = tokens({}, jax.devices()[:1])
assert len({str(row) for row in one}) == len(one)
assert one == tokens({"fsdp": 2, "tensor": 2}, jax.devices())
print("same tokens")
"""


def test_a_mesh_gives_the_tokens_of_one_device():
    assert printed_on_devices(MESH_PROGRAM, 4).endswith("same tokens\n")
