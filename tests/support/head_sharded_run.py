"""Run by test_cross_entropy_sharded.py in a process with 8 devices: the loss on several meshes, as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import sharding, tree
from ftjax.models.layers import Linear
from ftjax.objectives import head as heads
from ftjax.objectives.cross_entropy import Chunks, Further, cross_entropy, per_token
from ftjax.objectives.divergence import Between, divergence_per_token

BATCH, LENGTH, WIDTH, VOCAB, RANK = 8, 6, 16, 96, 4
BETA = 0.3  # of the divergence

MESHES = {
    "fsdp=8": {"fsdp": 8},
    "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 x fsdp=2 x tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor=8": {"tensor": 8},
    "data=8": {"data": 8},
    "fsdp=2 x context=2 x tensor=2": {"fsdp": 2, "context": 2, "tensor": 2},
    "data=2 x context=4": {"data": 2, "context": 4},
}


def unembed(head, hidden, rng, numbers):
    head = {path.rpartition("/")[2]: leaf for path, leaf in head.items()}
    low_rank = (hidden @ head["lora_a"]) @ head["lora_b"]
    return hidden @ head["kernel"] + head["bias"] + low_rank


def numbers():
    rng = np.random.default_rng(0)
    head = {
        "params/lm_head/kernel": rng.standard_normal((WIDTH, VOCAB)),
        "params/lm_head/bias": rng.standard_normal(VOCAB),
        "lora/lm_head/lora_a": rng.standard_normal((WIDTH, RANK)) * 0.3,
        "lora/lm_head/lora_b": rng.standard_normal((RANK, VOCAB)) * 0.3,
    }
    hidden = rng.standard_normal((BATCH, LENGTH, WIDTH))
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    weights = (rng.random((BATCH, LENGTH)) < 0.6) * rng.random((BATCH, LENGTH))
    return jax.tree.map(lambda x: x.astype(np.float32), (head, hidden)), targets, weights.astype(np.float32)


ADAPTED = Linear(VOCAB, ("embed", "vocab"), jnp.float32, jnp.float32, use_bias=True, name="lm_head")


def unembed_dropping(head, hidden, rng, numbers=None):
    """The same head, with dropout of what its adapter sees."""
    head = {path.replace("/lm_head", ""): leaf for path, leaf in head.items()}
    head |= {"lora/lora_scale": jnp.float32(1), "lora/lora_dropout": jnp.float32(0.5)}
    variables = tree.unflatten(head)
    columns = head["params/bias"].shape[0]
    return ADAPTED.clone(features=columns).apply(variables, hidden, numbers, rngs={"dropout": rng})


def dropping(meshes, head, hidden, targets, weights):
    """{mesh and cut: [loss, error of the gradients]} with dropout, beside those of whole logits without a mesh."""
    key = jax.random.key(3)

    def whole(head, hidden):
        logits = unembed_dropping(head, hidden, key)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * weights)

    loss, wanted = jax.value_and_grad(whole, argnums=(0, 1))(head, hidden)
    out = {"whole": [float(loss), 0.0]}
    for name, sizes in meshes.items():
        mesh = sharding.make_mesh(sizes)
        for cut in (Chunks(20, 5), Chunks(VOCAB, 2)):

            def ours(head, hidden, cut=cut):
                return cross_entropy(unembed_dropping, head, hidden, targets, weights, key, cut)["loss"]

            with jax.set_mesh(mesh):
                placed = {path: sharding.place(mesh, heads.axes(path), leaf) for path, leaf in head.items()}
                at = sharding.place(mesh, ("batch", "length", "width"), hidden)
                its, found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(placed, at)
            errors = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), found, wanted)
            out[f"{name} {tuple(cut)}"] = [float(its), max(jax.tree.leaves(errors))]
    return out


def naive(head, hidden, targets, weights):
    """With labels smoothed and log(Z)^2 beside; `dropping` is without."""
    logits = unembed(head, hidden, None, None)
    logps = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
    correct = jnp.sum((logits.argmax(-1) == targets) * weights)
    losses = -(0.9 * picked + 0.1 * logps.mean(-1)) + 1e-2 * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(losses * weights), correct


def divergences(head, hidden, wanted):
    """{mesh: the greatest errors of divergences from another head and of their gradients}, and how large these are."""
    theirs = jax.tree.map(lambda leaf: np.roll(leaf, 1, -1) / 2, (head, hidden))

    def whole(head, hidden):
        ours, other = (jax.nn.log_softmax(unembed(*one, None, None)) for one in ((head, hidden), theirs))
        mixed = jnp.logaddexp(ours + jnp.log(1 - BETA), other + jnp.log(BETA))
        of_each = ((beta, jnp.sum(jnp.exp(its) * (its - mixed), -1)) for beta, its in ((BETA, other), (1 - BETA, ours)))
        forward = jnp.sum(jnp.exp(other) * (other - ours), -1)
        return jnp.sum((forward + sum(beta * values for beta, values in of_each)) * wanted)

    expected = jax.value_and_grad(whole, argnums=(0, 1))(head, hidden)
    out = {"largest": max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))}

    def ours(head, hidden, their_head, their_hidden):
        given = (Chunks(20, 5), head, hidden, their_head, their_hidden, wanted, None)
        values = (divergence_per_token(Between(unembed, unembed, beta), *given)[0] for beta in (0.0, BETA))
        return sum(value.sum() for value in values)

    for name in ("data=2 x fsdp=2 x tensor=2", "tensor=8", "fsdp=2 x context=2 x tensor=2"):
        mesh = sharding.make_mesh(MESHES[name])
        with jax.set_mesh(mesh):
            at = []
            for one, its in ((head, hidden), theirs):
                at.append({path: sharding.place(mesh, heads.axes(path), leaf) for path, leaf in one.items()})
                at.append(sharding.place(mesh, ("batch", "length", "width"), its))
            found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(*at)
        errors = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), found, expected)
        out[name] = [errors[0] / float(expected[0]), max(jax.tree.leaves(errors[1]))]
    return out


def squares(head, hidden, targets, wanted):
    """{mesh: the greatest error of the log of the sum of p^2 at a position that is wanted}"""
    expected = np.where(wanted, jax.nn.logsumexp(2 * jax.nn.log_softmax(unembed(head, hidden, None, None)), -1), 0)

    def ours(head, hidden, targets, wanted):
        found = per_token(unembed, Chunks(20, 5), Further(squares=True), head, hidden, targets, wanted, None)
        return found.log_squares

    out = {}
    for name in ("tensor=8", "fsdp=2 x context=2 x tensor=2"):
        mesh = sharding.make_mesh(MESHES[name])
        with jax.set_mesh(mesh):
            placed = {path: sharding.place(mesh, heads.axes(path), leaf) for path, leaf in head.items()}
            rows = [sharding.place(mesh, ("batch", "length"), array) for array in (targets, wanted)]
            found = jax.jit(ours)(placed, sharding.place(mesh, ("batch", "length", "width"), hidden), *rows)
        out[name] = float(np.abs(np.asarray(found) - expected).max())
    return out


def frozen(head, hidden, targets, weights):
    further = Further(0.1, 1e-2)
    return cross_entropy(unembed, head, hidden, targets, weights, None, Chunks(VOCAB, 5), further)["loss"]


def main():
    (head, hidden), targets, weights = numbers()
    wanted = jax.value_and_grad(naive, argnums=(0, 1), has_aux=True)(head, hidden, targets, weights)
    (loss, correct), (d_head, d_hidden) = wanted
    out = {}
    for name, sizes in MESHES.items():
        mesh = sharding.make_mesh(sizes)

        def ours(head, hidden, targets, weights):
            totals = cross_entropy(unembed, head, hidden, targets, weights, None, Chunks(20, 5), Further(0.1, 1e-2))
            return totals["loss"], totals["correct"]

        with jax.set_mesh(mesh):
            placed = {path: sharding.place(mesh, heads.axes(path), leaf) for path, leaf in head.items()}
            rows = [sharding.place(mesh, ("batch", "length"), array) for array in (targets, weights)]
            at = sharding.place(mesh, ("batch", "length", "width"), hidden)
            found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(placed, at, *rows)
            # A frozen head with all columns at once, which changes how the gradient comes about where none is split.
            alone = jax.jit(jax.grad(frozen, argnums=1))(placed, at, *rows)
        (its_loss, its_correct), (its_head, its_hidden) = found
        errors = {path: float(np.abs(np.asarray(its_head[path]) - d_head[path]).max()) for path in head}
        errors["hidden"] = float(np.abs(np.asarray(its_hidden) - d_hidden).max())
        errors["hidden alone"] = float(np.abs(np.asarray(alone) - d_hidden).max())
        out[name] = {
            "loss": abs(float(its_loss - loss) / float(loss)),
            "correct": abs(float(its_correct - correct)),
            "gradients": errors,
        }
    out["largest"] = float(max(np.abs(leaf).max() for leaf in d_head.values()))
    some = ("fsdp=8", "fsdp=4 x tensor=2", "data=8", "fsdp=2 x context=2 x tensor=2")
    out["dropping"] = dropping({name: MESHES[name] for name in some}, head, hidden, targets, weights)
    out["kl"] = divergences(head, hidden, weights != 0)
    out["squares"] = squares(head, hidden, targets, weights != 0)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
