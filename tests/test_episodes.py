"""Episodes of several turns: that what was sampled stands in the batch as it was, and the rest teaches nothing."""

import json

import jax
import numpy as np
import pytest
from support.chat_templates import CHATML
from support.games import Echo
from support.rollouts import config_for, source_of
from support.runs import write_model, write_rows

from ftjax import assemble, environments, episodes, rollouts, train, tree
from ftjax.environments import Turn
from ftjax.errors import UserError
from ftjax.method import method_of
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import token_logps
from ftjax.training import digest, metrics

ENDS = tuple(range(20, 400, 4))  # of 400 tokens, so that most turns of 8 end by themselves
GAME = {
    "rollouts.environment": "support.games:Echo",
    "rollouts.turns": 3,
    "objective.rewards": (),
    "data.max_length": 160,
    "data.row_length": 0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("episodes")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 40)
    return root


def recorded(monkeypatch):
    """[(prompt, completion)] of every turn that the engine writes, in the order in which it was asked."""
    turns, generate = [], episodes.generate

    def watched(model, policy, prompts, *given, **named):
        made = generate(model, policy, prompts, *given, **named)
        turns.extend(zip(map(np.array, prompts), made, named["numbers"], strict=True))
        return made

    monkeypatch.setattr(episodes, "generate", watched)
    return turns


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_sampled_tokens_stand_as_they_were_drawn_and_nothing_else_counts(root, tmp_path, monkeypatch, name):
    turns = recorded(monkeypatch)
    changes = GAME | {"objective.name": name, "rollouts.temperature": 0.7}
    source, start, program = source_of(config_for(root, **changes), tmp_path, ENDS)
    with jax.set_mesh(program.mesh):
        made = source.batch(1, start.state)
        scores = [one.reward for one in source._write(1, 0, start.state).completions]
    del turns[len(turns) // 2 :]
    arrays, tokenizer = made.arrays, source._base.tokenizer
    sampled = arrays["weights"] > 0
    assert len({number for *_, number in turns}) == len(turns)  # each has randomness of its own
    of_row = [[one for one in turns if one[2] // 3 == 6 + row] for row in range(6)]
    gaps, merged = 0, 0
    for row, its in enumerate(of_row):
        whole = np.append(arrays["tokens"][row], 0)
        whole[1:][sampled[row]] = arrays["targets"][row][sampled[row]]
        end = 0
        for prompt, completion, _ in its:
            ids = [*completion.tokens, *([completion.stop_token] if completion.stop_token is not None else [])]
            np.testing.assert_array_equal(whole[: len(prompt)], prompt)
            assert not sampled[row][end : len(prompt) - 1].any()
            gaps += end > 0
            end = len(prompt) - 1 + len(ids)
            np.testing.assert_array_equal(arrays["targets"][row][len(prompt) - 1 : end], ids)
            assert sampled[row][len(prompt) - 1 : end].all()
            np.testing.assert_array_equal(
                arrays["sampled_logps"][row][len(prompt) - 1 : end], completion.tempered_logps
            )
            merged += tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids
        assert not sampled[row][end:].any()
    assert gaps > 3
    assert merged > 3  # tokenized again these would be other tokens
    for its in (name for name in arrays if name not in ("tokens", "targets", "positions", "segment_ids")):
        assert not arrays[its][~sampled].any(), its
    assert (arrays["advantages"][sampled] != 0).any()
    assert made.metrics["episodes/turns_mean"] == len(turns) / 6
    between = sum(prompt.size for *_, (prompt, *_) in of_row) - sum(its[0][0].size for its in of_row)
    between -= sum(len(completion.logps) for its in of_row for _, completion, _ in its[:-1])
    assert made.metrics["episodes/environment_tokens_mean"] == between / 6
    assert made.metrics["completions/mean_length"] == sampled.sum() / 6
    if name == "ppo":  # without a KL penalty and a critic that says 0, lambda discounts what the last token gets
        for row, score in enumerate(scores):
            count = sampled[row].sum()
            wanted = score * 0.95 ** np.arange(count - 1, -1, -1, dtype=np.float64)
            np.testing.assert_allclose(arrays["returns"][row][sampled[row]], wanted, rtol=1e-5, atol=1e-7)
        assert any(scores)

    # The trainer agrees with the sampler at every sampled token: the ratio is 1 before anything is learned.
    unembed = make_unembed(program.model)
    variables = tree.combine(start.state.trainable, start.frozen)
    ours = token_logps(program.model, lambda *given: unembed(*given) / 0.7, variables, arrays, None)
    assert np.abs(np.asarray(ours) - arrays["sampled_logps"])[sampled].max() < 1e-4


def test_the_text_of_a_row_is_the_templates(root, tmp_path, monkeypatch):
    """Where turns end as the template ends them, a row reads as the conversation that it records."""
    tokenizer = assemble.open_base(config_for(root).model).tokenizer
    source, start, program = source_of(config_for(root, **GAME), tmp_path, ENDS)
    with jax.set_mesh(program.mesh):
        written = source._write(0, 0, start.state)
    asked = source._loader.examples.raw(int(written.chosen[0]))["messages"][:1]
    end, several = tokenizer.convert_tokens_to_ids("<|im_end|>"), 0
    for prompt, one in zip(written.prompts[:3], written.completions[:3], strict=True):
        ids = np.concatenate([prompt, one.tokens])
        last = np.append(one.sampled[1:] != one.sampled[:-1], True) & one.sampled  # ends of turns
        ids[len(prompt) :][last & np.isin(one.tokens, ENDS)] = end
        conversation = [*asked, *one.said]
        text = tokenizer.apply_chat_template(conversation, tokenize=False, chat_template=CHATML)
        assert text.startswith(tokenizer.decode(ids).removesuffix("<|im_end|>"))
        several += one.turns > 1
        games = [turn["content"] for turn in one.said if turn["content"].startswith("the game")]
        assert games == [written.completions[0].said[0]["content"]]  # the same for all completions of a prompt
    assert several
    assert written.completions[3].said[0] != written.completions[0].said[0]


def test_an_episode_ends_where_its_row_is_full_and_was_cut_then(root, tmp_path):
    changes = GAME | {"data.max_length": 76, "objective.mask_truncated": True}
    source, start, program = source_of(config_for(root, **changes), tmp_path, ENDS)
    with jax.set_mesh(program.mesh):
        written, made = source._write(0, 0, start.state), source.batch(0, start.state)
    lengths = [len(prompt) + len(one.tokens) for prompt, one in zip(written.prompts, written.completions, strict=True)]
    assert max(lengths) <= 76
    cut = np.array([not one.stopped for one in written.completions])
    assert cut.any()
    assert not (made.arrays["weights"].any(axis=1) & cut).any()
    assert made.metrics["completions/clipped_ratio"] == cut.mean()


def test_rewards_are_of_the_environment_and_of_the_last_turn_in_its_conversation(root, tmp_path):
    named = (("environment", 2.0), "support.rewards:of_conversation")
    source, start, program = source_of(config_for(root, **GAME | {"objective.rewards": named}), tmp_path, ENDS)
    with jax.set_mesh(program.mesh):
        made = source.batch(0, start.state)
    (line,) = (tmp_path / rollouts.FILE).read_text().splitlines()
    for one in json.loads(line)["completions"]:
        turns = [turn["content"] for turn in one["turns"] if turn["role"] == "assistant"]
        assert turns[-1] == one["text"]
        shares = [turn.count("e") / max(len(turn), 1) for turn in turns]
        assert one["rewards"]["environment"] == pytest.approx(sum(shares))
        # The row's question and its answer, and between them all of the episode but the last turn.
        assert one["rewards"]["support.rewards:of_conversation"] == 2 + len(one["turns"]) - 1
    means = [made.metrics[f"rewards/{name}/mean"] for name in ("environment", "support.rewards:of_conversation")]
    assert made.metrics["reward"] == pytest.approx(2 * means[0] + means[1])


def test_one_turn_is_what_it_was_without_an_environment(root, tmp_path):
    plain = source_of(config_for(root), tmp_path)
    game = source_of(config_for(root, **{"rollouts.environment": "support.games:Short"}), tmp_path / "game")
    (tmp_path / "game").mkdir()
    made = []
    for source, start, program in (plain, game):
        with jax.set_mesh(program.mesh):
            made.append(source.batch(2, start.state))
    for array in ("tokens", "targets", "weights", "sampled_logps"):
        np.testing.assert_array_equal(made[0].arrays[array], made[1].arrays[array])


@pytest.mark.parametrize("name", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_run_with_an_environment_resumes_exactly(root, tmp_path, monkeypatch, name):
    monkeypatch.setattr(assemble.tokenizers, "end_tokens", lambda *_: ENDS)
    config = config_for(root, **GAME, **{"objective.name": name, "steps": 4, "rollouts.iterations": 2})
    assert train.train(config, tmp_path / "run") == 0
    records, last = metrics.read(tmp_path / "run/metrics.jsonl"), tmp_path / "run/checkpoints/4"
    assert records[0]["episodes/turns_mean"] > 1
    assert records[0]["sampling/logp_difference_mean"] < 1e-4 < records[1]["sampling/logp_difference_mean"]
    end, written = digest.read(last)["leaves"], (tmp_path / "run" / rollouts.FILE).read_text()
    config = config_for(
        root,
        **GAME,
        **{"objective.name": name, "steps": 4, "rollouts.iterations": 2, "checkpoint.resume_step": 2},
    )
    assert train.train(config, tmp_path / "run") == 0
    assert digest.read(last)["leaves"] == end
    assert (tmp_path / "run" / rollouts.FILE).read_text() == written


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rollouts.environment": "support.games:Raises"},
            r"rows.jsonl:\d+: turn 2 of the environment: LookupError: the board is gone; it was told",
        ),
        ({"rollouts.environment": "support.games:NoNumber"}, r"turn 1 .*was told.*step: the reward is nan"),
        ({"rollouts.environment": "support.games:Leaves"}, r"turn 1 .*SystemExit: 0; it was told"),
        ({"rollouts.environment": "support.games:Speaks"}, r"turn 1 .*step: has a message of the assistant"),
        ({"rollouts.environment": "support.games:Silent"}, "says nothing and is not done"),
        ({"rollouts.environment": "support.games:Nothing"}, r"step returned None; return Turn\(messages"),
        ({"data.max_length": 50}, r"with what reset added the prompt has \d+ tokens, which leaves no room"),
        ({"rollouts.environment": "support.leaving:Echo"}, "importing support.leaving raised SystemExit: 0"),
        ({"rollouts.environment": "support.games:Ecco"}, "support.games has no function 'Ecco'"),
        ({"rollouts.environment": "support.games:add", "rollouts.turns": 2}, r"add\(\) missing 2 required"),
        ({"rollouts.environment": ""}, "rollouts.turns=3 does nothing with neither an environment nor tools"),
        ({"rollouts.environment": "", "rollouts.turns": 1, "objective.rewards": ("environment",)}, "which names none"),
        ({"data.row_length": 64}, r"row_length=64: episodes of config.rollouts.turns=3 may have 160"),
        ({"rollouts.tools": ("support.games:add",)}, "leaves out the tool|form that is not read"),
    ],
)
def test_mistakes_are_named(root, tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr(assemble.tokenizers, "end_tokens", lambda *_: ENDS)
    with pytest.raises(UserError, match=f"(?s){said}"):
        train.train(config_for(root, **GAME | changes), tmp_path / "run")


@pytest.mark.parametrize("name", ["online_dpo", "rejection"])
def test_others_have_one_turn(root, name):
    changes = {"objective.name": name, "rollouts.environment": "support.games:Echo"}
    with pytest.raises(UserError, match=r"rollouts.environment: .* does not use it \(of grpo, rloo, ppo\)"):
        method_of(config_for(root, **changes))


def test_a_turn_is_a_plain_tuple():
    assert Echo().reset({}, 5) == [{"role": "user", "content": "the game is 5"}]
    assert Turn([], True) == ([], True, 0.0)


@pytest.mark.parametrize("reward", [np.float32(0.5), "0.5", np.array(0.5)])
def test_a_reward_is_a_plain_number(reward):
    turn = environments.checked(Turn([], True, reward), "step")
    assert type(turn.reward) is float
    assert turn.reward == 0.5


@pytest.mark.parametrize("reward", [10**400, None, float("inf")])
def test_a_reward_that_is_no_number_is_refused(reward):
    with pytest.raises(UserError, match="must be a finite number"):
        environments.checked(Turn([], True, reward), "step")


def test_an_episode_sees_nothing_that_another_changed(root, tmp_path):
    source, start, program = source_of(
        config_for(root, **GAME | {"rollouts.environment": "support.games:Changes"}), tmp_path, ENDS
    )
    with jax.set_mesh(program.mesh):
        written = source._write(0, 0, start.state)
    assert all(type(one.reward) is float for one in written.completions)
