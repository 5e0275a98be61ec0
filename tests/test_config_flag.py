"""The command line of a config: overrides as a shell hands them over, and unknown names that name ours."""

import shlex

import pytest
from absl import flags

from ftjax import cli, config_flag, foreign
from ftjax import config as configs
from ftjax.errors import UserError


def overridden(*arguments):
    rest, overrides = config_flag.take_overrides(["train", *arguments])
    assert rest == ["train"]
    return config_flag.overridden(configs.defaults(), overrides)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("rows.jsonl", ("rows.jsonl",)),
        ("my rows.jsonl", ("my rows.jsonl",)),
        ("rows copy.json", ("rows copy.json",)),
        ("a,b.jsonl", ("a,b.jsonl",)),
        ("data/*.jsonl", ("data/*.jsonl",)),
        ("(copy) rows.jsonl", ("(copy) rows.jsonl",)),
        ("2024", ("2024",)),
        ("1or2.jsonl", ("1or2.jsonl",)),
        ("'a.jsonl', 'b.jsonl'", ("a.jsonl", "b.jsonl")),
        ("1e3", ("1e3",)),
        ("None", ("None",)),
        ("x=1.jsonl", ("x=1.jsonl",)),
        ("", ()),
        ("'rows.jsonl'", ("rows.jsonl",)),
        ("('a.jsonl', 'b.jsonl')", ("a.jsonl", "b.jsonl")),
        ("['a.jsonl']", ("a.jsonl",)),
        ("{'source': 'a.jsonl', 'limit': 3}", ({"source": "a.jsonl", "limit": 3},)),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "data.eval", "adapter.modules_to_save"])
def test_a_plain_path_is_one_entry_of_a_tuple_and_a_literal_is_itself(key, text, entries):
    section, leaf = key.split(".")
    assert overridden(f"--config.{key}={text}")[section][leaf] == entries
    assert overridden(f"--config.{key}", text)[section][leaf] == entries


def test_a_tuple_that_is_given_twice_has_both_and_any_other_key_the_last():
    config = overridden(
        "--config.data.train=a.jsonl", "--config.steps=1", "--config.data.train=b c.jsonl", "--config.steps=2"
    )
    assert (config.data.train, config.steps) == (("a.jsonl", "b c.jsonl"), 2)


def test_files_with_a_comma_between_are_several_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="no file of that name, but files a and b; give the flag once for each"):
        overridden("--config.data.train=a,b")
    (tmp_path / "a,b").touch()
    assert overridden("--config.data.train=a,b").data.train == ("a,b",)


def test_values_are_read_by_the_type_of_their_key():
    config = overridden(
        *("--config.model.source=1", "--config.adapter.source", "True", "--config.adapter.targets=('q_proj',)"),
        *("--config.optimizer.learning_rate=1e-4", "--config.epochs=2", "--config.mesh.fsdp", "-1", "--config.seed=7"),
        *("--config.adapter.rslora", "--noconfig.data.packing", "--config.evaluate.before=False"),
        "--config.adapter.rank_pattern=(('self_attn', 8),)",
    )
    assert (config.model.source, config.adapter.source, config.adapter.targets) == ("1", "True", "('q_proj',)")
    assert (config.optimizer.learning_rate, config.epochs, config.mesh.fsdp, config.seed) == (1e-4, 2.0, -1, 7)
    assert (config.adapter.rslora, config.data.packing, config.evaluate.before) == (True, False, False)
    assert config.adapter.rank_pattern == (("self_attn", 8),)
    config.model.source, config.adapter.rank_pattern, config.data.train = "m", (), ("a",)
    configs.validate(config)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.steps=1.5", "--config.steps=1.5: must be a whole number"),
        ("--config.data.packing=maybe", "must be true or false"),
        ("--config.epochs=many", "must be a number"),
        ("--config.data.train=(rows.jsonl,)", "no Python literal"),
        ("--config.data=rows.jsonl", "--config.data is a section; set its keys: data.train, data.eval"),
        ("--config.lr=1e-4", "did you mean 'optimizer.learning_rate'?"),
        ("--config.optimizer.lr=1e-4", "did you mean 'optimizer.learning_rate'?"),
        ("--config.rank=8", "did you mean 'adapter.rank'?"),
        ("--config.optimzer.name=adamw", "did you mean 'optimizer.name'"),
        ("--config.report_to=wandb", "TensorBoard files are always written"),
    ],
)
def test_what_is_refused(argument, message):
    with pytest.raises(UserError) as refused:
        overridden(argument)
    assert message in str(refused.value)


def test_the_rest_is_left_to_the_other_flags():
    arguments = [
        "train",
        "--config",
        "a.b",
        "--workdir=config.x",
        "--config.steps",
        "--verbose",
        "--",
        "--config.steps=3",
    ]
    rest, overrides = config_flag.take_overrides(arguments)
    assert rest == ["train", "--config", "a.b", "--workdir=config.x", "--verbose", "--", "--config.steps=3"]
    assert overrides == [("steps", "true")]


def test_every_name_of_another_trainer_names_a_key_of_ours_or_says_why_there_is_none():
    for names in (foreign.TRL, foreign.AXOLOTL, foreign.SHORT):
        for name, ours in names.items():
            assert ours.key in configs.KEYS if ours.key else ours.note, name


NAMES = (
    "lr learning_rate max_grad_norm warmup_steps warmup_ratio per_device_train_batch_size save_total_limit r lora_r "
    "gradient_accumulation_steps gradient_checkpointing save_steps logging_steps eval_steps lora_alpha lora_dropout "
    "target_modules early_stopping report_to num_train_epochs num_epochs micro_batch_size sequence_len max_seq_length "
    "max_steps load_in_4bit bf16"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_names_that_people_bring_along_find_ours(name):
    message = configs.unknown_key(name)
    assert "did you mean" in message or foreign.find(name).note in message
    keys = [key for key in configs.KEYS if repr(key) in message]
    assert keys or not foreign.find(name).key


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--epochs=3", "there is no flag --epochs; did you mean --config.epochs=3?"),
        ("--rank=3", "there is no flag --rank; did you mean --config.adapter.rank=3?"),
        ("--num_train_epochs=3", "did you mean --config.epochs=3?"),
        ("--per_device_train_batch_size=3", "did you mean --config.data.batch_size? (it counts"),
        ("--report_to=wandb", "did you mean --config.trackers? (wandb, mlflow or trackio;"),
        ("--early_stopping_patience=3", "did you mean --config.evaluate.patience=3?"),
        ("--notthere=3", "notthere"),
    ],
)
def test_a_flag_that_is_a_key_names_the_key(argument, message, monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    assert cli.flags is flags
    with pytest.raises(UserError) as refused:
        config_flag.parse(["train", argument])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("optimizer.learning_rate", 4e-05),
        ("adapter.rank", 16),
        ("adapter.trainable", ".*"),
        ("data.chat_template", "my run/chat template.jinja"),
        ("evaluate.before", False),
        ("adapter.modules_to_save", ()),
        ("adapter.rank_pattern", (("q_proj", 4), ("it's", 8))),
    ],
)
def test_what_a_message_says_to_type_is_read_as_meant(key, given):
    config = overridden(*shlex.split(config_flag.spelled(key, given)))
    assert configs.flat(config)[key] == given
