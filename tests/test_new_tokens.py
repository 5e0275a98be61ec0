"""Tokens that are new to a model: in a whole run with a template of its own, and in everything that is made of it."""

import re
import runpy
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from support.chat_templates import make_tokenizer
from support.family_configs import CONFIGS
from support.runs import write_run
from support.tiny import batch_of, logits, one_device, spec
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftjax import assemble, describe, export, generate, plan, preflight, tree
from ftjax.data.audit import checks
from ftjax.data.format.example import Row
from ftjax.data.tokens import chat, templates
from ftjax.data.tokens import tokenizer as tokenizers
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.train import train
from ftjax.weights.resized import ResizedReader
from ftjax.weights.source import open_source

SPECIALS = ["<unk>", "<s>", "</s>"]  # a base model's tokenizer: nothing of a chat
ADDED = ("<|im_start|>", "<|im_end|>", "<lamp>")
TEXT = "<|im_start|>user\nThe red lamp is broken<|im_end|>\n<|im_start|>assistant\n<lamp> red<|im_end|>"
SYSTEM = 'Say "<lamp>" and the color.\nÄ 🙂'


def config_of(root, **changes):
    config = runpy.run_path(str(root / "run.py"))["get_config"]()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run of a base model with three tokens more, and its exports."""
    path = tmp_path_factory.mktemp("tokens")
    write_run(path)
    # The base: fewer rows and another tokenizer.
    tokenizer = make_tokenizer(None, eos="</s>", specials=SPECIALS)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base = AutoModelForCausalLM.from_pretrained(path / "model")
    base.resize_token_embeddings(len(tokenizer))
    base.config.eos_token_id = tokenizer.eos_token_id
    base.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "model/chat_template.jinja").unlink()
    (path / "model/generation_config.json").unlink()  # which names the old tokenizer's end
    for name in ("train", "eval"):
        rows = (path / f"{name}.jsonl").read_text().replace('"content": "send', '"content": "<lamp>')
        (path / f"{name}.jsonl").write_text(rows)
    chosen = {"data__chat_template": "chatml", "data__system": SYSTEM, "data__checks": "on", "data__eval": ()}
    config = config_of(path, steps=8, model__add_tokens=ADDED, **chosen)
    assert train(config, path / "run") == 0
    export.export_peft(path / "run", None, path / "adapter")
    for format, out in (("hf", "whole"), ("gguf", "whole.gguf")):
        export.export_model(path / "run", None, format, path / out, None, "f16")
    return path


@pytest.fixture(scope="module")
def ours(root):
    """Tokens of a conversation, and the run's logits for them."""
    _, base, variables, _ = assemble.load_run(root / "run")
    tokens = np.asarray(base.tokenizer.encode(TEXT), np.int32)
    return base, variables, tokens, logits(base.model, variables, batch_of([[(tokens, tokens > -1)]], len(tokens)))[0]


def test_the_rows_of_new_tokens_are_trained(root, ours):
    base, variables, tokens, _ = ours
    known = base.known_rows
    assert base.model.spec.vocab_size == known + 3
    assert [token for token in tokens.tolist() if token >= known] == [known, known + 1, known, known + 2, known + 1]
    files = open_source(root / "model")
    old = files.read("model.embed_tokens.weight")
    table = np.asarray(variables["params"]["embed_tokens"]["embedding"])
    moved = np.abs(table[known:] - old.mean(axis=0)).max(axis=1)
    assert (moved > 1e-3).all()  # the head is tied, so that each has a gradient
    assert (np.abs(table[known:] - old.mean(axis=0)) < 1).all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_transformers_and_peft_say_the_same_from_the_exports(root, ours, record_figure):
    _, _, tokens, expected = ours
    whole = AutoModelForCausalLM.from_pretrained(root / "whole", attn_implementation="eager")
    base = AutoModelForCausalLM.from_pretrained(root / "model", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(root / "adapter")
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = peft.PeftModel.from_pretrained(base, root / "adapter")
    for name, model in (("hf", whole), ("peft", adapted)):
        with torch.no_grad():
            found = model(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()
        record_figure(f"largest logit difference, {name}", np.abs(found - expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_every_export_has_the_tokenizer_with_its_template_and_system_prompt(root, ours):
    base, _, tokens, _ = ours
    turns = [{"role": "user", "content": "The red lamp is broken"}]
    expected = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nThe red lamp is broken<|im_end|>\n"
    for source in ("adapter", "whole"):
        tokenizer = AutoTokenizer.from_pretrained(root / source)
        assert tokenizer.apply_chat_template(turns, tokenize=False) == expected
        assert tokenizer.encode(TEXT, add_special_tokens=False) == tokens.tolist()
        assert "<lamp>" in tokenizer.decode(tokens, skip_special_tokens=True)
        assert "im_end" not in tokenizer.decode(tokens, skip_special_tokens=True)
    read = tokenizers.load(root / "whole.gguf")
    assert read.encode(TEXT) == tokens.tolist()
    assert read.apply_chat_template(turns, tokenize=False) == expected
    own = [{"role": "system", "content": "Be brief."}, *turns]
    assert SYSTEM not in base.tokenizer.apply_chat_template(own, tokenize=False)


def test_an_adapter_brings_its_tokens_and_template_to_its_base(root, ours):
    base, _, tokens, expected = ours
    loaded, variables = generate.load_model(str(root / "model"), {"lamps": str(root / "adapter")}, "float32")
    assert loaded.end_tokens == base.end_tokens
    assert tokenizers.rows_needed(loaded.tokenizer) == loaded.model.spec.vocab_size
    assert loaded.tokenizer.chat_template == base.tokenizer.chat_template
    found = logits(loaded.model, variables["lamps"], batch_of([[(tokens, tokens > -1)]], len(tokens)))[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_an_untied_head_learns_new_tokens_too(root):
    config = config_of(root, model__add_tokens=ADDED)
    model = Decoder(spec(tie_word_embeddings=False))
    abstract, is_trained = assemble.abstract_variables(config, model, one_device())
    trained = [path for path in tree.flatten(abstract) if is_trained(path) and not path.startswith("lora/")]
    assert sorted(trained) == ["params/embed_tokens/embedding", "params/lm_head/kernel"]


def test_a_run_goes_on_from_an_adapter_with_new_tokens(root, ours):
    _, variables, _, _ = ours
    config = config_of(root, model__add_tokens=ADDED, adapter__source=str(root / "adapter"), adapter__rank=16)
    base = assemble.open_base(config.model)
    abstract, is_trained = assemble.abstract_variables(config, base.model, one_device())
    assert is_trained("params/embed_tokens/embedding")
    start = assemble.load_variables(config, base, abstract, lambda path: "embed_tokens" in path)
    np.testing.assert_array_equal(
        start["params"]["embed_tokens"]["embedding"], variables["params"]["embed_tokens"]["embedding"]
    )


def test_the_start_table_says_what_new_tokens_cost(root, ours):
    base, variables, _, _ = ours
    config = config_of(root, model__add_tokens=ADDED)
    said = describe._new_tokens(config, base, {"params": variables["params"]})
    size = 16 * variables["params"]["embed_tokens"]["embedding"].size / 1e6
    assert said == {
        "new tokens": "3 rows more, at first the mean of the others; embed_tokens trained whole, "
        f"{size:.1f} MB with gradients and moments"
    }


def test_a_run_keeps_the_template_that_came_from_a_file(root, tmp_path):
    assert (root / "run/chat_template.jinja").is_file()
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}")
    config = config_of(root, data__chat_template=str(file))
    templates.keep(str(file), assemble.open_base(config.model, config.data).tokenizer, tmp_path)
    file.unlink()
    config.data.chat_template = templates.kept(str(file), tmp_path)
    base = assemble.open_base(config.model, config.data)
    assert base.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "user: Hi</s>"
    assert base.end_tokens == (base.tokenizer.convert_tokens_to_ids("</s>"),)
    # A run that begins here later without one keeps none.
    templates.keep("", base.tokenizer, tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()


def test_a_run_whose_template_changed_or_is_gone_goes_on_with_its_own(root, tmp_path, monkeypatch):
    """From another directory, too; what it keeps stays as it was."""
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}")
    monkeypatch.chdir(tmp_path)
    config = config_of(root, data__chat_template="mine.jinja", steps=2)
    assert train(config, tmp_path / "run") == 0
    kept = (tmp_path / "run/chat_template.jinja").read_text()
    (tmp_path / "elsewhere").mkdir()
    for steps, change in ((3, lambda: file.write_text("{{ 'changed' }}")), (4, file.unlink)):
        change()
        monkeypatch.chdir(tmp_path / "elsewhere")
        config = config_of(root, data__chat_template=str(file), steps=steps)
        assert train(config, tmp_path / "run") == 0
        assert (tmp_path / "run/chat_template.jinja").read_text() == kept


def test_going_on_from_an_adapter_its_tokens_are_asked_for_in_their_order(root):
    said, source = [], str(root / "adapter")
    for added, other in (((), ADDED), (ADDED[::-1], ADDED)):
        config = config_of(root, model__add_tokens=added, adapter__source=source)
        base = assemble.open_base(config.model, config.data)
        with pytest.raises(UserError, match=f"another tokenizer.*{re.escape(sorted(other)[0])}.*in the same order"):
            preflight.check_adapter_tokenizer(config, base, SimpleNamespace(say=said.append))
    config = config_of(root, model__add_tokens=ADDED, adapter__source=source)
    base = assemble.open_base(config.model, config.data)
    preflight.check_adapter_tokenizer(config, base, SimpleNamespace(say=said.append))
    assert not said or "another chat template" in said[0]
    base.tokenizer.chat_template = "other"
    preflight.check_adapter_tokenizer(config, base, SimpleNamespace(say=said.append))
    assert "was trained with another chat template" in said[-1]


def test_tokens_of_the_tokenizer_that_the_model_lacks_get_rows(root, tmp_path, caplog):
    """As after tokenizer.add_special_tokens without a resized model; the rows may use them.

    Without config.model.resize_vocab the model works, as Gemma 3's text models do, and refuses only what uses them.
    """
    model = tmp_path / "model"
    model.mkdir()
    for file in (root / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<lamp>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(model)
    config = config_of(root, model__source=str(model), data__chat_template="chatml", model__resize_vocab=True)
    base = assemble.open_base(config.model, config.data)
    assert base.model.spec.vocab_size == base.known_rows + 3
    facts = checks.TokenFacts.of(base.tokenizer, base.end_tokens, 96, base.known_rows)
    assert "<lamp>" not in facts.special
    assert {"<|im_start|>", "<|im_end|>", "</s>"} <= facts.special
    abstract, is_trained = assemble.abstract_variables(config, base.model, one_device())
    trained = [path for path in tree.flatten(abstract) if is_trained(path) and not path.startswith("lora/")]
    assert trained == ["params/embed_tokens/embedding"]
    assert "beyond" not in caplog.text
    without = assemble.open_base(config_of(root, model__source=str(model)).model)
    assert f"3 token id(s) beyond the {base.known_rows} rows of the model's embedding ('<lamp>'," in caplog.text
    assert without.model.spec.vocab_size == base.known_rows
    rows = [Row({"prompt": "The lamp", "completion": answer}, "f:1") for answer in ("red", "<lamp> red")]
    assert chat.tokenize(rows[0], without.tokenizer, base.known_rows).trained.any()
    with pytest.raises(UserError, match=f"f:1: token {base.known_rows} \\('<lamp>'\\) is beyond.*resize_vocab=true"):
        chat.tokenize(rows[1], without.tokenizer, base.known_rows)
    assert plan.with_new_tokens(config.model, spec_from_config(open_source(model).config)) == base.model.spec


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_as_transformers_has_it(root, tmp_path, tied):
    """transformers draws around the mean with a covariance 1e-9 times that of the rows."""
    from support.llama_dirs import llama

    model = llama(tied)
    model.save_pretrained(tmp_path / "model")
    model.resize_token_embeddings(70)
    reader = ResizedReader(open_source(tmp_path / "model"), 70)
    assert spec_from_config(reader.config).vocab_size == 70
    for name in ("model.embed_tokens.weight",) + (() if tied else ("lm_head.weight",)):
        expected = model.state_dict()[name].numpy()
        assert reader.shape(name) == expected.shape == (70, 32)
        whole = reader.read(name)
        assert whole.dtype == reader.dtype(name)
        np.testing.assert_array_equal(whole[:61], expected[:61])
        np.testing.assert_allclose(whole[61:], expected[61:], atol=5e-4)
        for index in ((slice(58, 66), slice(3, 9)), (slice(61, 70),), (slice(0, 5), slice(None)), (slice(65, 66),)):
            np.testing.assert_array_equal(reader.read(name, index), whole[index])
    norm = "model.norm.weight"
    np.testing.assert_array_equal(reader.read(norm), model.state_dict()[norm].numpy())


ALPACA = {"data__chat_template": "alpaca", "data__max_length": 200}
REFUSED = {
    "a token that is there": ({"model__add_tokens": ("</s>",)}, "add_tokens: the tokenizer has '</s>' already"),
    "no string": ({"model__add_tokens": (3,)}, "add_tokens=.*different tokens"),
    "a token twice": ({"model__add_tokens": ("<a>", "<a>")}, "add_tokens=.*different tokens"),
    "a template whose tokens are missing": (
        {"data__chat_template": "chatml"},
        r"chat_template='chatml' writes <\|im_start\|>, <\|im_end\|>.*add_tokens=\('<\|im_start\|>', '<\|im_end\|>'\)",
    ),
    "no such template": ({"data__chat_template": "vicuna"}, "no known template .alpaca, chatml.*No such file"),
    "a system prompt without a template": ({"data__system": "Hi"}, "data.system needs a chat template"),
    "rows for nothing": ({"model__resize_vocab": True}, "enough for the .* ids of the tokenizer; leave it out"),
    "no template": ({}, "no chat template.*config.data.chat_template.*chatml"),
    "full training of all but the new rows": (
        {"model__add_tokens": ("<a>",), "adapter__kind": "none", "adapter__rank": 16, "adapter__trainable": "mlp"}
        | ALPACA,
        "adapter.trainable='mlp' leaves out embed_tokens/embedding",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_key_and_the_fix(root, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(config_of(root, **changes), tmp_path / "run")


def test_a_head_with_a_bias_gets_no_rows():
    reader = SimpleNamespace(config=CONFIGS["phi"], path="model", names=set)
    with pytest.raises(UserError, match="of a 'phi' model has a bias, to which rows are not added; leave config"):
        ResizedReader(reader, 70)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_a_second_embedding_gets_no_rows(name):
    reader = SimpleNamespace(config=CONFIGS[name], path="model", names=set)
    with pytest.raises(UserError, match="has a second embedding, of each layer, to which rows are not added"):
        ResizedReader(reader, 70)
