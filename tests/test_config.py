"""Entries of data.train and data.eval: the options they have, and what is refused in them."""

import json

import pytest

from ftjax import config as configs
from ftjax import config_changes
from ftjax.errors import UserError


def test_a_string_is_a_source_and_a_mapping_may_have_every_option():
    assert configs.source_entry("a.jsonl", "data.train") == {"source": "a.jsonl"}
    entry = {"source": "a.jsonl", "format": "text", "split": "train[:90%]", "weight": 2, "limit": 10}
    assert configs.source_entry(entry, "data.train") == entry
    assert configs.source_entry({"source": "a", "weight": 0.5}, "data.train")["weight"] == 0.5


BAD = [
    (3, "3 is neither a string nor a mapping with a 'source'"),
    ({"split": "train"}, "neither a string nor a mapping with a 'source'"),
    ({"source": 3}, "neither a string nor a mapping with a 'source'"),
    ({"source": "a", "format": None}, "'format' of entry .* must be a string"),
    ({"source": "a", "split": 3}, "'split' of entry .* must be a string"),
    *(({"source": "a", "weight": bad}, "'weight' of entry .* must be a positive, finite number") for bad in
      (0, -1, float("nan"), float("inf"), "2", True, None)),
    *(({"source": "a", "limit": bad}, "'limit' of entry .* must be a positive whole number") for bad in
      (0, -1, 1.0, "2", True, None)),
    ({"source": "a", "wieght": 1}, "has no option 'wieght'; did you mean 'weight'"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "message"), BAD)
def test_wrong_entries_are_refused_with_the_key(entry, message):
    with pytest.raises(UserError, match=f"config.data.train: .*{message}"):
        configs.source_entry(entry, "data.train")


@pytest.mark.parametrize("source", ["tfds:name", "hf:name"])
def test_an_entry_of_eval_names_its_split_where_there_are_several(source):
    config = configs.defaults()
    config.model.source, config.data.train, config.data.eval = "m", ("a.jsonl",), (source,)
    with pytest.raises(UserError, match=f"config.data.eval: say which split of {source}"):
        configs.validate(config)
    config.data.eval = ({"source": source, "split": "test", "limit": 100},)
    configs.validate(config)


def test_a_run_that_is_older_than_a_key_has_its_default(tmp_path):
    """A finished run stays usable; a key that is unknown or mistyped is refused with the file's name."""
    config = configs.defaults()
    config.model.source, config.data.train = "m", ("rows.jsonl",)
    path = tmp_path / "config.json"
    configs.write(config, path)
    stored = json.loads(path.read_text())
    del stored["objective"]["beta"], stored["seed"]
    path.write_text(json.dumps(stored))
    assert config_changes.changes(configs.read(path), config) == []
    path.write_text(json.dumps(stored | {"sede": 1}))
    with pytest.raises(UserError, match=r"config.json: config has no key 'sede'; did you mean 'seed'"):
        configs.read(path)
