"""Learning from another model: what its batches are, that it learns, and that a run of it resumes exactly."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.pairs import begun, config_of
from support.runs import write_model, write_rows
from transformers import AutoModelForCausalLM

from ftjax import assemble, distillation, origin, plan, rollouts, train, tree
from ftjax import config as configs
from ftjax.distillation import Distilled
from ftjax.errors import UserError
from ftjax.memory import bytes_on_device
from ftjax.objectives.distillation import make_distillation
from ftjax.objectives.reference import TEACHER
from ftjax.planning import compiled, flops, topology, writing
from ftjax.training import metrics

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("distillation")
    write_model(root / "model")
    write_model(root / "teacher", hidden_size=96, intermediate_size=48)
    write_model(root / "padded", vocab_size=416)
    write_rows(root / "rows.jsonl", 40)
    return root


def config_for(root, **changes):
    given = {
        "objective.name": "gkd",
        "objective.teacher": str(root / "teacher"),
        "data.train": (str(root / "rows.jsonl"),),
        "data.checks": "off",
        "data.max_length": 64,
        "data.row_length": 64,
        "rollouts.max_new_tokens": 8,
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return config_of(root, **given | changes)


def with_teacher(config):
    """(the program, what training starts from with the teacher, the loader, both models)"""
    program, start, loader = begun(config)
    base = assemble.open_base(config.model)
    teacher = distillation.open_teacher(config, base)
    frozen = distillation.with_teacher(start.frozen, config, teacher, program)
    return program, start._replace(frozen=frozen), loader, (base, teacher)


def exact(ours, theirs, trained, beta, temperature):
    """The means of the divergence and of our entropy over trained tokens; logits float64 [B, T, V]."""
    logs = [logits / temperature for logits in (ours, theirs)]
    q, p = (np.exp(x - x.max(-1, keepdims=True)) for x in logs)
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    m = beta * p + (1 - beta) * q
    each = (beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)).sum(-1)
    return each[trained].mean(), -(q * np.log(q)).sum(-1)[trained].mean()


@pytest.mark.parametrize(("model", "teacher_name"), [("model", "teacher"), ("model", "padded"), ("padded", "teacher")])
def test_the_loss_is_the_divergence_from_the_teacher_at_trained_tokens(root, model, teacher_name):
    """Over the tokens that both have: what one of them is padded with does not count."""
    changes = {"model.source": str(root / model), "objective.teacher": str(root / teacher_name)}
    config = config_for(root, **changes, **{"objective.distill_beta": 0.3, "objective.distill_temperature": 2.0})
    program, start, loader, (base, teacher) = with_teacher(config)
    with jax.set_mesh(program.mesh):
        batch = {name: jnp.asarray(array) for name, array in loader.batch(0).items()}
        variables = tree.combine(start.state.trainable, start.frozen)
        objective = jax.jit(make_distillation(base.model, config.objective, teacher.model), static_argnums=2)
        loss = objective(variables, batch, None)

        def logits(model, variables):
            given = batch["tokens"], batch["positions"], batch["segment_ids"]
            return np.asarray(
                model.apply(variables, model.apply(variables, *given)[0], method=model.unembed), np.float64
            )

        ours = logits(base.model, {name: part for name, part in variables.items() if name != TEACHER})
        theirs = logits(teacher.model, variables[TEACHER])
    assert {ours.shape[-1], theirs.shape[-1]} == ({400, 416} if "padded" in (model, teacher_name) else {400})
    ours, theirs = ours[..., :400], theirs[..., :400]
    expected, entropy = exact(ours, theirs, np.asarray(batch["weights"]) > 0, 0.3, 2.0)
    assert float(loss.sum / loss.weight) == pytest.approx(expected, rel=1e-5)
    total, weight = loss.metrics["entropy"]
    assert float(total / weight) == pytest.approx(entropy, rel=1e-5)
    assert float(loss.weight) == batch["weights"].sum()


def write_teachers_adapter(path, teacher, seed=0, **settings):
    """By peft, of random matrices, beside its base in torch; returns that model."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "modules_to_save": ["lm_head"]}], ids=["lora", "dora"])
def test_a_teacher_with_an_adapter_says_what_it_says_in_peft(root, tmp_path, settings, record_figure):
    source = str(write_model(tmp_path / "teacher", hidden_size=96, tie_word_embeddings=False))
    theirs = write_teachers_adapter(tmp_path / "adapter", source, **settings)
    config = config_for(root, **{"objective.teacher": source, "objective.teacher_adapter": str(tmp_path / "adapter")})
    program, start, loader, (_, teacher) = with_teacher(config)
    with jax.set_mesh(program.mesh):
        tokens = loader.batch(0)["tokens"][:1, :20]
        positions = np.arange(20)[None]
        hidden, _ = teacher.model.apply(start.frozen[TEACHER], tokens, positions, np.ones_like(tokens))
        ours = np.asarray(teacher.model.apply(start.frozen[TEACHER], hidden, method="unembed"))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens.astype(np.int64))).logits.numpy()
        with theirs.disable_adapter():
            before = theirs(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    record_figure("logits", difference := np.abs(ours - wanted).max())
    assert difference < 1e-4
    assert np.abs(before - wanted).max() > 0.05


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapter_that_is_none_of_the_teacher_is_refused(root, tmp_path):
    key = "objective.teacher_adapter"
    write_teachers_adapter(tmp_path / "adapter", root / "padded")
    with pytest.raises(UserError, match="this adapter does not fit the model"):
        train.train(config_for(root, **{key: str(tmp_path / "adapter")}), tmp_path / "run")
    with pytest.raises(UserError, match=r"nothing/adapter_config\.json: no such file"):
        train.train(config_for(root, **{key: str(tmp_path / "nothing")}), tmp_path / "run")
    write_teachers_adapter(tmp_path / "tied", root / "teacher", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match="adapts an embedding that is the output head too"):
        train.train(config_for(root, **{key: str(tmp_path / "tied")}), tmp_path / "run")


def test_batches_are_the_rows_or_what_the_model_writes_to_their_prompts(root, tmp_path):
    config = config_for(root)
    program, start, loader, (base, _) = with_teacher(config)
    source, again = (Distilled(config, base, start.frozen, loader, tmp_path) for _ in range(2))
    with jax.set_mesh(program.mesh):
        made = [source.batch(index, start.state) for index in range(6)]
        last = again.batch(5, start.state)
    for name, array in made[5].arrays.items():
        np.testing.assert_array_equal(last.arrays[name], array)
    assert {batch.metrics["student_written"] for batch in made} == {0.0, 1.0}
    for index, batch in enumerate(made):
        rows = loader.batch(index)
        if not batch.metrics["student_written"]:
            for name, array in rows.items():
                np.testing.assert_array_equal(batch.arrays[name], array)
            continue
        for row in range(4):
            trained, theirs = batch.arrays["weights"][row] > 0, rows["weights"][row] > 0
            start_at = np.argmax(theirs)
            assert np.argmax(trained) == start_at
            np.testing.assert_array_equal(
                batch.arrays["tokens"][row, : start_at + 1], rows["tokens"][row, : start_at + 1]
            )
            assert 1 <= trained.sum() <= 8


def test_the_first_answer_of_a_step_that_the_model_wrote_can_be_read(root, tmp_path):
    """In the workdir, as its tokens say it; lines that a killed run left are written anew."""
    config = config_for(root)
    program, start, loader, (base, _) = with_teacher(config)
    (tmp_path / rollouts.FILE).write_text('{"step": 1, "prompt": "kept"}\n{"step": 9, "prompt": "late"}\n{"ste')
    source = Distilled(config, base, start.frozen, loader, tmp_path)
    with jax.set_mesh(program.mesh):
        made = {index + 1: source.batch(index, start.state) for index in range(1, 8)}
    written = {step: batch.arrays for step, batch in made.items() if batch.metrics["student_written"]}
    first, *lines = metrics.read(tmp_path / rollouts.FILE)
    assert first == {"step": 1, "prompt": "kept"}
    assert [line["step"] for line in lines] == list(written)
    for line, arrays in zip(lines, written.values(), strict=True):
        row = loader.examples.row(int(loader.batch_examples(line["step"] - 1)[0])).fields
        asked, answer = (
            row["messages"] if "messages" in row else ({"content": row[k]} for k in ("prompt", "completion"))
        )
        assert asked["content"] in line["prompt"]
        assert line["expected"] == answer["content"]
        drawn = arrays["targets"][0][arrays["weights"][0] > 0]
        assert [one["text"] for one in line["completions"]] == [base.tokenizer.decode(drawn, skip_special_tokens=True)]


def test_the_prompt_of_several_turns_is_all_before_the_last_answer(root, tmp_path):
    turns = [("user", "The blue lamp"), ("assistant", "send blue"), ("user", "The red lamp"), ("assistant", "send red")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    config = config_for(root, **{"data.train": (str(tmp_path / "rows.jsonl"),), "data.max_length": 96})
    config.data.row_length = 96
    _, _, loader = begun(config)
    tokenizer = assemble.open_base(config.model).tokenizer
    prompt = distillation._prompt(loader.examples.documents_of(0)[0])
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt.tolist() == asked


def values(workdir):
    _, _, variables, step = assemble.load_run(workdir)
    assert step == 4
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(variables["lora"]).items()}


@pytest.mark.slow
def test_a_run_resumes_exactly(root, tmp_path):
    write_teachers_adapter(tmp_path / "adapter", root / "teacher")
    config = config_for(root, steps=4, **{"objective.teacher_adapter": str(tmp_path / "adapter")})
    assert train.train(config, tmp_path / "run") == 0
    steps = metrics.read(tmp_path / "run/metrics.jsonl")
    assert {record["student_written"] for record in steps} == {0.0, 1.0}
    end, written = values(tmp_path / "run"), (tmp_path / "run" / rollouts.FILE).read_text()

    config.checkpoint.resume_step = 2
    assert train.train(config, tmp_path / "run") == 0
    again = metrics.read(tmp_path / "run/metrics.jsonl")
    for name in ("loss", "grad_norm", "student_written"):
        assert [record[name] for record in again] == [record[name] for record in steps]
    assert (tmp_path / "run" / rollouts.FILE).read_text() == written
    for path, leaf in values(tmp_path / "run").items():
        np.testing.assert_array_equal(leaf, end[path], err_msg=path)


def test_a_run_goes_on_with_the_same_teacher_alone_wherever_that_is(root, tmp_path):
    config = config_for(root)
    base = assemble.open_base(config.model)
    digest = distillation.teacher_digest(config, distillation.open_teacher(config, base))
    began = origin.contents(config, base.reader, base.model.spec) | {"teacher": digest}
    origin.record(tmp_path, config, origin.located(config, base.path), began)
    config.objective.teacher = str(tmp_path / "moved")
    origin.check(config, tmp_path, began)
    with pytest.raises(UserError, match=r"teacher=.*moved: this model is not the one that .* began to learn from"):
        origin.check(config, tmp_path, began | {"teacher": "another"})
    write_teachers_adapter(tmp_path / "adapter", root / "teacher")
    config.objective.update(teacher=str(root / "teacher"), teacher_adapter=str(tmp_path / "adapter"))
    digests = set()
    for seed in (1, 2):
        write_teachers_adapter(tmp_path / "adapter", root / "teacher", seed)
        digests.add(distillation.teacher_digest(config, distillation.open_teacher(config, base)))
    assert len(digests | {digest}) == 3
    with pytest.raises(UserError, match=r"teacher=.* with the adapter .*: this model is not the one"):
        origin.check(config, tmp_path, began | {"teacher": digests.pop()})


def test_a_teachers_adapter_is_found_from_every_directory(root, tmp_path, monkeypatch):
    write_teachers_adapter(tmp_path / "adapter", root / "teacher")
    monkeypatch.chdir(tmp_path)
    config = config_for(root, **{"objective.teacher_adapter": "adapter"})
    located = origin.located(config, root / "model")
    assert located.objective.teacher_adapter == str(tmp_path / "adapter")
    origin.record(tmp_path, config, located, {})
    monkeypatch.chdir(root)
    assert origin.at_hand(config, tmp_path).objective.teacher_adapter == str(tmp_path / "adapter")


@pytest.mark.slow
def test_it_learns_what_the_teacher_says(root, tmp_path):
    config = config_for(root, steps=16, **{"data.holdout": 0.2, "optimizer.learning_rate": 3e-2})
    assert train.train(config, tmp_path / "run") == 0
    records = metrics.read(tmp_path / "run/metrics.jsonl")
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective.teacher": ""}, "config.objective.teacher: name the model to learn from"),
        ({"rollouts.samples": 4}, r"rollouts.samples: objective.name='gkd' does not use it \(of grpo, "),
        ({"objective.student_share": 0.0}, "rollouts.max_new_tokens: with config.objective.student_share=0"),
        ({"data.train": "texts"}, "there is no prompt that the model could answer"),
        ({"rollouts.max_new_tokens": 50, "data.row_length": 0}, "leaves no room for a completion of 50"),
        ({"data.row_length": 30}, r"row_length=30: the longest row has \d+ tokens"),
    ],
)
def test_mistakes_are_named(root, tmp_path, changes, said):
    if changes.get("data.train") == "texts":
        (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "The blue lamp is broken"}) + "\n")
        changes = {"data.train": (str(tmp_path / "texts.jsonl"),)}
    with pytest.raises(UserError, match=said):
        train.train(config_for(root, **changes), tmp_path / "run")


def test_a_plan_counts_the_teacher(root):
    """Its weights, and the products of its forward pass: what the program of a step has more than that of sft."""
    sizes = {"model.param_dtype": "float32", "data.row_length": 64}
    spec, theirs = (plan.model_spec(str(root / name)) for name in ("model", "teacher"))
    config = configs.changed(config_for(root), sizes)
    alone = configs.changed(config, {"objective.name": "sft", "objective.teacher": "", "rollouts.max_new_tokens": 256})
    devices = jax.devices()[:1]
    beside = compiled.describe(config, spec, devices, theirs)
    alone = compiled.describe(alone, spec, devices)
    held = [sum(map(bytes_on_device, jax.tree.leaves(program.frozen))) for program in (beside, alone)]
    torch_teacher = AutoModelForCausalLM.from_pretrained(root / "teacher", dtype=torch.float32)
    weights = {name: leaf.numel() for name, leaf in torch_teacher.named_parameters()}
    assert held[0] - held[1] == 4 * sum(weights.values())
    its = torch_teacher.config
    assert its.tie_word_embeddings
    products = sum(size for name, size in weights.items() if "norm" not in name)
    scores = 4 * (64 * 65 // 2) * its.num_attention_heads * its.head_dim * its.num_hidden_layers
    found = [flops.of_step(program) for program in (beside, alone)]
    assert found[0].total - found[1].total == 4 * (2 * 64 * products + scores)


def test_the_plan_of_writing_is_of_one_completion_to_each_row(root, monkeypatch):
    def compile_text(mesh, trace):
        done = trace().lower().compile()
        return done.as_text(), done.memory_analysis()

    monkeypatch.setattr(compiled, "compile_text", compile_text)
    slice_, spec = topology.parse("v5e:1x1"), plan.model_spec(str(root / "model"))
    config = config_for(root)
    program = compiled.describe(config, spec, jax.devices()[:1], spec)
    found = writing.plan(config, program, slice_)
    assert (found.prompts, found.completions, found.tokens) == (4, 4, 8)
    assert found.training >= 2 * 4 * sum(leaf.size for leaf in jax.tree.leaves(program.variables["params"]))
    config = configs.changed(config, {"objective.student_share": 0.0, "rollouts.max_new_tokens": 256})
    assert writing.plan(config, program, slice_) is None
