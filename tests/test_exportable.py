"""What a format cannot hold is refused before a run begins."""

import dataclasses
import runpy
import types

import numpy as np
import pytest
from support.runs import write_run
from support.tiny import one_device

from ftjax import assemble, describe, exportable
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.method import METHODS
from ftjax.train import train


def test_what_a_format_cannot_hold_is_said_before_the_first_step(tmp_path, monkeypatch):
    write_run(tmp_path)
    config = runpy.run_path(str(tmp_path / "run.py"))["get_config"]()
    config.adapter.kind, config.adapter.rank, config.export_formats = "none", 16, ("hf", "merged")
    with pytest.raises(UserError, match=r"export_formats: 'merged' would be refused at the end: .* no adapter"):
        train(config, tmp_path / "whole")
    config = runpy.run_path(str(tmp_path / "run.py"))["get_config"]()
    config.export_formats = ("peft", "gguf")
    refused = UserError("a GGUF file cannot hold this tokenizer")
    monkeypatch.setattr("ftjax.exportable.to_metadata", lambda *_: (_ for _ in ()).throw(refused))
    with pytest.raises(UserError, match=r"'gguf' would be refused at the end: a GGUF file cannot hold this tokenizer"):
        train(config, tmp_path / "adapter")
    for name in ("whole", "adapter"):
        assert not (tmp_path / name / "config.json").exists()  # nothing was begun
    config.export_formats = ("onnx",)
    with pytest.raises(UserError, match=r"export_formats=.*some of peft, merged, hf, gguf"):
        train(config, tmp_path / "onnx")


def test_a_run_is_told_to_be_taken_out_in_a_format_that_holds_it(tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    config = runpy.run_path(str(tmp_path / "run.py"))["get_config"]()
    base = assemble.open_base(config.model)

    def told(kind, **heads):
        config.adapter.kind = kind
        variables, _ = assemble.abstract_variables(config, base.model, one_device())
        return exportable.smallest(config, base, variables | heads)

    assert (told("lora"), told("dora"), told("none")) == ("peft", "peft", "hf")
    assert told("none", heads={"value": {"kernel": 0}}) is None
    standing = best.Standing(None, "min", {}, [4])
    method = METHODS["sft"]
    rows = {format: describe.result(tmp_path, standing, method, format) for format in ("peft", "hf", None)}
    assert rows["peft"]["take it out"].endswith(" --format peft --out ADAPTER")
    assert rows["hf"]["take it out"].endswith(" --format hf --out MODEL")
    assert "take it out" not in rows[None]


def test_a_reward_model_on_a_multimodal_base_is_an_adapter_where_transformers_has_a_class_for_it(tmp_path):
    write_run(tmp_path)
    config = runpy.run_path(str(tmp_path / "run.py"))["get_config"]()
    base = assemble.open_base(config.model)
    heads = {"score": {"kernel": np.zeros((32, 1), np.float32)}}
    config.objective.name = "reward"

    def told(model_type, text):
        spec = dataclasses.replace(base.model.spec, family=text)
        reader = types.SimpleNamespace(config={"model_type": model_type})
        inside = base._replace(model=base.model.clone(spec=spec), reader=reader)
        variables = {"params": {}, "lora": {}, "heads": heads}
        return exportable.smallest(config, inside, variables)

    assert told("llama", "llama") == told("gemma3", "gemma3_text") == told("qwen3_5", "qwen3_5_text") == "peft"
    assert told("mistral3", "mistral") == told("qwen2_5_vl", "qwen2") == "hf"
    assert told("gemma4", "gemma4_text") is None
