"""Stages that follow from each other: the commands, what is done again, and a whole chain of small runs."""

import json
import signal

import pytest
import yaml
from support.pairs import write_pairs
from support.runs import command, finish, write_model, write_rows

from ftjax import pipeline
from ftjax.errors import UserError
from ftjax.relay import Relay

STAGES = {
    "sft": {"config": "chat", "model": {"source": "M"}, "data.train": "rows.jsonl", "steps": 16},
    "grpo": {
        "config": "grpo",
        "model.source": "M",
        "adapter.source": "{sft.peft}",
        "data.train": ["rows.jsonl", {"source": "{sft}/more.jsonl", "weight": 0.5}],
        "objective.rewards": ["reward:{sft}", "f1"],
        "evaluate.before": False,
    },
    "comparison": {"evaluate": "{grpo}", "adapter": ["sft={sft.peft}", "other=O"], "limit": 20},
}


def planned(tmp_path, stages=STAGES):
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(stages, sort_keys=False))
    return pipeline.planned(pipeline.read(path), tmp_path / "w", path)


def test_stages_become_commands_and_an_export_comes_before_what_needs_it_once(tmp_path):
    where = tmp_path / "w"
    tasks = planned(tmp_path)
    assert [task.name for task in tasks] == ["sft", "sft.peft", "grpo", "comparison"]
    sft, export, grpo, comparison = (" ".join(task.arguments[1:]) for task in tasks)
    assert sft == (
        "ftjax.train --config=chat --config.model.source=M --config.data.train=rows.jsonl --config.steps=16 "
        f"--workdir={where}/sft"
    )
    assert export == f"ftjax.export --workdir={where}/sft --format=peft --out={where}/sft.peft"
    assert f"--config.adapter.source={where}/sft.peft " in grpo
    assert f"--config.objective.rewards=('reward:{where}/sft', 'f1') " in grpo
    assert f"('rows.jsonl', {{'source': '{where}/sft/more.jsonl', 'weight': 0.5}})" in grpo
    assert "--config.evaluate.before=false" in grpo
    assert comparison == (
        f"ftjax.evaluate --workdir={where}/grpo --adapter=sft={where}/sft.peft --adapter=other=O --limit=20"
    )


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"config": "chat", "adapter.source": "{sftt.peft}"}, r"grpo: \{sftt\.peft\}: no training .* mean 'sft'"),
        ({"config": "chat", "adapter.source": "{grpo}"}, "no training of that name comes before"),
        ({"config": "chat", "adapter.source": "{sft.gguf}"}, "'gguf' is none of peft, merged, hf"),
        ({"config": "chat", "stepps": 2}, "grpo: --config.stepps: .*did you mean"),
        ({"config": "quickstart", "data.max_length": 0}, "grpo: config.data.max_length"),
        ({"config": "chatt"}, "no config of that name ships"),
        ({"steps": 2}, "grpo needs `config`"),
        ({"config": "chat", "evaluate": "{sft}"}, "and not both"),
        (3, "must be a mapping from the names of stages"),
    ],
)
def test_a_mistake_in_any_stage_is_told_before_the_first(tmp_path, stage, said):
    with pytest.raises(UserError, match=said):
        planned(tmp_path, STAGES | {"grpo": stage})


class Started:
    """Stands for processes: a line of `statuses` for each; what was started is in `names`."""

    def __init__(self, *statuses):
        self._statuses, self.names = list(statuses), []

    def __call__(self, words, process_group):
        self.names.append(next(word.rpartition("/")[2] for word in words if word.startswith(("--workdir", "--out"))))
        return self

    def wait(self):
        return self._statuses.pop(0)

    def run(self, tasks, where):
        return pipeline.run_all(tasks, where, Relay(self))


def test_it_goes_on_where_it_stopped_and_makes_again_what_follows_from_a_change(tmp_path):
    where, tasks = tmp_path / "w", planned(tmp_path)
    assert Started(0, 75).run(tasks, where) == 75
    (where / "sft.peft").mkdir()  # by an export that was killed before it could be noted
    failing = Started(0, 2)
    assert (failing.run(tasks, where), failing.names) == (2, ["sft", "grpo"])
    assert not (where / "sft.peft").exists()
    rest = Started(0, 0)
    assert (rest.run(tasks, where), rest.names) == (0, ["grpo", "grpo"])
    assert Started().run(tasks, where) == 0
    longer = planned(tmp_path, STAGES | {"sft": STAGES["sft"] | {"steps": 20}})
    again = Started(0, 0, 0, 0)
    assert (again.run(longer, where), again.names) == (0, ["sft", "sft", "grpo", "grpo"])
    (where / pipeline.RECORD).write_text("{")
    with pytest.raises(UserError, match=r"pipeline\.json: damaged"):
        Started().run(tasks, where)


def test_a_stage_that_is_stopped_by_a_signal_ends_the_pipeline(tmp_path):
    class Stopped(Started):
        def wait(self):
            signal.raise_signal(signal.SIGTERM)
            return 0  # it came in the last moment

        def send_signal(self, number):
            self.names.append(number)

    stopped = Stopped()
    assert (stopped.run(planned(tmp_path), tmp_path / "w"), stopped.names) == (75, ["sft", signal.SIGTERM])


@pytest.mark.slow  # eight processes
def test_supervised_then_a_reward_model_then_grpo_then_a_comparison(tmp_path):
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 40)
    write_rows(tmp_path / "held.jsonl", 12, seed=1)
    write_pairs(tmp_path / "pairs.jsonl", 24)
    common = {"model": {"source": str(tmp_path / "model"), "dtype": "float32", "param_dtype": "float32"}}
    common |= {"data.max_length": 64, "data.checks": "off", "mesh.fsdp": 1, "steps": 2, "evaluate.general": []}
    held = {"source": str(tmp_path / "held.jsonl"), "score": "f1"}
    rows = {"data.train": [str(tmp_path / "rows.jsonl")], "data.eval": held, "evaluate.max_new_tokens": 4}
    after = {"adapter.source": "{sft.peft}"}
    stages = {
        "sft": {"config": "chat", **common, **rows, "data.batch_size": 4},
        "reward": {"config": "chat", **common, **after, "objective.name": "reward", "data.batch_size": 4}
        | {"data.train": [str(tmp_path / "pairs.jsonl")]},
        "grpo": {"config": "grpo", **common, **rows, **after, "objective.rewards": ["reward:{reward}"]}
        | {"data.batch_size": 8, "rollouts.samples": 4, "rollouts.max_new_tokens": 8},
        "comparison": {"evaluate": "{grpo}", "only": "base,tuned,sft", "adapter": ["sft={sft.peft}"], "limit": 10},
    }
    (tmp_path / "rl.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    words = ("ftjax.pipeline", str(tmp_path / "rl.yaml"), "--workdir", str(tmp_path / "w"))
    assert len(finish(command(*words, "--dry_run")).splitlines()) == 5
    said = finish(command(*words))
    table = (tmp_path / "w" / pipeline.TABLE).read_text()
    assert table in said
    assert [line.split(" | ")[0] for line in table.splitlines()[2:7]] == [
        *("| sft", "| sft.peft", "| reward", "| grpo", "| comparison")
    ]
    assert "eval_held/f1" in table
    assert "not finished" not in table
    measured = json.loads((tmp_path / "w/grpo/evaluation.json").read_text())
    assert {one["name"] for one in measured["sets"][0]["contestants"]} == {"base", "tuned", "sft"}
    assert (tmp_path / "w" / pipeline.PAGE).stat().st_size > 10_000
    assert " of 5: " in said
    assert " of 5: " not in finish(command(*words)), "nothing is left to do"
