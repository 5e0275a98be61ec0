"""A model in training, against transformers, peft and torch.optim.AdamW in torch."""

import jax
import numpy as np
import pytest
import torch
from support.adapted import Adapted
from support.peft_witness import base_in_torch, peft_model, peft_parameters
from support.runs import write_model

from ftjax import tree
from ftjax.adapted import NONE, load_model
from ftjax.hosted.refusals import Refused
from ftjax.hosted.tinker import batches, checkpoints
from ftjax.hosted.tinker.losses import LOSSES
from ftjax.hosted.tinker.training import ALPHA, Adam, Learner, Programs, Shape, prompt_logps
from ftjax.hosted.tinker.wire import Datum
from ftjax.weights.peft.adapter import BaseFacts

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VOCABULARY, RANK = 400, 4
UNTIED = {"tie_word_embeddings": False}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Programs:
    base, variables = load_model(str(write_model(tmp_path_factory.mktemp("base") / "model", **UNTIED)), {}, "float32")
    return Programs(base, variables[NONE]["params"], tokens=256)


def moved(programs: Programs, seed: int = 3) -> Learner:
    """With an adapter that changes what the model says, as after training."""
    learner, rng = Learner.begin(programs, Shape(RANK), 0), np.random.default_rng(seed)
    noise = {path: 0.1 * rng.standard_normal(leaf.shape) for path, leaf in tree.flatten(learner.trained).items()}
    learner.trained = jax.tree.map(lambda leaf, by: leaf + np.float32(by), learner.trained, tree.unflatten(noise))
    return learner


def as_run(learner: Learner) -> Adapted:
    programs = learner.programs
    return Adapted(
        programs.model,
        {"params": programs.params, "lora": learner.adapter},
        lambda path: path.startswith("lora/") and path.endswith(("lora_a", "lora_b")),
    )


def in_torch(learner: Learner):
    base = base_in_torch(vocab_size=VOCABULARY, max_position_embeddings=512, **UNTIED)
    return peft_model(base, as_run(learner), r=RANK, lora_alpha=ALPHA, target_modules=NAMES)


def data(seed: int, lengths: list[int], loss: str = "cross_entropy") -> list[Datum]:
    rng, out = np.random.default_rng(seed), []
    for length in lengths:
        tokens = rng.integers(0, VOCABULARY, length + 1)
        inputs = {"target_tokens": tokens[1:]}
        for name in LOSSES[loss].inputs:
            values = -6 + rng.standard_normal(length) if name == "logprobs" else rng.standard_normal(length)
            inputs[name] = values.astype(np.float32)
        out.append(Datum(tokens[:-1].astype(np.int32), inputs))
    return out


def torch_logps(model, datum: Datum) -> torch.Tensor:
    logits = model(torch.tensor(datum.tokens[None])).logits[0]
    targets = torch.tensor(datum.inputs["target_tokens"])
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


def torch_loss(model, datum: Datum, loss: str) -> torch.Tensor:
    logps = torch_logps(model, datum)
    if loss == "cross_entropy":
        return -(logps * torch.tensor(datum.inputs["weights"])).sum()
    ratios = torch.exp(logps - torch.tensor(datum.inputs["logprobs"]))
    return -(ratios * torch.tensor(datum.inputs["advantages"])).sum()


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling"])
def test_gradients_of_several_calls_add_up_to_those_of_torch(programs, loss):
    learner = moved(programs)
    model = in_torch(learner)
    first, second = data(1, [5, 40, 17], loss), data(2, [9], loss)
    for part in (first, second):
        outputs, metrics = learner.run(part, loss, {})
        expected = [torch_loss(model, datum, loss) for datum in part]
        sum(expected).backward()
        np.testing.assert_allclose(metrics["loss:sum"], float(sum(expected).detach()), rtol=1e-5)
        for output, datum, whole in zip(outputs, part, expected, strict=True):
            logps = torch_logps(model, datum).detach().numpy()
            np.testing.assert_allclose(output["logprobs"], logps, atol=1e-5)
            np.testing.assert_allclose(output["elementwise_loss"].sum(), float(whole.detach()), rtol=1e-4, atol=1e-4)
    ours = peft_parameters({"lora": learner.gradients})
    theirs = {name: its.grad.numpy() for name, its in model.named_parameters() if its.requires_grad}
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_steps_by_the_same_gradients_are_those_of_torch(programs, clip):
    learner = moved(programs)
    model = in_torch(learner)
    settings = Adam(learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1, grad_clip_norm=clip)
    named = {name: its for name, its in model.named_parameters() if its.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    for seed in range(2):
        learner.run(data(seed, [12, 30]), "cross_entropy", {})
        for name, gradient in peft_parameters({"lora": learner.gradients}).items():
            named[name].grad = torch.tensor(gradient.copy())
        norm = torch.nn.utils.clip_grad_norm_(named.values(), clip or float("inf"))
        optimizer.step()
        np.testing.assert_allclose(learner.step(settings)["grad_norm"], float(norm), rtol=1e-5)
    for name, ours in peft_parameters({"lora": learner.trained}).items():
        np.testing.assert_allclose(ours, named[name].detach().numpy(), atol=1e-5, err_msg=name)


def test_forward_adds_no_gradient_and_ignores_weights_in_what_it_says(programs):
    learner = moved(programs)
    [datum] = data(4, [10])
    datum.inputs["weights"] = np.zeros(10, np.float32)
    outputs, metrics = learner.run([datum], "cross_entropy", {}, forward_only=True)
    assert learner.gradients is None
    assert metrics["loss:sum"] == 0
    np.testing.assert_allclose(outputs[0]["logprobs"], torch_logps(in_torch(learner), datum).detach(), atol=1e-5)


def test_a_fresh_model_is_its_base_and_follows_from_its_seed(programs):
    one, same, other = (Learner.begin(programs, Shape(RANK), seed) for seed in (1, 1, 2))
    tokens = np.arange(20, dtype=np.int32)
    base, _ = prompt_logps(programs, None, tokens)
    np.testing.assert_allclose(prompt_logps(programs, one.adapter, tokens)[0][1:], base[1:], atol=1e-6)
    assert np.isnan(base[0])
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), one.trained, same.trained)
    assert all(jax.tree.leaves(equal))
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), one.trained, other.trained)
    assert not all(jax.tree.leaves(equal))


def test_what_is_likeliest_in_a_prompt(programs):
    learner, tokens = moved(programs), np.arange(50, 117, dtype=np.int32)
    logps, likeliest = prompt_logps(programs, learner.adapter, tokens, 3)
    with torch.no_grad():
        all_logps = torch.log_softmax(in_torch(learner)(torch.tensor(tokens[None])).logits[0], -1)
    expected = all_logps.topk(3)
    np.testing.assert_allclose(
        logps[1:], all_logps[:-1].gather(1, torch.tensor(tokens[1:, None]).long())[:, 0], atol=1e-5
    )
    np.testing.assert_array_equal(likeliest.tokens[1:], expected.indices[:-1])
    np.testing.assert_allclose(likeliest.logps[1:], expected.values[:-1], atol=1e-5)
    assert likeliest.logps[0].tolist() == [-99999.0] * 3


def test_what_is_saved_goes_on_bit_by_bit(programs, tmp_path):
    learner = moved(programs)
    learner.run(data(0, [12]), "cross_entropy", {})
    learner.step(Adam())
    checkpoints.save_state(tmp_path / "state", learner, BaseFacts("base", "0" * 64))
    whole, fresh = (checkpoints.load_state(tmp_path / "state", programs, optimizer) for optimizer in (True, False))
    assert fresh.moments.steps == 0
    for one in (learner, whole, fresh):
        one.run(data(1, [20, 7]), "cross_entropy", {})
        one.step(Adam(learning_rate=1e-2))
    ours, theirs, other = (tree.flatten(one.trained) for one in (learner, whole, fresh))
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
    assert any((np.asarray(leaf) != np.asarray(other[path])).any() for path, leaf in ours.items())


def test_a_step_without_all_its_gradients_is_none(programs):
    learner = moved(programs)
    with pytest.raises(Refused, match="call forward_backward before"):
        learner.step(Adam())
    before = learner.trained
    learner.run(data(0, [6]), "cross_entropy", {})
    [datum] = data(1, [6], "importance_sampling")
    datum.inputs["logprobs"][:] = -1e4  # of which the ratio is infinite
    with pytest.raises(Refused, match=r"the loss of data\[0\] is infinite"):
        learner.run([datum], "importance_sampling", {})
    with pytest.raises(Refused, match="a forward_backward before this step failed"):
        learner.step(Adam())
    assert learner.trained is before
    learner.run(data(0, [6]), "cross_entropy", {})
    learner.step(Adam())  # goes on


def test_few_shapes():
    loss = LOSSES["cross_entropy"]
    lengths = [5, 33, 64, 65, 100, 7, 9, 12, 31]
    made = list(batches.padded(data(0, lengths), loss, 256))
    assert [padded.batch["tokens"].shape for padded in made] == [(2, 128), (4, 64), (4, 32)]
    assert sorted(row for padded in made for row in padded.rows) == list(range(9))
    assert [padded.batch["tokens"].shape for padded in batches.padded(data(0, [300]), loss, 256, 8)] == [(8, 512)]


def test_what_is_adapted(programs):
    def modules(**changes):
        return {path.split("/")[-2] for path in programs.targets(Shape(RANK, **changes))}

    assert modules() == set(NAMES)
    assert modules(train_mlp=False, train_unembed=False) == set(NAMES[:4])
    assert modules(train_attn=False, train_mlp=False) == {"lm_head"}
    with pytest.raises(Refused, match="adapts nothing"):
        modules(train_attn=False, train_mlp=False, train_unembed=False)
