"""LoRA against the real peft, and what it promises about the base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CONFIG, OPTIMIZER, batch_of, documents, logits, numpy_params, one_device, spec
from witness import torch_llama, torch_logits, torch_loss_sum

from ftjax import lora, tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.params import abstract_params, logical_axes
from ftjax.objectives.sft import make_sft
from ftjax.optim import make_optimizer
from ftjax.state import abstract_state, init_state
from ftjax.step import make_step

# peft itself asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

MODEL = Decoder(spec(tie_word_embeddings=False))
AXES = logical_axes(MODEL)
KERNELS = [path for path in AXES if path.endswith("/kernel")]
RANK, ALPHA = 4, 12
DOCS = documents(8, [9, 6, 12])
BATCH = batch_of([[doc] for doc in DOCS], 12)


@pytest.fixture(scope="module")
def base():
    return numpy_params(MODEL)


def adapters_for(targets="all-linear", rank=RANK, rslora=False, seed=3):
    found = lora.find_targets(targets, KERNELS)
    abstract = lora.abstract_adapters(abstract_params(MODEL, one_device()), AXES, found, rank, one_device())
    return lora.init_adapters(abstract, seed, lora.scale(rank, ALPHA, rslora))


def with_random_b(adapters):
    """As after training: B of the size of the kernels."""
    rng = np.random.default_rng(9)
    leaves = tree.flatten(adapters)
    for path in [path for path in leaves if path.endswith("lora_b")]:
        leaves[path] = jnp.asarray(0.3 * rng.standard_normal(leaves[path].shape), jnp.float32)
    return tree.unflatten(leaves)


def peft_name(path, layer):
    module, matrix = path.rsplit("/", 1)
    inner = (
        module if module == "lm_head" else f"model.layers.{layer}.{module.removeprefix('layers/').replace('/', '.')}"
    )
    return f"base_model.model.{inner}.{ {'lora_a': 'lora_A', 'lora_b': 'lora_B'}[matrix] }.default.weight"


def peft_parameters(adapters):
    """{peft's name: its array [out, in]} of every A and B."""
    out = {}
    for path, leaf in tree.flatten(adapters).items():
        if not path.endswith("lora_scale"):
            layers = np.asarray(leaf) if path.startswith("layers/") else np.asarray(leaf)[None]
            out |= {peft_name(path, layer): part.T for layer, part in enumerate(layers)}
    return out


def peft_model(base, adapters, targets, rslora=False):
    """The same adapted model in torch; every adapter matrix of peft's is set from one of ours."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0, use_rslora=rslora)
    model = get_peft_model(torch_llama(CONFIG | {"tie_word_embeddings": False}, base), config)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    ours = peft_parameters(adapters)
    assert named.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.tensor(ours[name].copy()))
    return model


@pytest.mark.parametrize(
    ("targets", "rslora"),
    [("all-linear", False), (["q_proj", "v_proj", "down_proj"], True), (["lm_head", "up_proj"], False)],
    ids=["all-linear", "some, rslora", "head"],
)
def test_forward_and_merge_against_peft(base, targets, rslora, record_figure):
    adapters = with_random_b(adapters_for(targets, rslora=rslora))
    witness = peft_model(base, adapters, targets, rslora)
    adapted = logits(MODEL, {"params": base, "lora": adapters}, BATCH)
    merged = logits(MODEL, {"params": lora.merge(base, adapters)}, BATCH)
    assert np.abs(adapted - logits(MODEL, {"params": base}, BATCH)).max() > 0.5, "the adapters do something"
    real = BATCH["segment_ids"] > 0
    record_figure("merged logits", np.abs(merged - adapted)[real].max())
    np.testing.assert_allclose(merged[real], adapted[real], rtol=0, atol=1e-5)
    theirs = [torch_logits(witness, tokens) for tokens, _ in DOCS]
    record_figure("logits", max(np.abs(ours[: len(a)] - a).max() for ours, a in zip(adapted, theirs)))
    for row, expected in enumerate(theirs):
        np.testing.assert_allclose(adapted[row, : len(expected)], expected, rtol=0, atol=1e-4)


def test_five_adamw_steps_against_peft_and_torch(base, record_figure):
    """Same losses and same adapters; only A and B have gradients and optimizer state; the base stays bit-identical."""
    adapters = adapters_for()
    witness = peft_model(base, adapters, "all-linear")
    variables = {"params": jax.tree.map(jnp.asarray, base), "lora": adapters}
    trainable, frozen = tree.partition(variables, lambda path: bool(lora.TRAINABLE.match(path)))
    start = jax.tree.map(np.array, trainable)
    schedule = optax.constant_schedule(5e-3)
    optimizer = make_optimizer(OPTIMIZER, schedule)
    abstract = abstract_state(optimizer, trainable, one_device())
    state = init_state(optimizer, trainable, abstract)
    step = make_step(make_sft(MODEL), optimizer, schedule, abstract, seed=0)

    matrices = {path for path in tree.flatten(variables) if path.endswith(("lora_a", "lora_b"))}
    assert tree.flatten(state.trainable).keys() == matrices
    adam = optax.tree.get(state.opt_state, "ScaleByAdamState")
    assert tree.flatten(adam.mu).keys() == tree.flatten(adam.nu).keys() == matrices

    torch_parameters = [parameter for parameter in witness.parameters() if parameter.requires_grad]
    torch_adamw = torch.optim.AdamW(torch_parameters, lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    weight = sum(int(trained[1:].sum()) for _, trained in DOCS)
    ours, theirs = [], []
    for _ in range(5):
        state, metrics = step(state, frozen, {name: array[None] for name, array in BATCH.items()})
        ours.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        torch_adamw.zero_grad()
        loss = torch_loss_sum(witness, DOCS) / weight
        loss.backward()
        theirs.append((loss.item(), torch.nn.utils.clip_grad_norm_(torch_parameters, 1.0).item()))
        torch_adamw.step()
    record_figure("loss", np.abs(np.subtract(ours, theirs))[:, 0].max())
    record_figure("grad_norm", np.abs(np.subtract(ours, theirs))[:, 1].max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert theirs[0][0] - theirs[-1][0] > 0.05, "training does something"
    assert theirs[0][1] > 1, "clipping too"

    named = dict(witness.named_parameters())
    trained = peft_parameters(state.trainable["lora"])
    record_figure("adapters", max(np.abs(trained[name] - named[name].detach().numpy()).max() for name in trained))
    for name, array in trained.items():
        np.testing.assert_allclose(array, named[name].detach(), rtol=0, atol=1e-4, err_msg=name)
    moved = jax.tree.map(lambda before, after: float(np.abs(before - after).max()), start, state.trainable)
    assert min(jax.tree.leaves(moved)) > 1e-3
    assert jax.tree.all(jax.tree.map(np.array_equal, base, frozen["params"]))
    assert jax.tree.all(jax.tree.map(np.array_equal, frozen["lora"], tree.partition(adapters, is_scale)[0]))


def is_scale(path):
    return path.endswith("lora_scale")


def test_fresh_adapters_leave_the_logits_alone(base):
    """B is zero, so adapted and base model are bit-identical; and without the collection there is no adapter at all."""
    adapters = adapters_for()
    plain = logits(MODEL, {"params": base}, BATCH)
    np.testing.assert_array_equal(logits(MODEL, {"params": base, "lora": adapters}, BATCH), plain)
    a = {path: leaf for path, leaf in tree.flatten(adapters).items() if path.endswith("lora_a")}
    assert len(a) == 7
    for path, leaf in a.items():
        assert np.std(leaf) == pytest.approx((3 * leaf.shape[-2]) ** -0.5, rel=0.2), path


def test_fresh_values_depend_on_seed_and_path_only():
    both, alone, other = (
        tree.flatten(tree_)
        for tree_ in (adapters_for(["q_proj", "k_proj"]), adapters_for(["q_proj"]), adapters_for(["q_proj"], seed=4))
    )
    path = "layers/self_attn/q_proj/lora_a"
    np.testing.assert_array_equal(both[path], alone[path])
    assert not np.array_equal(both[path], other[path])
    assert not np.array_equal(both[path], both["layers/self_attn/k_proj/lora_a"])
    assert not np.array_equal(both[path][0], both[path][1]), "layers differ"


def test_with_scale_completes_an_adapter_from_disk():
    adapters = with_random_b(adapters_for(["q_proj", "lm_head"]))
    _, matrices = tree.partition(adapters, is_scale)
    complete = lora.with_scale(matrices, lora.scale(RANK, ALPHA, False))
    assert tree.flatten(complete).keys() == tree.flatten(adapters).keys()
    assert jax.tree.all(jax.tree.map(np.array_equal, complete, adapters))


def test_merge_keeps_the_dtype_and_every_other_leaf(base):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), base)
    adapters = with_random_b(adapters_for(["q_proj"]))
    merged = tree.flatten(lora.merge(half, adapters))
    for path, leaf in tree.flatten(half).items():
        assert merged[path].dtype == jnp.bfloat16
        assert np.array_equal(merged[path], leaf) == (path != "layers/self_attn/q_proj/kernel"), path


def test_scale():
    assert lora.scale(16, 32, rslora=False) == 2
    assert lora.scale(16, 32, rslora=True) == 8


LAYER_KERNELS = {path for path in KERNELS if path.startswith("layers/")}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LAYER_KERNELS),
        (["q_proj", "v_proj"], {"layers/self_attn/q_proj/kernel", "layers/self_attn/v_proj/kernel"}),
        (("lm_head",), {"lm_head/kernel"}),
        ("mlp/(up|down)", {"layers/mlp/up_proj/kernel", "layers/mlp/down_proj/kernel"}),
        ("proj/kernel$", LAYER_KERNELS),
    ],
)
def test_targets(targets, expected):
    assert len(LAYER_KERNELS) == 7
    assert lora.find_targets(targets, KERNELS) == sorted(expected)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "c_attn"],
            r"no linear layer named \['c_attn'\]; there are down_proj, gate_proj.*, q_proj, up_proj",
        ),
        ([], "adapter.targets is empty"),
        ("experts", r"adapter.targets='experts' matches no parameter.*layers/mlp/down_proj/kernel"),
        ("(", "adapter.targets='\\(' is not a regular expression"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets, message):
    with pytest.raises(UserError, match=message):
        lora.find_targets(targets, KERNELS)


@pytest.mark.parametrize(("rank", "targets"), [(0, "all-linear"), (-1, "all-linear"), (17, ["k_proj"])])
def test_a_rank_that_does_not_fit_is_refused(rank, targets):
    limit = 16  # the narrowest kernel of the two, k_proj, is [32, 16]
    with pytest.raises(UserError, match=rf"adapter.rank={rank} does not fit layers/.*/kernel.*; use 1 to \d+"):
        adapters_for(targets, rank=rank)
    assert adapters_for(["k_proj"], rank=limit)
