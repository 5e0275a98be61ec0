"""The map, the table of methods and the recipes of CONTRIBUTING.md are those of the code."""

import re
import types

import jax
import numpy as np
import pytest
from support import ROOT
from support.pairs import config_of
from support.runs import write_model, write_rows

from ftjax import method, train, tree
from ftjax.data.read.sources import read_sources
from ftjax.method import METHODS, Method
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import token_logps
from ftjax.objectives.loss import Loss
from ftjax.objectives.sft import make_sft
from ftjax.sources import SOURCES
from ftjax.tasks import registry
from ftjax.training import metrics
from ftjax.training.source import Batch

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = dict(re.findall(r"```python (\w+)\n(.*?)```", TEXT, re.DOTALL))


def table(heading):
    rows = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0].split("\n| --- ")[1].split("\n")[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]


def test_the_map_names_every_module_at_the_root_and_every_package_and_nothing_else():
    first_column = " ".join(row[0] for row in table("Where things are"))
    named = {name.removesuffix(".py").split("/")[0] for name in re.findall(r"`([\w/.]+)`", first_column)}
    there = {path.stem for path in (ROOT / "ftjax").iterdir() if path.suffix in ("", ".py") and path.stem[0] != "_"}
    # `read/` and the other wings of `data/` stand beside it.
    assert named - {"format", "read", "tokens", "batch", "audit"} == there | named & {"format"} - {"format"}
    wings = {wing for package in ("data", "weights") for wing in subfolders(package)}
    assert {wing for wing in wings if wing not in first_column} == set()
    for path in re.findall(r"`((?:\w+/)+\w+\.py)`", TEXT):
        assert (ROOT / path).exists() or (ROOT / "ftjax" / path).exists(), path


def subfolders(package):
    return [path.name for path in (ROOT / "ftjax" / package).iterdir() if path.is_dir() and path.name[0] != "_"]


def test_the_table_of_methods_is_the_table_of_the_code():
    rows = {}
    for name, kind, settings, reference, file in table("The methods"):
        rows[name.strip("`")] = (kind, tuple(re.findall(r"`(\w+)`", settings)), reference == "yes")
        assert (ROOT / "ftjax" / file.strip("`")).exists()
    assert rows == {name: (one.rows, one.settings, one.reference) for name, one in METHODS.items()}


def test_the_four_recipes_are_there():
    assert RECIPES.keys() == {"task", "objective", "source"}
    assert "docs/adding-a-family.md" in TEXT  # held to the code by test_adding_a_family.py


def test_the_task_of_the_recipe_gives_rows_and_scores_like_any_other(monkeypatch):
    task = types.ModuleType("sums")
    exec(RECIPES["task"], task.__dict__)
    monkeypatch.setitem(registry._TASKS, "sums", task)
    assert len(read_sources([{"source": "task:sums"}])) == 19 * 19
    example = registry.examples(registry.get("sums"), "test")[0]
    assert task.score(" 40\n", example) == 1.0
    assert task.score("41", example) == 0.0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 40)
    return root


def trained(root, workdir, name):
    changes = {"data.train": (str(root / "rows.jsonl"),), "data.checks": "off", "log_every": 1, "objective.name": name}
    assert train.train(config_of(root, **changes), workdir) == 0
    return metrics.read(workdir / "metrics.jsonl")


def test_the_objective_of_the_recipe_trains(root, tmp_path, monkeypatch):
    methods = dict(METHODS)
    names = {"make_sft": make_sft, "make_unembed": make_unembed, "token_logps": token_logps, "Loss": Loss}
    exec(RECIPES["objective"], names | {"METHODS": methods, "Method": Method})
    monkeypatch.setattr(method, "METHODS", methods)
    records = trained(root, tmp_path / "run", "emphatic")
    assert records[-1]["nll"] < records[0]["nll"]
    assert records[0]["loss"] == pytest.approx(1.1 * records[0]["nll"], rel=1e-5)


def test_the_source_of_the_recipe_feeds_the_loop(root, tmp_path, monkeypatch):
    methods = dict(METHODS)
    names = {"jax": jax, "np": np, "tree": tree, "Batch": Batch}
    sources = dict(SOURCES)
    exec(RECIPES["source"], names | {"METHODS": methods, "SOURCES": sources})
    monkeypatch.setattr(train, "SOURCES", sources)
    monkeypatch.setattr(method, "METHODS", methods)
    records = trained(root, tmp_path / "run", "surest")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all("mean_target" in record for record in records)
