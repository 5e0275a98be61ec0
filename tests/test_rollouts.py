"""Batches that the model writes itself: what is in them, what is rewarded, and that a run of them resumes exactly."""

import itertools
import json

import jax
import numpy as np
import pytest
from support.rollouts import REWARD, config_for, source_of
from support.runs import write_model, write_rows

from ftjax import assemble, config_changes, origin, rollouts, train, tree
from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.method import method_of
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import token_logps
from ftjax.returns import group_advantages
from ftjax.rollouts import most_differing, most_varied
from ftjax.training import digest, metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("rollouts")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 40)
    return root


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.05}],
    ids=["all", "cooler", "filtered"],
)
def test_a_batch_holds_what_was_sampled_and_how_likely_it_was(root, tmp_path, sampling):
    """Without the filters: a ratio of the policy to itself is 1 whatever they leave (trl#4159)."""
    changes, temperature = {f"rollouts.{key}": value for key, value in sampling.items()}, sampling["temperature"]
    source, start, program = source_of(config_for(root, **changes), tmp_path)
    with jax.set_mesh(program.mesh):
        made = source.batch(3, start.state)
        again = source_of(config_for(root, **changes), tmp_path)[0].batch(3, start.state)
        other = source.batch(4, start.state)
    arrays = made.arrays
    for name, array in arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    assert (other.arrays["tokens"] != arrays["tokens"]).any()
    assert (arrays["segment_ids"].max(axis=1) == 1).all()
    assert made.tokens == (arrays["segment_ids"] > 0).sum()
    trained = arrays["weights"] > 0
    for first in (0, 3):  # the completions of a prompt lie side by side, and are drawn apart
        prompts = {tuple(arrays["tokens"][row, : np.argmax(trained[row]) + 1]) for row in range(first, first + 3)}
        assert len(prompts) == 1
        assert len({tuple(arrays["targets"][row][trained[row]]) for row in range(first, first + 3)}) == 3
    assert (trained.sum(axis=1) <= 8).all()
    for name in ("advantages", "sampled_logps"):
        assert not arrays[name][~trained].any()

    # The trainer, at the temperature of sampling, agrees with the sampler.
    unembed = make_unembed(program.model)
    variables = tree.combine(start.state.trainable, start.frozen)
    ours = token_logps(program.model, lambda *given: unembed(*given) / temperature, variables, arrays, None)
    assert np.abs(np.asarray(ours) - arrays["sampled_logps"])[trained].max() < 1e-4
    is_filtered = len(sampling) > 1
    assert ("sampling/kept_mean" in made.metrics) == is_filtered
    assert not is_filtered or 0 < made.metrics["sampling/kept_mean"] < 0.95


def test_a_completion_ends_by_its_text_and_its_tokens_stay(root, tmp_path):
    plain, start, program = source_of(config_for(root), tmp_path)
    with jax.set_mesh(program.mesh):
        free = plain._write(0, 0, start.state)
        string = next(
            text[i] for text in (one.text for one in free.completions) for i in range(2, len(text)) if text[i].isalpha()
        )
        changes = {"rollouts.stop_strings": (string,), "objective.mask_truncated": True}
        stopping = source_of(config_for(root, **changes), tmp_path)[0]
        written, made = stopping._write(0, 0, start.state), stopping.batch(0, start.state)
    assert any(string in one.text for one in written.completions)
    for before, after in zip(free.completions, written.completions, strict=True):
        np.testing.assert_array_equal(after.tokens, before.tokens[: len(after.tokens)])  # nothing is tokenized again
        assert string not in text_of(stopping, after.tokens[:-1])
        if string in after.text:
            assert after.stopped
            assert string in text_of(stopping, after.tokens)  # which no end token follows
            assert len(after.logps) == len(after.tokens)
    trained = [int((row > 0).sum()) for row in made.arrays["weights"]]
    assert trained == [len(one.logps) * one.stopped for one in written.completions]  # one that ended was not cut
    with pytest.raises(UserError, match=r"rollouts.stop_strings: .* has the special token '<.im_end.>'"):
        source_of(config_for(root, **{"rollouts.stop_strings": ("x<|im_end|>",)}), tmp_path)


def text_of(source, tokens):
    return source._base.tokenizer.decode(tokens, skip_special_tokens=True)


def test_advantages_compare_the_completions_of_a_prompt():
    rewards = np.array([[1.0, 0.0, 2.0], [5.0, 5.0, 5.0]])
    np.testing.assert_allclose(group_advantages(rewards, "none"), [[0, -1, 1], [0, 0, 0]])
    np.testing.assert_allclose(group_advantages(rewards, "group"), [[0, -1 / 1.0001, 1 / 1.0001], [0, 0, 0]])
    whole = np.sqrt(sum((x - 3) ** 2 for x in (1, 0, 2, 5, 5, 5)) / 5) + 1e-4
    np.testing.assert_allclose(group_advantages(rewards, "batch"), [[0, -1 / whole, 1 / whole], [0, 0, 0]])


def test_prompts_of_equal_rewards_give_way_in_their_order():
    rewards = np.array([[1, 1, 1], [0, 1, 0], [2, 2, 2], [1, 0, 1], [0, 0, 1.0]])
    assert most_differing(rewards, 2).tolist() == [1, 3]
    assert most_differing(rewards, 4).tolist() == [0, 1, 3, 4]  # the first of those that teach nothing fills up
    assert most_differing(rewards[:2], 2).tolist() == [0, 1]


def test_the_completions_that_differ_most_vary_as_much_as_any_so_many_do():
    """Against all subsets."""
    rng = np.random.default_rng(0)
    rewards = np.concatenate([rng.integers(0, 2, (20, 7)), rng.normal(size=(20, 7)), np.ones((1, 7))])
    for count in (2, 3, 4, 7):
        chosen = most_varied(rewards, count)
        for values, places in zip(rewards, chosen, strict=True):
            assert sorted(set(places)) == places.tolist()
            most = max(np.var(values[list(some)]) for some in itertools.combinations(range(7), count))
            assert np.var(values[places]) == pytest.approx(most)


def test_of_the_completions_of_a_prompt_those_that_differ_most_are_learned_from(root, tmp_path):
    """Six are written to each of two prompts, and two learned from; a reward of 0 or 1 makes one of each, if any."""
    changes = {"objective.rewards": ("support.rewards:capital",), "rollouts.max_new_tokens": 1, "rollouts.samples": 6}
    whole, start, program = source_of(config_for(root, **changes, **{"data.batch_size": 12}), tmp_path)
    part = source_of(config_for(root, **changes, **{"data.batch_size": 4, "rollouts.learned": 2}), tmp_path)[0]
    differed = 0
    with jax.set_mesh(program.mesh):
        for index in range(4):
            every, made = whole.batch(index, start.state), part.batch(index, start.state)
            assert made.arrays["tokens"].shape[0] == 4
            assert made.metrics["reward"] == every.metrics["reward"]  # of all that was written
            rows = {row.tobytes() for row in every.arrays["tokens"][:, : made.arrays["tokens"].shape[1]]}
            assert all(row.tobytes() in rows for row in made.arrays["tokens"])
            for before, group in zip(*(one.arrays["advantages"].sum(axis=1).reshape(2, -1) for one in (every, made))):
                assert before.any() == group.any()
                differed += group.any()
                # The two are 1 and 0: their sample standard deviation is the root of a half.
                expected = [-0.5, 0.5] / (np.sqrt(0.5) + 1e-4) if group.any() else [0, 0]
                np.testing.assert_allclose(sorted(group), expected, rtol=1e-6)
    assert differed
    with pytest.raises(UserError, match=r"rollouts\.learned=7: .*set it to 2 to 6"):
        method_of(config_for(root, **changes, **{"rollouts.learned": 7}))


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_prompts_that_teach_nothing_are_replaced_alike_in_a_run_that_goes_on(root, tmp_path, name):
    """Few first tokens are capital letters, so that the rewards of most prompts are all 0."""
    changes = {"objective.rewards": ("support.rewards:capital",), "rollouts.max_new_tokens": 1, "objective.name": name}
    source, start, program = source_of(config_for(root, **changes), tmp_path)
    changes["rollouts.resample"] = 6
    replacing, again = (source_of(config_for(root, **changes), tmp_path)[0] for _ in range(2))
    written = 0
    with jax.set_mesh(program.mesh):
        for index in range(4):
            plain, made = source.batch(index, start.state), replacing.batch(index, start.state)
            groups = made.arrays["advantages"].any(axis=1).reshape(2, 3).any(axis=1)
            assert made.metrics["groups/kept"] == groups.sum()
            assert (plain.arrays["advantages"].any(axis=1).reshape(2, 3).any(axis=1)).sum() <= groups.sum()
            assert groups.all() or made.metrics["groups/written"] == 2 * 7
            written += made.metrics["groups/written"]
        for name, array in again.batch(3, start.state).arrays.items():  # of batches before it nothing is needed
            np.testing.assert_array_equal(made.arrays[name], array)
    assert 8 < written < 4 * 14
    assert "groups/written" not in plain.metrics


def test_a_round_ahead_is_what_the_weights_of_the_last_round_write(root, tmp_path):
    changes = {"rollouts.iterations": 2, "optimizer.learning_rate": 0.1, "schedule.name": "constant"}
    of_earlier, of_now = (source_of(config_for(root, **changes), tmp_path)[0] for _ in range(2))
    source, start, program = source_of(config_for(root, **changes, **{"rollouts.ahead": 1}), tmp_path)
    state, trained, staleness = start.state, [], []
    with jax.set_mesh(program.mesh):
        for index in range(6):
            trained.append(jax.device_get(state.trainable))
            made = source.batch(index, state)
            staleness.append(made.metrics["sampling/staleness"])
            state, _ = program.step(state, start.frozen, {name: array[None] for name, array in made.arrays.items()})
        earlier, now = (
            its.batch(4, start.state.replace(trainable=trained[step], kept={})).arrays
            for its, step in ((of_earlier, 2), (of_now, 4))
        )
    for name in ("tokens", "sampled_logps", "advantages"):
        np.testing.assert_array_equal(made.arrays[name], earlier[name])
    assert not np.array_equal(made.arrays["tokens"], now["tokens"])
    assert staleness == [0, 1, 2, 3, 2, 3]


def test_what_earlier_weights_wrote_counts_by_how_likely_it_is_now(root, tmp_path):
    """The trainer's own log p before the round, and their ratio to those of sampling, against the formula."""
    changes = {"rollouts.ahead": 1, "rollouts.temperature": 0.7, "objective.correction": "token_truncate"}
    source, start, program = source_of(config_for(root, **changes, **{"objective.correction_max": 1.1}), tmp_path)
    state = start.state
    state = state.replace(trainable=jax.tree.map(lambda leaf: leaf + 0.1, state.trainable))
    with jax.set_mesh(program.mesh):
        arrays = source.batch(0, state).arrays
    unembed, trained = make_unembed(program.model), arrays["weights"] > 0
    variables = tree.combine(state.trainable, start.frozen)
    now = np.asarray(token_logps(program.model, lambda *given: unembed(*given) / 0.7, variables, arrays, None))
    np.testing.assert_allclose(arrays["old_logps"][trained], now[trained], atol=1e-5)
    ratios = np.exp(np.float64(now)[trained] - arrays["sampled_logps"][trained])
    assert np.abs(ratios - 1).max() > 0.1
    np.testing.assert_allclose(arrays["correction"][trained], np.minimum(ratios, 1.1), rtol=1e-4)
    assert not arrays["correction"][~trained].any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective.name": "ppo"}, r"does not use it \(of grpo, rloo\)"),
        ({"objective.name": "rloo", "objective.kl_coef": 0.1}, r"with config.objective.kl_coef=0.1 .* rewarded alike"),
        ({"objective.name": "rloo", "objective.baseline": "batch"}, r"set objective.baseline to 'others'"),
    ],
)
def test_nothing_is_replaced_where_equal_rewards_teach(root, changes, said):
    with pytest.raises(UserError, match=rf"rollouts\.resample: .*{said}"):
        method_of(config_for(root, **changes, **{"rollouts.resample": 1}))


def test_of_equal_rewards_those_differ_that_came_to_an_end(root, tmp_path):
    """What a cut completion loses counts where it is decided which prompts teach something."""
    changes = {"objective.name": "rloo", "objective.rewards": ("support.rewards:of_prompt",), "rollouts.resample": 3}
    free, start, program = source_of(config_for(root, **changes), tmp_path, tuple(range(100, 140)))
    changes |= {"objective.missing_eos_penalty": 0.5}
    source, start, program = source_of(config_for(root, **changes), tmp_path, tuple(range(100, 140)))
    with jax.set_mesh(program.mesh):
        nothing, made = free.batch(0, start.state), source.batch(0, start.state)
    assert nothing.metrics["groups/kept"] == 0
    assert made.metrics["groups/kept"] == 2
    assert made.arrays["advantages"].any(axis=1).reshape(2, 3).any(axis=1).all()


def test_rewards_are_summed_by_weight_and_logged_by_name(root, tmp_path):
    named = ((REWARD, 2.0), ("support.rewards:of_prompt", 0.5))
    source, start, program = source_of(config_for(root, **{"objective.rewards": named}), tmp_path)
    with jax.set_mesh(program.mesh):
        made = source.batch(0, start.state)
    logged = made.metrics
    of_e, of_prompt = logged[f"rewards/{REWARD}/mean"], logged["rewards/support.rewards:of_prompt/mean"]
    assert logged["reward"] == pytest.approx(2 * of_e + 0.5 * of_prompt)
    assert 0 <= logged["completions/clipped_ratio"] <= 1
    assert logged["completions/max_length"] <= 8
    (line,) = (tmp_path / rollouts.FILE).read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 1
    assert len(record["completions"]) == 3
    for one in record["completions"]:
        assert one["rewards"][REWARD] == one["text"].count("e") / max(len(one["text"]), 1)
    # What is the same for all completions of a prompt says nothing about them.
    source, start, program = source_of(config_for(root, **{"objective.rewards": named[1:]}), tmp_path)
    with jax.set_mesh(program.mesh):
        made = source.batch(0, start.state)
    assert not made.arrays["advantages"].any()
    assert made.metrics["frac_reward_zero_std"] == 1


def test_completions_that_are_cut_may_teach_nothing(root, tmp_path):
    source, start, program = source_of(config_for(root, **{"objective.mask_truncated": True}), tmp_path)
    with jax.set_mesh(program.mesh):
        made = source.batch(0, start.state)
    cut = made.metrics["completions/clipped_ratio"]
    assert cut > 0
    assert (made.arrays["weights"].sum(axis=1) == 0).mean() == pytest.approx(cut)


OF_PPO = {
    "objective.name": "ppo",
    "objective.kl_coef": 0.1,
    "objective.kl_target": 0.5,
    "objective.kl_horizon": 100.0,
    "objective.missing_eos_penalty": 0.1,
    "rollouts.samples": 1,
    "rollouts.temperature": 0.7,
    "data.batch_size": 4,
    "accumulate": 2,
    "data.ptx_rows": 2,
    "objective.ptx_coef": 0.5,
    "export_formats": ("peft",),
    "rollouts.ahead": 1,
    "objective.correction": "sequence_truncate",
}


OF_RLOO = {"objective.name": "rloo", "objective.kl_coef": 0.1}
TIMES = {"step_time", "tokens_per_second", "data_wait", "eps"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ppo", OF_PPO),
        pytest.param("grpo", {}, marks=pytest.mark.slow),
        pytest.param("rloo", OF_RLOO, marks=pytest.mark.slow),
    ],
)
def test_a_run_of_its_own_completions_resumes_exactly(root, tmp_path, name, changes):
    # A round of completions serves two steps, so that only every second step can be saved.
    changes = {"steps": 8, "rollouts.iterations": 2, "data.batch_size": 12, "checkpoint_every": 4} | changes
    texts = [{"text": f"the {word} lamp " * n} for n, word in enumerate(("blue", "red", "old", "new") * 6, 1)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    changes |= {"data.ptx": (str(tmp_path / "texts.jsonl"),)} if name == "ppo" else {}
    config = config_for(root, **changes)
    assert train.train(config, tmp_path / "run") == 0
    records = metrics.read(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    rewards = [record["reward"] for record in records]  # of a round, with whichever of its steps is logged
    assert rewards[::2] == rewards[1::2]
    assert len(set(rewards)) == 4
    assert records[0]["sampling/logp_difference_mean"] < 1e-4 < records[1]["sampling/logp_difference_mean"]
    ahead = changes.get("rollouts.ahead", 0)
    assert [record["sampling/staleness"] for record in records] == [0, 1, *[2 * ahead, 2 * ahead + 1] * 3]
    assert (records[2]["sampling/logp_difference_mean"] > 1e-4) == ahead
    written, last = (tmp_path / "run" / rollouts.FILE).read_text(), tmp_path / "run/checkpoints/8"
    end = digest.read(last)["leaves"]
    assert any(path.startswith("kept/writer/lora/") for path in end) == ahead
    assert ("kept/kl_coef" in end) == ("trainable/heads/value/kernel" in end) == (name == "ppo")
    coefs = {record["objective/kl_coef"] for record in records if "objective/kl_coef" in record}
    assert len(coefs) == 4 * (name == "ppo")  # a controller changes it after each round
    of_texts = {record["loss/ptx_avg"] for record in records if "loss/ptx_avg" in record}
    assert len(of_texts) == 8 * (name == "ppo")  # each step has others

    from_step_4 = config_for(root, **changes, **{"checkpoint.resume_step": 4})
    assert train.train(from_step_4, tmp_path / "run") == 0
    again = metrics.read(tmp_path / "run/metrics.jsonl")
    for metric in (records[0].keys() | records[1].keys()) - TIMES:
        assert [record.get(metric) for record in again] == [record.get(metric) for record in records], metric
    assert (tmp_path / "run" / rollouts.FILE).read_text() == written
    assert digest.read(last)["leaves"] == end
    assert assemble.load_run(tmp_path / "run")[2].keys() == {"params", "lora"}  # what goes out is without a critic
    if name == "ppo":
        (tmp_path / "texts.jsonl").write_text('{"text": "another"}\n' * 9)
        with pytest.raises(UserError, match=r"data.ptx=.*texts.jsonl.*; restore it"):
            train.train(config, tmp_path / "run")


def test_a_reward_models_place_is_the_same_from_every_directory(root, tmp_path, monkeypatch):
    """A run writes down where it is; the same command, which names it as before, goes on."""
    monkeypatch.chdir(tmp_path)
    config = config_for(root, **{"objective.rewards": (REWARD, ("reward:runs/rm", 0.5))})
    recorded = origin.located(config, root / "model")
    assert list(map(tuple, recorded.objective.rewards[1:])) == [(f"reward:{tmp_path}/runs/rm", 0.5)]
    again = configs.changed(config, {"objective.rewards": origin.located_rewards(config)})
    assert config_changes.changes(recorded, again) == []
    assert config_changes.changes(recorded, config) != []


def test_texts_with_other_line_ends_do_not_end_lines(root, tmp_path):
    config = config_for(root, steps=2)
    assert train.train(config, tmp_path / "run") == 0
    file = tmp_path / "run" / rollouts.FILE
    first, second, _ = file.read_text(encoding="utf-8").split("\n")
    record = json.loads(first)
    record["completions"][0]["text"] = "one\u2028two\u0085three"
    file.write_text(json.dumps(record, ensure_ascii=False) + "\n" + second[:20], encoding="utf-8")  # and a torn line
    assert train.train(config_for(root, steps=4), tmp_path / "run") == 0
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert lines[0] == record


PPO = {"objective.name": "ppo", "optimizer.learning_rate": 3e-2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"objective.loss": ("grpo",), "objective.importance": "sequence", "objective.kl_coef": 0.01},
        {"objective.loss": ("dr_grpo",), "objective.scale_rewards": "none"},
        {"objective.loss": ("dapo",), "rollouts.iterations": 2, "steps": 48},
        {"objective.loss": ("cispo",), "objective.epsilon_high": 5.0},
        {"objective.loss": ("sapo",), "objective.scale_rewards": "batch"},
        {"objective.name": "rloo", "objective.kl_coef": 0.01},
        {"objective.name": "rloo", "objective.baseline": "batch"},
        PPO | {"objective.kl_coef": 0.01, "rollouts.samples": 1, "rollouts.iterations": 4, "steps": 96},
    ],
    ids=["gspo", "dr_grpo", "dapo", "cispo", "sapo", "rloo", "reinforce", "ppo"],
)
def test_a_bandit_is_solved(tmp_path, changes, record_figure):
    """400 arms, of which those are rewarded that begin with a capital letter: a reward of 1 is the best there is."""
    write_model(tmp_path / "model", hidden_size=128, intermediate_size=64)
    write_rows(tmp_path / "rows.jsonl", 40)
    given = {"objective.rewards": ("support.rewards:capital",), "rollouts.max_new_tokens": 1, "steps": 24}
    given |= {"data.batch_size": 48, "rollouts.samples": 8} | changes
    for seed in range(5):
        assert train.train(config_for(tmp_path, seed=seed, **given), tmp_path / f"run-{seed}") == 0
        records = metrics.read(tmp_path / f"run-{seed}/metrics.jsonl")
        rewards = [record["reward"] for record in records if "reward" in record]
        record_figure(f"reward with seed {seed}", np.mean(rewards[-4:]))
        assert rewards[0] < 0.3
        assert np.mean(rewards[-4:]) > 0.95, f"seed {seed}: {rewards}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"objective.loss": ("dapo",)},
        {"objective.name": "rloo"},
        PPO | {"optimizer.learning_rate": 3e-3, "rollouts.samples": 1, "rollouts.iterations": 4, "steps": 160},
    ],
    ids=["dapo", "rloo", "ppo"],
)
def test_a_game_of_several_moves_is_solved(tmp_path, changes, record_figure):
    """Three tokens, rewarded together at the end: each must be a capital letter, and none may end it early."""
    write_model(tmp_path / "model", hidden_size=128, intermediate_size=64)
    write_rows(tmp_path / "rows.jsonl", 40)
    given = {"objective.rewards": ("support.rewards:capitals",), "rollouts.max_new_tokens": 3, "steps": 64}
    given |= {"data.batch_size": 48, "rollouts.samples": 8, "schedule.name": "constant"} | changes
    for seed in range(5):
        assert train.train(config_for(tmp_path, seed=seed, **given), tmp_path / f"run-{seed}") == 0
        rewards = [record["reward"] for record in metrics.read(tmp_path / f"run-{seed}/metrics.jsonl")]
        record_figure(f"reward with seed {seed}", np.mean(rewards[-4:]))
        assert rewards[0] < 0.3
        assert np.mean(rewards[-4:]) > 0.9, f"seed {seed}: {rewards}"


PTX = {"objective.name": "ppo", "objective.ptx_coef": 0.5, "data.ptx": ("texts.jsonl",)}


def test_the_rows_of_the_pretraining_mix_are_checked_too(root, tmp_path):
    row = {"prompt": "Who sends the yellow lamp?", "completion": "nobody does"}
    (tmp_path / "held.jsonl").write_text(json.dumps(row) + "\n")
    entry = {"source": str(tmp_path / "held.jsonl"), "score": "f1"}
    changes = PTX | {"data.ptx": (entry["source"],), "data.eval": (entry,), "data.checks": "on"}
    with pytest.raises(UserError, match=r"held.jsonl:1 .*rows of the evaluation are also trained on"):
        train.train(config_for(root, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective.rewards": ("support.rewards:raises",)}, r"rows.jsonl:\d+: .*LookupError: no such color"),
        ({"objective.rewards": ("support.rewards:no_number",)}, r"rows.jsonl:\d+.*the score is nan"),
        ({"objective.rewards": ()}, r"rows.jsonl is no task with a score of its own.*objective.rewards"),
        ({"objective.rewards": (REWARD, REWARD)}, "stands there twice"),
        ({"rollouts.iterations": 3}, r"steps=4: the model writes for 3 steps at a time.*--config.steps=6"),
        ({"objective.rewards": ("exakt",)}, "there is no score 'exakt'; did you mean 'exact'"),
        ({"data.batch_size": 7}, r"batch_size=7 completions in a step, of which config.rollouts.samples=3.*=24"),
        ({"data.row_length": 20}, r"row_length=20: the longest prompt has \d+ tokens"),
        ({"data.max_length": 24}, "rows have no room for a completion of 8 tokens within data.max_length"),
        ({"data.eval": ("rows.jsonl",)}, "rows.jsonl has no 'score'.*no loss of other answers"),
        ({"objective.loss": ("dappo",)}, "dappo"),
        ({"objective.name": "sft", "objective.rewards": ()}, "rollouts.max_new_tokens.*does not use it .of grpo"),
        ({"objective.name": "rloo", "rollouts.samples": 1}, "samples=1: .*'rloo' compares completions .*set it to 2"),
        ({"objective.name": "ppo", "objective.kl_target": 6.0}, "kl_target=6.0 does nothing with objective.kl_coef=0"),
        (PTX | {"objective.ptx_coef": 0.0}, "data.ptx=.* does nothing with objective.ptx_coef=0"),
        (
            {"objective.name": "ppo", "objective.ptx_coef": 0.5},
            "ptx_coef=0.5 does nothing with no source in config.data.ptx",
        ),
        (PTX | {"data.ptx_rows": 3, "accumulate": 2}, "ptx_rows=3 rows in 2 micro-batch.*to a multiple of 2"),
        ({"data.ptx": ("texts.jsonl",)}, "config.data.ptx: objective.name='grpo' does not use it .of ppo"),
        ({"objective.correction_max": 2.0}, "correction_max bounds what corrects .*set objective.correction"),
        (
            {"objective.correction": "token_mask", "objective.correction_min": 4.0},
            "correction_min=4 is above config.objective.correction_max=3",
        ),
        (
            {"objective.name": "rloo", "objective.correction": "token_mask"},
            "'token_mask': objective.name='rloo' has one ratio of a whole completion; use sequence_mask",
        ),
        ({"objective.name": "rejection", "objective.correction": "token_mask"}, "does not use it .of grpo, rloo, ppo"),
        ({"rollouts.ahead": 2}, "rollouts.ahead=2: it must be a number from 0 to 1"),
        ({"objective.vf_coef": 0.5}, "vf_coef: objective.name='grpo' does not use it .of ppo"),
    ],
)
def test_mistakes_are_named(root, tmp_path, changes, said):
    with pytest.raises(UserError, match=f"(?s){said}"):
        train.train(config_for(root, **changes), tmp_path / "run")
