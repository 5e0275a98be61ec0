"""Run by test_invariance.py in a process with 8 devices: trains on several meshes and prints what came out as JSON.

Every case sees the same 20 global batches of documents. Cases differ in mesh, in micro-batches per step, in what the
backward pass recomputes and in whether documents are packed two to a row or stand alone. Every fourth batch is short:
its last rows are empty, and with them a whole micro-batch.
"""

import functools
import itertools
import json
import sys

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import lora, sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.heads import abstract_heads, init_heads
from ftjax.models.params import abstract_params, logical_axes
from ftjax.objectives.distillation import make_distillation
from ftjax.objectives.policy import make_policy
from ftjax.objectives.ppo import KL_COEF, make_ppo, make_ppo_totals
from ftjax.objectives.preference import make_preference, preference_totals
from ftjax.objectives.reference import TEACHER
from ftjax.objectives.reward import make_reward
from ftjax.objectives.sft import make_sft
from ftjax.objectives.unpaired import make_unpaired, make_unpaired_totals
from ftjax.training.optim import OPTIMIZERS, make_optimizer, make_schedule
from ftjax.training.state import abstract_state, init_state, kl_controller, normalization, reward_sums
from ftjax.training.step import make_step
from support.tiny import CONFIG, SCHEDULE, batch_of, documents, numpy_params, random_params, spec
from support.tiny import OPTIMIZER as DEFAULTS

STEPS = 20
OPTIMIZER = ConfigDict(DEFAULTS.to_dict() | {"weight_decay": 0.01})
# dpo and kto: adapters trained on preferences, whose first losses are all alike; reward: those and two heads, each with
# its bootstrap
# Adam divides a gradient by its size, so an element whose gradient is nothing but rounding moves as far as others. At
# the second step of the reward model that is so: adapters have only begun to differ from 0, and rewards of a pair are
# alike; gradients are 1e-6, some 1e-9, and what the mesh changes 1e-9. A larger epsilon leaves these where they are.
EPS = {"reward": 1e-7}
RATES = {"lora": 2e-4, "none": 2e-5, "dpo": 2e-3, "kto": 2e-3, "reward": 2e-4, "grpo": 2e-4, "ppo": 2e-4}
RATES |= {"gkd": 2e-4}
PAIRS = ("dpo", "reward")
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64}
SPECS = {
    "dense": spec(**SIZES),
    "mixture": spec_from_config(CONFIG | SIZES | {"model_type": "mixtral"} | {"num_local_experts": 8}),
}
TEACHERS = spec(**SIZES | {"hidden_size": 64})

MESHES = {
    "1": {},
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "tensor=8": {"tensor": 8},
    "context=8": {"context": 8},
    "data=2 x fsdp=4": {"data": 2, "fsdp": 4},
    "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": -1},
    "tensor=2 x context=4": {"tensor": 2, "context": 4},
    "fsdp=4 x context=2": {"fsdp": 4, "context": 2},
    "data=2 x fsdp=2 x tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp=2 x tensor=2 x context=2": {"fsdp": 2, "tensor": 2, "context": 2},
}
MIXTURE_MESHES = {
    "1": {},
    "expert=8": {"expert": 8},
    "fsdp=2 x expert=4": {"fsdp": 2, "expert": 4},
    "tensor=2 x expert=4": {"tensor": 2, "expert": 4},
    "fsdp=2 x context=2 x expert=2": {"fsdp": 2, "context": 2, "expert": 2},
}
REMATS = ("none", "full")

# (model, adapter kind, mesh, micro-batches, packed, remat); the first case of each model and kind is what the others of
# it are compared with.
QUICK = [
    ("dense", "lora", "1", 1, True, "none"),
    ("dense", "lora", "fsdp=8", 1, True, "full"),
    ("dense", "lora", "fsdp=4 x tensor=2", 2, False, "none"),
    ("dense", "lora", "data=2 x fsdp=4", 2, True, "none"),
    ("dense", "lora", "context=8", 1, False, "none"),
    ("dense", "lora", "fsdp=2 x tensor=2 x context=2", 4, True, "full"),
    ("dense", "none", "1", 1, True, "none"),
    ("dense", "none", "fsdp=4 x tensor=2", 2, False, "none"),
    ("mixture", "lora", "1", 1, True, "none"),
    ("mixture", "lora", "fsdp=2 x context=2 x expert=2", 4, True, "none"),
    ("dense", "dpo", "1", 1, True, "none"),
    ("dense", "dpo", "fsdp=2 x tensor=2 x context=2", 2, False, "none"),
    ("dense", "reward", "1", 1, True, "none"),
    ("dense", "reward", "fsdp=2 x tensor=2 x context=2", 2, False, "none"),
]
LABELED = [
    ("dense", "kto", "1", 1, True, "none"),
    ("dense", "kto", "fsdp=2 x tensor=2 x context=2", 2, False, "none"),
    ("dense", "kto", "data=2 x fsdp=4", 4, True, "full"),
]
HEADS = {"reward": {"score": 2}, "ppo": {"value": 1}}
ROLLED_OUT = [
    ("dense", "grpo", "1", 1, True, "none"),
    ("dense", "grpo", "fsdp=2 x tensor=2 x context=2", 2, False, "none"),
    ("dense", "grpo", "data=2 x fsdp=4", 4, True, "full"),
    ("dense", "ppo", "1", 1, True, "none"),
    ("dense", "ppo", "fsdp=2 x tensor=2 x context=2", 2, False, "none"),
    ("dense", "ppo", "data=2 x fsdp=4", 4, True, "full"),
    ("dense", "gkd", "1", 1, True, "none"),
    ("dense", "gkd", "fsdp=2 x tensor=2 x context=2", 2, False, "none"),
    ("dense", "gkd", "data=2 x fsdp=4", 4, True, "full"),
]


def grid():
    """Every mesh with every accumulation, packed and not; each way to recompute, and all parameters, on a share."""
    for model, kind, meshes in (
        ("dense", "lora", MESHES),
        ("mixture", "lora", MIXTURE_MESHES),
        ("dense", "none", MESHES),
        ("mixture", "none", MIXTURE_MESHES),
    ):
        cases = list(itertools.product(meshes, (1, 2, 4), (True, False)))
        for index, (mesh, accumulate, packed) in enumerate(cases):
            if kind == "lora" or index % 6 in (0, 5):
                yield model, kind, mesh, accumulate, packed, REMATS[(index // 2 + index // 6) % len(REMATS)]
    for kind, (index, mesh) in itertools.product(PAIRS, enumerate(MESHES)):
        yield "dense", kind, mesh, 1 + index % 2, index % 3 > 0, REMATS[index // 2 % len(REMATS)]
    for index, mesh in enumerate(MESHES):
        yield "dense", "kto", mesh, 1 + (index + 1) % 2, index % 3 > 1, REMATS[index // 2 % len(REMATS)]


def batches(kind, accumulate, packed):
    """20 batches of 64 documents of 4 to 12 tokens: 32 rows of two, or 64 of one; [accumulate, rows, length].

    For dpo and reward every two documents are a pair: 16 rows of two pairs, or 32 of one. For kto each is good or bad,
    and there are as many mismatched documents.
    """
    unit = 2 if kind in PAIRS else 1
    for step in range(STEPS):
        lengths = np.random.default_rng(step).integers(4, 13, 64)
        docs = documents(100 + step, lengths.tolist(), vocab=97)
        docs = docs[:40] if step % 4 == 3 else docs
        each = 2 * unit if packed else unit
        rows = [docs[i : i + each] for i in range(0, 64, each)]
        batch = batch_of(rows, 12 * each if each > 1 else 16)
        if kind == "kto":
            batch |= labels_and_mismatched(step, docs, batch, each)
        if kind in ("grpo", "ppo"):
            batch |= advantages_and_logps(step, batch, each)
        if kind == "ppo":
            lots = batch["advantages"]
            batch |= {"values": lots / 3, "returns": lots + 1, "kl": lots / 10}
            number = np.arange(0, 64, each)[:, None] + np.maximum(batch["segment_ids"] - 1, 0)
            batch["ptx"] = ((batch["segment_ids"] > 0) & (number % 3 == 2)).astype(np.float32)  # every third is a text
        if kind == "reward":  # the margin of a pair is that of its tokens, wherever it stands
            batch["labels"] = np.zeros(batch["tokens"].shape, np.float32)
            for row, (labels, segments) in zip(rows, zip(batch["labels"], batch["segment_ids"])):
                for place in range(0, len(row), 2):
                    labels[(segments == place + 1) | (segments == place + 2)] = row[place][0][0] % 3 / 2
        yield {name: array.reshape(accumulate, -1, array.shape[1]) for name, array in batch.items()}


def labels_and_mismatched(step, docs, batch, each):
    """Labels by lot for a batch of `each` documents to a row, and prompts with the completion of the next document."""
    length, label = batch["tokens"].shape[1], np.random.default_rng(200 + step).choice([-1.0, 1.0], 64)
    number = np.arange(0, 64, each)[:, None] + np.maximum(batch["segment_ids"] - 1, 0)
    labels = np.where(batch["segment_ids"] > 0, label[number], 0).astype(np.float32)
    parts = [np.split(tokens, [trained.argmax()]) for tokens, trained in docs]
    others = [np.concatenate([prompt, then]) for (prompt, _), (_, then) in zip(parts, parts[1:] + parts[:1])]
    others = [(tokens, np.arange(len(tokens)) >= len(prompt)) for tokens, (prompt, _) in zip(others, parts)]
    mismatched = batch_of([others[i : i + each] for i in range(0, 64, each)], length)
    return {"labels": labels} | {f"mismatched_{name}": array for name, array in mismatched.items()}


def advantages_and_logps(step, batch, each):
    """Advantages of the documents by lot, and how likely their tokens were; `each` of them in a row."""
    lot = 2 + np.random.default_rng(300 + step).standard_normal(64)  # around 0 the loss would be a difference of equals
    number = np.arange(0, 64, each)[:, None] + np.maximum(batch["segment_ids"] - 1, 0)
    sampled = 0.2 * np.sin(7 * number + batch["positions"]) - np.log(97)
    found = {"advantages": lot[number], "sampled_logps": sampled}
    return {name: np.where(batch["weights"] > 0, array, 0).astype(np.float32) for name, array in found.items()}


def variables_on(mesh, model, kind):
    """The base, whose logits are of order 1, and fresh adapters, laid out on `mesh`."""
    abstract, axes = abstract_params(model, mesh), logical_axes(model)
    base = tree.flatten(numpy_params(model))
    variables = {"params": tree.unflatten({p: sharding.place(mesh, axes[p], leaf) for p, leaf in base.items()})}
    if kind != "none":
        targets = lora.find_targets("all-linear", lora.linear_kernels(tree.flatten(abstract)))
        adapters = lora.abstract_adapters(abstract, axes, targets, rank=8, mesh=mesh)
        variables["lora"] = lora.init_adapters(adapters, 11, lora.scale(8, 16, False))
    if kind in HEADS:
        variables["heads"] = init_heads(abstract_heads(HEADS[kind], model.spec, mesh), 11)
    if kind == "gkd":
        variables[TEACHER] = variables_on(mesh, Decoder(TEACHERS), "none")
    return variables


def is_trained(kind, path):
    return kind == "none" or bool(lora.TRAINABLE.match(path)) or path.startswith("heads/")


def train(name, kind, mesh, accumulate, packed, remat):
    """Returns the losses, the trainable leaves before and after, and facts about the run."""
    model = Decoder(SPECS[name], remat=remat)
    variables = variables_on(mesh, model, kind)
    trainable, frozen = tree.partition(variables, functools.partial(is_trained, kind))
    base = jax.tree.map(np.array, frozen)
    schedule = make_schedule(RATES[kind], SCHEDULE, STEPS)
    optimizer = make_optimizer(ConfigDict(OPTIMIZER.to_dict() | {"eps": EPS.get(kind, OPTIMIZER.eps)}), schedule)
    kept = {"reward": reward_sums(), "ppo": kl_controller(0.1, 0.2, 100.0, every=1)}.get(kind)
    abstract = abstract_state(optimizer, trainable, mesh, kept)
    state = init_state(optimizer, trainable, abstract, kept)
    start = {path: np.array(leaf) for path, leaf in tree.flatten(trainable).items()}
    first = jax.tree.leaves(state)
    objective, totals = make_sft(model), None
    if kind == "dpo":  # with a part that must know the whole step's number of tokens
        settings = configs.changed(configs.defaults(), {"objective.loss": ("sigmoid", ("sft", 0.2))}).objective
        objective, totals = make_preference(model, settings, ()), preference_totals
    if kind == "reward":
        settings = configs.changed(
            configs.defaults(), {"objective.ensemble": 2, "objective.center_coef": 0.1}
        ).objective
        objective = make_reward(model, settings, seed=3)
    if kind == "kto":
        settings = configs.changed(configs.defaults(), {"objective.desirable_weight": 1.5}).objective
        objective, totals = make_unpaired(model, settings), make_unpaired_totals(model, settings)
    if kind == "grpo":
        changes = {"objective.loss": ("grpo",), "objective.importance": "sequence", "objective.kl_coef": 0.05}
        objective = make_policy(model, configs.changed(configs.defaults(), changes).objective, max_new_tokens=12)
    if kind == "ppo":
        settings = configs.changed(configs.defaults(), {"objective.ptx_coef": 0.5}).objective
        objective, totals = make_ppo(model, settings), make_ppo_totals(model, settings)
    if kind == "gkd":
        settings = configs.changed(configs.defaults(), {"objective.distill_temperature": 0.5}).objective
        objective = make_distillation(model, settings, Decoder(TEACHERS))
    step = make_step(objective, optimizer, schedule, abstract, seed=0, kept=kept, totals=totals)
    losses, ends = [], []
    with jax.set_mesh(mesh):
        for batch in batches(kind, accumulate, packed):
            placed = {name: sharding.place(mesh, (None, "batch", "length"), leaf) for name, leaf in batch.items()}
            state, metrics = step(state, frozen, placed)
            losses.append(float(metrics["loss"]))
            ends += [float(metrics[name]) for name in ("min_reward", "max_reward") if name in metrics]
            ends += [float(state.kept[KL_COEF])] if kind == "ppo" else []
    adam = optax.tree.get(state.opt_state, "ScaleByAdamState")
    trained = tree.flatten(state.trainable)
    facts = {
        "compilations": step._cache_size(),
        "old buffers deleted": all(leaf.is_deleted() for leaf in first),
        "state where planned": shardings(state) == shardings(abstract),
        "base unchanged": jax.tree.all(jax.tree.map(np.array_equal, base, frozen)),
        "batch": spec_of(placed["tokens"]),
        "frozen": {path: spec_of(leaf) for path, leaf in tree.flatten(frozen).items()},
        "shares": {
            path: leaf.size // leaf.addressable_shards[0].data.size for path, leaf in tree.flatten(frozen).items()
        },
        "rewards": [*ends, *(np.ravel(normalization(state.kept)).tolist() if kind == "reward" else [])],
        "trainable": {path: spec_of(leaf) for path, leaf in trained.items()},
        "first moments": {path: spec_of(leaf) for path, leaf in tree.flatten(adam.mu).items()},
        "second moments": {path: spec_of(leaf) for path, leaf in tree.flatten(adam.nu).items()},
    }
    return losses, start, {path: np.array(leaf) for path, leaf in trained.items()}, facts


def shardings(state):
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def spec_of(leaf):
    return [list(entry) if isinstance(entry, tuple) else entry for entry in leaf.sharding.spec]


def same_random_params(meshes):
    """Whether the same seed gives bit-identical parameters on every mesh."""
    model = Decoder(SPECS["dense"])
    first, *others = (jax.device_get(random_params(model, 7, abstract_params(model, mesh))) for mesh in meshes)
    return all(jax.tree.all(jax.tree.map(np.array_equal, first, other)) for other in others)


def head_on(mesh):
    """A fresh scalar head on a mesh: its values, and how it is laid out there."""
    kernel = init_heads(abstract_heads({"score": 1}, SPECS["dense"], mesh), 7)["score"]["kernel"]
    return np.array(kernel), spec_of(kernel)


def with_optimizer(name, mesh):
    """(the trained leaves after two updates, whether the state is where it was planned, what of it is split)"""
    model = Decoder(SPECS["dense"])
    trainable, _ = tree.partition(variables_on(mesh, model, "lora"), lambda path: not path.endswith("/lora_scale"))
    optimizer = make_optimizer(ConfigDict(OPTIMIZER.to_dict() | {"name": name}), optax.constant_schedule(0.01))
    abstract = abstract_state(optimizer, trainable, mesh)
    state, layout = init_state(optimizer, trainable, abstract), shardings(abstract)

    def update(state, gradients):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        return state.replace(trainable=optax.apply_updates(state.trainable, updates), opt_state=opt_state)

    for step in range(2):
        rng = np.random.default_rng(step)
        leaves = {path: (rng.standard_normal(leaf.shape), leaf) for path, leaf in tree.flatten(trainable).items()}
        gradients = {path: jax.device_put(np.float32(x), leaf.sharding) for path, (x, leaf) in leaves.items()}
        state = jax.jit(update, out_shardings=layout)(state, tree.unflatten(gradients))
    params = tree.flatten(trainable)
    moments = {
        jax.tree_util.keystr(place): (leaf, params.get("/".join(key.key for key in place if hasattr(key, "key"))))
        for place, leaf in jax.tree.leaves_with_path(state.opt_state)
    }
    whole = {place: leaf for place, (leaf, param) in moments.items() if param is None or param.shape != leaf.shape}
    follow = all(leaf.sharding == param.sharding for place, (leaf, param) in moments.items() if place not in whole)
    largest = max(leaf.size for leaf in whole.values())
    found = {path: np.array(leaf) for path, leaf in tree.flatten(state.trainable).items()}
    return found, shardings(state) == layout and follow, [len(moments) - len(whole), largest]


def optimizers(meshes):
    """[name, the greatest difference from one device, whether moments follow parameters, how many do, the largest that
    does not], of each."""
    out = []
    for name in OPTIMIZERS:
        (one, *_), (split, follow, counts) = (with_optimizer(name, mesh) for mesh in meshes)
        out.append([name, max(float(np.abs(one[path] - split[path]).max()) for path in one), follow, *counts])
    return out


def main(cases):
    sizes = MESHES | MIXTURE_MESHES
    meshes = {name: sharding.make_mesh(sizes[name], jax.devices()[: 8 if sizes[name] else 1]) for name in sizes}
    (value, _), (split, where) = head_on(meshes["1"]), head_on(meshes["fsdp=4 x tensor=2"])
    heads = {"same head": np.array_equal(value, split), "head": where}
    references, out = (
        {},
        heads | {"same random parameters": same_random_params([meshes["1"], meshes["fsdp=4 x tensor=2"]])},
    )
    out["optimizers"] = optimizers([meshes["1"], meshes["fsdp=4 x tensor=2"]])
    for model, kind, mesh, accumulate, packed, remat in cases:
        losses, start, final, facts = train(model, kind, meshes[mesh], accumulate, packed, remat)
        told = losses, start, final, facts.pop("rewards")
        reference_losses, reference_start, reference, rewards = references.setdefault((model, kind), told)
        words = (model, kind, mesh, f"{accumulate} micro-batches", "packed" if packed else "unpacked", f"remat {remat}")
        out[", ".join(words)] = facts | {
            "losses": losses,
            "loss difference": max(abs(a - b) / abs(b) for a, b in zip(losses, reference_losses)),
            "reward difference": max((abs(a - b) for a, b in zip(told[-1], rewards)), default=0),
            "parameter difference": max(float(np.abs(final[path] - reference[path]).max()) for path in reference),
            "same start": all(np.array_equal(start[path], reference_start[path]) for path in reference_start),
            "movement": {path: float(np.abs(final[path] - start[path]).max()) for path in final},
        }
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main({"quick": QUICK, "labeled": LABELED, "rolled out": ROLLED_OUT, "full": list(grid())}[sys.argv[1]])
