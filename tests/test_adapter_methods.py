"""Every kind of adapter against the real peft: same base, same start, same data, float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from ml_collections import ConfigDict
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from support.adapted import assembled, moved
from support.peft_witness import base_in_torch, peft_model, peft_parameters
from support.tiny import OPTIMIZER, batch_of, documents, logits, one_device
from support.witness import torch_logits

from ftjax import lora, tree
from ftjax.models.decoder import Decoder
from ftjax.objectives.sft import make_sft
from ftjax.training.optim import make_optimizer
from ftjax.training.state import abstract_state, init_state
from ftjax.training.step import make_step

# peft itself asks transformers for an attribute by its old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # As it should; what merging then takes is tested below.
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer is part of the adapter"),
]

DOCS = documents(8, [9, 6, 12])
BATCH = batch_of([[doc] for doc in DOCS], 12)
REAL = BATCH["segment_ids"] > 0
RATE, STEPS = 5e-3, 20

# name -> (our config, peft's config). Ranks and alphas are those of COMMON unless given.
COMMON = ({"adapter.rank": 4, "adapter.alpha": 12.0}, {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"})
SAVED = {"adapter.targets": "q_proj,v_proj", "adapter.modules_to_save": ("lm_head", "norm")}
EMBEDDED = {"adapter.targets": "embed_tokens,q_proj"}
METHODS = {
    "lora": ({}, {}),
    "lora, tied": ({}, {}),
    "rslora": ({"adapter.rslora": True}, {"use_rslora": True}),
    "dora": ({"adapter.kind": "dora"}, {"use_dora": True}),
    "pissa": ({"adapter.init": "pissa"}, {"init_lora_weights": "pissa"}),
    # peft saves every module whose name ends so, and "norm" would be the norms of the layers as well.
    "modules_to_save": (SAVED, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "patterns": (
        {
            "adapter.rank_pattern": (("mlp", 3), ("down_proj", 6)),
            "adapter.alpha_pattern": (("self_attn/[qk]_proj", 5.0), ("up_proj", 24.0)),
        },
        {
            "rank_pattern": {"mlp.gate_proj": 3, "mlp.up_proj": 3, "down_proj": 6},
            "alpha_pattern": {r".*\.[qk]_proj": 5, "up_proj": 24},
        },
    ),
    "head": ({"adapter.targets": "lm_head,up_proj"}, {"target_modules": ["lm_head", "up_proj"]}),
    "embedding": (EMBEDDED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, tied": (EMBEDDED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora, rslora, patterns, saved": (
        {"adapter.kind": "dora", "adapter.rslora": True, "adapter.rank_pattern": (("v_proj", 2),)} | SAVED,
        {
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["lm_head", "model.norm"],
        },
    ),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """{whether the head is tied: where its base is saved}"""
    out = {tied: tmp_path_factory.mktemp("base") for tied in (False, True)}
    for tied, directory in out.items():
        base_in_torch(tie_word_embeddings=tied).save_pretrained(directory)
    return out


@pytest.fixture(scope="module")
def start(directories):
    """name -> our model as a run starts with it; made once."""

    @functools.cache
    def make(name):
        return assembled(directories[name.endswith(", tied")], **COMMON[0] | METHODS[name][0])

    return make


def in_peft(name, run):
    """The same in torch."""
    base = base_in_torch(tie_word_embeddings=name.endswith(", tied"))
    return peft_model(base, run, **COMMON[1] | METHODS[name][1])


def forward_difference(run, witness):
    found = logits(run.model, run.variables, BATCH)
    return max(
        np.abs(row[: len(tokens)] - torch_logits(witness, tokens)).max() for row, (tokens, _) in zip(found, DOCS)
    )


def merged(run):
    """The same model without adapters."""
    return logits(run.model, {"params": lora.merge(run.variables["params"], run.variables["lora"])}, BATCH)


QUICK = ("lora", "dora", "pissa", "modules_to_save", "embedding, tied")


def quick_first(names=METHODS, quick=QUICK):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", quick_first())
def test_forward_and_merge_against_peft(start, name, record_figure):
    run = moved(start(name))
    witness = in_peft(name, run)
    found = logits(run.model, run.variables, BATCH)
    plain = logits(run.model, {"params": run.variables["params"]}, BATCH)
    assert np.abs(found - plain)[REAL].max() > 0.5, "the adapters do something"
    difference = forward_difference(run, witness)
    record_figure("logits", difference)
    assert difference < 1e-4
    if name == "embedding, tied":
        return  # merged with its head below
    difference = np.abs(merged(run) - found)[REAL].max()
    record_figure("merged logits", difference)
    assert difference < 1e-4


def torch_optimizer(witness, decay, ratio=1.0):
    """AdamW as `make_optimizer` has it: vectors are spared from decay, B learns `ratio` times as fast."""
    groups = []
    for name, parameter in witness.named_parameters():
        if parameter.requires_grad:
            rate = RATE * (ratio if "lora_B" in name or "lora_embedding_B" in name else 1.0)
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay if parameter.ndim > 1 else 0.0})
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)


@pytest.fixture(scope="module")
def programs():
    """The compiled steps: methods that differ in numbers only share one."""
    return {}


def start_of(programs, run, decay, ratio):
    """(state, frozen, step) of a run's first step."""
    trainable, frozen = tree.partition(run.variables, run.is_trained)
    # What PiSSA took out of the base is for the export alone.
    frozen, _ = tree.partition(frozen, lambda path: not path.endswith(("lora_a0", "lora_b0")))
    schedule = optax.constant_schedule(RATE)
    config = ConfigDict(OPTIMIZER.to_dict() | {"weight_decay": decay, "loraplus_ratio": ratio})
    optimizer = make_optimizer(config, schedule)
    abstract = abstract_state(optimizer, trainable, one_device())
    shapes = tuple((path, leaf.shape) for path, leaf in tree.flatten(trainable).items())
    key = (run.model, shapes, tuple(tree.flatten(frozen)), decay, ratio)
    if key not in programs:
        programs[key] = make_step(make_sft(run.model), optimizer, schedule, abstract, seed=0)
    # A copy: the step donates it.
    return init_state(optimizer, jax.tree.map(jnp.copy, trainable), abstract), frozen, programs[key]


def padded_loss_sum(witness):
    """Summed cross-entropy of the trained tokens; what is padded on the right a causal model does not see."""
    ids, trained = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(column) for column in columns], batch_first=True).long()
        for columns in zip(*DOCS)
    )
    found = witness(input_ids=ids).logits[:, :-1].transpose(1, 2)
    return (torch.nn.functional.cross_entropy(found, ids[:, 1:], reduction="none") * trained[:, 1:]).sum()


def train_both(programs, run, witness, torch_adamw, decay=0.0, ratio=1.0):
    """(our trained tree, our (loss, gradient norm) at every step, theirs)"""
    state, frozen, step = start_of(programs, run, decay, ratio)
    before = jax.tree.map(np.array, frozen)
    adam = optax.tree.get(state.opt_state, "ScaleByAdamState")
    assert tree.flatten(adam.mu).keys() == tree.flatten(adam.nu).keys() == tree.flatten(run.trained).keys()
    parameters = [parameter for parameter in witness.parameters() if parameter.requires_grad]
    weight = sum(int(trained[1:].sum()) for _, trained in DOCS)
    ours, theirs = [], []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, {name: array[None] for name, array in BATCH.items()})
        ours.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        torch_adamw.zero_grad()
        loss = padded_loss_sum(witness) / weight
        loss.backward()
        theirs.append((loss.item(), torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()))
        torch_adamw.step()
    assert jax.tree.all(jax.tree.map(np.array_equal, before, frozen)), "the base stays as it is, bit for bit"
    return state.trainable, np.array(ours), np.array(theirs)


def check_training(run, witness, outcome, record_figure):
    trained, ours, theirs = outcome
    losses, norms = np.abs(ours - theirs).T
    record_figure("loss", losses.max())
    record_figure("gradient norm, relative", (norms / theirs[:, 1]).max())
    named = dict(witness.named_parameters())
    found = peft_parameters(trained)
    record_figure("trained parameters", max(np.abs(found[name] - named[name].detach().numpy()).max() for name in found))
    assert losses.max() < 1e-4
    assert theirs[0, 0] - theirs[-1, 0] > 0.5, "training does something"
    assert theirs[0, 1] > 1, "clipping too"
    for (path, before), after in zip(tree.flatten(run.trained).items(), tree.flatten(trained).values()):
        assert np.abs(before - after).max() > 1e-3, path


@pytest.mark.parametrize("name", quick_first(quick=("lora", "rslora", "dora", "pissa", "modules_to_save")))
def test_twenty_adamw_steps_against_peft(start, programs, name, record_figure):
    run = start(name)
    witness = in_peft(name, run)
    decay = 0.1 if "saved" in name or name == "dora" else 0.0
    outcome = train_both(programs, run, witness, torch_optimizer(witness, decay), decay)
    check_training(run, witness, outcome, record_figure)


RATIO = 4.0


@pytest.mark.slow
def test_twenty_steps_of_loraplus_against_that_of_peft(start, programs, record_figure):
    run = start("lora")
    witness = in_peft("lora", run)
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "loraplus_weight_decay": 0.1}
    theirs = create_loraplus_optimizer(witness, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, **settings)
    outcome = train_both(programs, run, witness, theirs, decay=0.1, ratio=RATIO)
    check_training(run, witness, outcome, record_figure)


def test_loraplus_is_two_learning_rates_decay_included(record_figure):
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((4, 3)).astype(np.float32) for name in ("lora_a", "lora_b", "kernel")}
    config = ConfigDict(OPTIMIZER.to_dict() | {"weight_decay": 0.1, "loraplus_ratio": RATIO, "clip_norm": 1.0})
    optimizer = make_optimizer(config, optax.constant_schedule(RATE))
    tensors = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in params.items()}
    groups = [{"params": [tensor], "lr": RATE * (RATIO if name == "lora_b" else 1)} for name, tensor in tensors.items()]
    witness = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    ours, state = {"lora": params}, optimizer.init({"lora": params})
    for _ in range(5):
        gradients = {name: rng.standard_normal((4, 3)).astype(np.float32) for name in params}
        updates, state = optimizer.update({"lora": gradients}, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        witness.step()
    difference = max(np.abs(ours["lora"][name] - tensors[name].detach().numpy()).max() for name in tensors)
    record_figure("parameters", difference)
    assert difference < 1e-6
    assert np.abs(ours["lora"]["lora_b"] - params["lora_b"]).max() > 2 * RATE * RATIO, "B has moved at its own rate"


def test_pissa_takes_out_of_the_base_what_peft_takes(start, record_figure):
    """The signs of singular vectors are free, so products are compared; then A's and B's own sizes."""
    run = start("pissa")
    config = LoraConfig(**COMMON[1], init_lora_weights="pissa")
    witness = get_peft_model(base_in_torch(tie_word_embeddings=False), config)
    theirs = {name: parameter.detach().numpy() for name, parameter in witness.named_parameters()}
    ours = peft_parameters(run.trained)
    kernels, _ = tree.partition(run.variables["params"], lambda path: path.startswith("layers/") and "kernel" in path)
    left = peft_parameters({"params": kernels})
    differences = {"products": [], "residues": [], "sizes": []}
    for name in [name for name in ours if ".lora_A." in name]:
        other, residue = name.replace("lora_A", "lora_B"), name.replace("lora_A.default", "base_layer")
        pairs = {
            "products": (ours[other] @ ours[name], theirs[other] @ theirs[name]),
            "residues": (left[name.replace("lora_A", "modules_to_save")], theirs[residue]),
            "sizes": (np.linalg.norm(ours[name], axis=1), np.linalg.norm(theirs[name], axis=1)),
        }
        for kind, (one, another) in pairs.items():
            differences[kind].append(np.abs(one - another).max())
    for kind, found in differences.items():
        record_figure(kind, max(found))
        assert len(found) == 14
        assert max(found) < 1e-5, kind
    plain = start("lora")
    whole = logits(plain.model, {"params": plain.variables["params"]}, BATCH)
    adapted = logits(run.model, run.variables, BATCH)
    record_figure("logits and those of the base", np.abs(adapted - whole)[REAL].max())
    np.testing.assert_allclose(adapted[REAL], whole[REAL], rtol=0, atol=1e-4)
    lora_tree = tree.flatten(run.variables["lora"])
    for path in [path for path in lora_tree if path.endswith(("_a0", "_b0"))]:
        np.testing.assert_array_equal(lora_tree[path], lora_tree[path.removesuffix("0")])


def test_a_tied_head_survives_a_merge(start):
    run = moved(start("lora, tied"))
    after = tree.flatten(lora.merge(run.variables["params"], run.variables["lora"]))
    before = tree.flatten(run.variables["params"])
    assert after.keys() == before.keys()
    np.testing.assert_array_equal(after["embed_tokens/embedding"], before["embed_tokens/embedding"])
    found = logits(run.model, run.variables, BATCH)
    np.testing.assert_allclose(merged(run)[REAL], found[REAL], rtol=0, atol=1e-5)


def test_an_adapted_embedding_merges_into_a_model_that_is_untied(start, record_figure):
    """The adapter changes what tokens are looked up, not the head that shares the table: the head keeps the old one."""
    run = moved(start("embedding, tied"))
    found = logits(run.model, run.variables, BATCH)
    params = lora.merge(run.variables["params"], run.variables["lora"])
    params["lm_head"] = {"kernel": run.variables["params"]["embed_tokens"]["embedding"].T}
    untied = Decoder(dataclasses.replace(run.model.spec, tie_word_embeddings=False))
    difference = np.abs(logits(untied, {"params": params}, BATCH) - found)[REAL].max()
    record_figure("merged logits", difference)
    assert difference < 1e-5
    assert np.abs(merged(run) - found)[REAL].max() > 0.1, "merged into a head that stays tied it is another model"
