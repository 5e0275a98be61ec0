"""What --config takes: names of configs that ship, Python, YAML and JSON; and mistakes in them, with their lines."""

import json

import pytest
from support import ROOT

from ftjax import config as configs
from ftjax import config_changes, config_files, config_flag
from ftjax.errors import UserError

VALUES = {
    "model": {"source": "M"},
    "adapter.rank": 8,
    "adapter": {"rank_pattern": [["self_attn", 4]]},
    "data": {"train": "my rows.jsonl", "eval": [{"source": "hf:x", "split": "test"}], "checks": "on"},
    "optimizer.learning_rate": 1e-4,
    "epochs": 2,
}


def same(config):
    assert (config.model.source, config.adapter.rank, config.epochs) == ("M", 8, 2.0)
    assert (config.data.train, config.data.checks) == (("my rows.jsonl",), "on")
    assert config.data.eval == ({"source": "hf:x", "split": "test"},)
    assert config.optimizer.learning_rate == 1e-4
    configs.validate(config)


def test_json_and_yaml_hold_what_differs_from_the_defaults(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(VALUES))
    same(config_files.load(str(tmp_path / "c.json")))
    (tmp_path / "c.yaml").write_text(
        "model: {source: M}\nadapter.rank: 8\nadapter:\n  rank_pattern: [[self_attn, 4]]\nquantize:\n"
        "data:\n  train: my rows.jsonl\n  eval:\n    - source: hf:x\n      split: test\n  checks: on\n"
        "optimizer.learning_rate: 1e-4  # a string to YAML 1.1\nepochs: 2\n"
    )
    same(config_files.load(str(tmp_path / "c.yaml")))


def test_the_config_of_a_run_is_a_config(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(VALUES))
    config = config_files.load(str(tmp_path / "c.json"))
    configs.write(config, tmp_path / "config.json")
    again = config_flag.overridden(config_files.load(str(tmp_path / "config.json")), [("adapter.rank", "4")])
    assert config_changes.changes(config, again) == ["adapter.rank: 8 -> 4"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "c.yaml",
            "epochs: 2\nadapter:\n  r: 8\n",
            "c.yaml:3: config has no key 'adapter.r'; did you mean 'adapter.rank'?",
        ),
        ("c.yaml", "epochs: 2\nlr: 8\n", "c.yaml:2: config has no key 'lr'; did you mean 'optimizer.learning_rate'?"),
        ("c.yaml", "epochs: 2\nepochs: 3\n", "c.yaml:2: 'epochs' stands there twice"),
        ("c.yaml", "epochs: yes\n", "c.yaml:1: config.epochs='yes' is str; it must be float"),
        ("c.yaml", "steps: true\n", "c.yaml:1: config.steps=True is bool; it must be int"),
        ("c.yaml", "steps:\n", "config.steps=None"),
        ("c.yaml", "- a\n", "c.yaml:1: must hold keys and values"),
        ("c.yaml", "a: [\n", "c.yaml:2: not YAML"),
        ("c.yaml", "a: !!python/name:os.system\n", "c.yaml:1: not YAML"),
        (
            "c.json",
            '{"adapter": {"lora_r": 8}}',
            "c.json: config has no key 'adapter.lora_r'; did you mean 'adapter.rank'?",
        ),
        ("c.json", '{\n"epochs": }', "c.json:2: not JSON"),
        ("c.json", '{"epochs": 1, "epochs": 2}', "two members are called 'epochs'"),
        ("c.json", "[]", "must hold an object"),
        ("c.toml", "", "a config is a file in Python, YAML or JSON"),
        ("c.py", "def get_config():\n    return 1\n", "returns no ConfigDict"),
        ("c.py", "x = 1\n", "has no function get_config()"),
        ("c.py", "x = \n", "c.py:1: SyntaxError"),
        ("c.py", "import nothing_of_that_name\n", "c.py:1: ModuleNotFoundError"),
    ],
)
def test_mistakes_are_reported_with_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as refused:
        config_files.load(str(tmp_path / name))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data.train = 'rows.jsonl'", "train must be a tuple, also where it holds only one; write ('rows.jsonl',)"),
        ("data.eval = {'source': 'a'}", "eval must be a tuple, also where it holds only one; write ({...},)"),
        ("data.max_length = 'x'", "max_length must be of the type int, and 'x' is of str"),
        ("optimizer.lr = 1e-4", "config has no key 'lr'; did you mean 'optimizer.learning_rate'?"),
        ("optimzer.name = 'adamw'", "config has no key 'optimzer'; did you mean 'optimizer'"),
    ],
)
def test_mistakes_in_python_say_what_to_write(tmp_path, line, message):
    path = tmp_path / "config.py"
    path.write_text(
        "from ftjax import config as configs\n"
        f"def get_config():\n    config = configs.defaults()\n    config.{line}\n    return config\n"
    )
    with pytest.raises(UserError) as refused:
        config_files.load(str(path))
    assert str(refused.value).startswith(f"{path}:4: {message}")


def test_a_config_that_ships_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"chat", "dpo", "quickstart"} <= config_files.shipped().keys()
    assert config_files.load("dpo").objective.name == "dpo"
    assert config_files.find("chat")[0] == ROOT / "configs/chat.py"
    for name, message in {
        "cat": "did you mean 'chat'?",
        "configs/chat.py": "--config configs/chat.py: no such file; that name ships, so --config chat finds it",
        "mine.py": "or one of these, which ship with ftjax:",
    }.items():
        with pytest.raises(UserError) as refused:
            config_files.load(name)
        assert message in str(refused.value)
    assert "  dpo " in str(refused.value)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a directory, not a file; did you mean run/config\.json\?"):
        config_files.load("run")


def test_the_argument_of_a_config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from ftjax import config as configs\n"
        "def get_config(size='s'):\n    config = configs.defaults()\n    config.seed = len(size)\n    return config\n"
    )
    assert config_files.load(str(path)).seed == 1
    assert config_files.load(f"{path}:big:one").seed == 7
