"""What only looks at a model downloads none of its weights from the Hub."""

import huggingface_hub
import pytest
from support.runs import write_model, write_rows

from ftjax import config as configs
from ftjax import curate, inspect_data, plan

OPTIONS = {"rows": 1, "source": None, "max_rows": 0, "tokens_per_second": 0.0}
OPTIONS |= dict.fromkeys(("workdir", "html", "json"))


def inspect(rows):
    config = configs.defaults()
    config.update_from_flattened_dict(
        {"model.source": "org/name", "model.revision": "v1", "data.train": (str(rows),), "data.batch_size": 1}
    )
    inspect_data.inspect(config, OPTIONS)


def count_tokens(rows):
    command = ["filter", str(rows), "--max_tokens", "90", "--tokenizer", "org/name"]
    assert curate.main([*command, "--out", str(rows.with_name("out.jsonl"))]) == 0


LOOKS = {
    "inspect_data": (inspect, "v1"),
    "plan": (lambda rows: plan.model_spec("org/name", "v1"), "v1"),
    "curate": (count_tokens, None),
}


@pytest.mark.parametrize("command", LOOKS)
def test_no_weights_are_downloaded(tmp_path, monkeypatch, command):
    write_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    asked = []

    def download(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, {pattern for pattern in allow_patterns if "safetensors" in pattern}))
        return str(tmp_path / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    look, revision = LOOKS[command]
    look(write_rows(tmp_path / "rows.jsonl", 20))
    assert asked == [("org/name", revision, set())]
