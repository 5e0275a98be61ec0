"""A base whose files name `</s>` as its end, with a chat template whose turns end with <|im_end|>: what reads an export
stops where the run does."""

import json
import runpy

import peft
import pytest
import torch
from support.chat_templates import CHATML, make_tokenizer
from support.llama_cpp import LlamaCpp
from support.runs import write_run
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ftjax import assemble, export
from ftjax.data.tokens import tokenizer as tok
from ftjax.data.tokens.chat import render_prompt
from ftjax.errors import UserError
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.train import train
from ftjax.weights.gguf.header import read_header
from ftjax.weights.hf.end_tokens import unnamed, with_end_of_turn, with_ends
from ftjax.weights.source import open_source

END, TURN = 2, 4  # </s> and <|im_end|>
QUESTION = [{"role": "user", "content": "The red lamp is broken"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The base in model/, a run in run/, exported to adapter/, merged/ and model.gguf."""
    path = tmp_path_factory.mktemp("ends")
    config = runpy.run_path(str(write_run(path)))["get_config"]()
    tokenizer = make_tokenizer(CHATML, eos="</s>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # a GGUF can name it
    tokenizer.save_pretrained(path / "model")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((path / "model" / name).read_text())
        (path / "model" / name).write_text(json.dumps(content | {"eos_token_id": END}))
    config.steps, config.data.eval = 20, ()
    assert train(config, path / "run") == 0
    export.export_peft(path / "run", None, path / "adapter")
    export.export_model(path / "run", None, "merged", path / "merged", None, "f16")
    export.export_model(path / "run", None, "gguf", path / "model.gguf", None, "f16")
    return path


@pytest.fixture(scope="module")
def ours(root):
    """(the prompt's tokens, the answer's): the run stops by itself, at the end of the turn."""
    _, base, variables, _ = assemble.load_run(root / "run")
    assert base.end_tokens == (END, TURN)
    prompt = render_prompt(QUESTION, base.tokenizer)
    (answer,) = generate(base.model, variables, [prompt], 40, base.end_tokens, Sampling(temperature=0.0))
    assert answer.stopped
    assert len(answer.tokens) > 2
    return prompt, answer.tokens


def said(model, prompt):
    with torch.no_grad():
        return model.generate(torch.tensor(prompt[None], dtype=torch.long), max_new_tokens=60)[
            0, len(prompt) :
        ].tolist()


def test_transformers_stops_where_the_run_does(root, ours):
    prompt, answer = ours
    assert said(AutoModelForCausalLM.from_pretrained(root / "merged"), prompt) == [*answer, TURN]
    for read in (GenerationConfig, AutoConfig):
        assert read.from_pretrained(root / "merged").eos_token_id == [END, TURN]
    tokenizer, base = (AutoTokenizer.from_pretrained(root / name) for name in ("merged", "model"))
    assert (tokenizer.eos_token, base.eos_token) == ("<|im_end|>", "</s>")
    for text in ("a</s><|im_end|>", tokenizer.apply_chat_template(QUESTION, tokenize=False)):
        assert tokenizer.encode(text) == base.encode(text)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_brings_the_generation_config_that_its_base_lacks(root, ours, tmp_path, capsys):
    prompt, answer = ours
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    model = peft.PeftModel.from_pretrained(base, root / "adapter")
    assert said(model, prompt)[: len(answer) + 2] != [*answer, TURN]  # the base's own config runs past it
    model.generation_config = GenerationConfig.from_pretrained(root / "adapter")
    assert said(model, prompt) == [*answer, TURN]
    card = (root / "adapter/README.md").read_text()
    assert 'model.generation_config = GenerationConfig.from_pretrained("PATH_OR_ID")' in card
    assert "Answers end with `<|im_end|>`, which the base's own generation config does not name." in card
    export.export_peft(root / "run", None, tmp_path / "again")
    assert "stops at <|im_end|>, which the base's generation config does not name" in capsys.readouterr().out


def test_a_gguf_names_every_end(root):
    metadata = read_header(root / "model.gguf")[0]
    keys = [metadata[f"tokenizer.ggml.{key}"] for key in ("eos_token_id", "eot_token_id", "eos_token_ids")]
    assert keys == [TURN, END, [TURN, END]]
    config, tokenizer = open_source(root / "model.gguf").config, tok.load(root / "model.gguf")
    assert set(tok.end_tokens(tokenizer, config)) == {END, TURN}
    read = AutoTokenizer.from_pretrained(root, gguf_file="model.gguf")
    assert read.eos_token == "<|im_end|>"


@pytest.mark.slow
def test_llama_cpp_stops_where_the_run_does(root, ours):
    prompt, answer = ours
    tokens, why = LlamaCpp(root / "model.gguf").greedy(prompt.tolist(), 60)
    assert (tokens, why) == ([*answer, TURN], "eos")


def test_a_template_that_writes_eos_token_keeps_it():
    """Phi-3's ends a turn with <|end|> and a conversation with eos_token, which must not change."""
    template = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    config = {"model_type": "llama", "eos_token_id": END}
    for text, end in ((template, "</s>"), (CHATML, "<|im_end|>")):
        original = make_tokenizer(text, eos="</s>")
        ends = tok.end_tokens(original, config)
        assert unnamed(config, ends) == [TURN]
        assert with_end_of_turn(original, config, ends).eos_token == end
        assert original.eos_token == "</s>"
    named = config | {"eos_token_id": [END, TURN]}
    assert with_end_of_turn(original, named, ends) is original
    assert with_ends(named, ends)["eos_token_id"] == [END, TURN]
    assert with_ends(config, (END,))["eos_token_id"] == END


def test_what_an_export_refuses_is_said_before_weights_are_read(root, tmp_path, monkeypatch):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(assemble, "load_variables", read)
    monkeypatch.setattr("ftjax.weights.gguf.write.architecture_of", lambda family: "gpt2")
    with pytest.raises(UserError, match="GGUF"):
        export.export_model(root / "run", None, "gguf", tmp_path / "x.gguf", None, "f16")
    with pytest.raises(UserError, match=r"--vllm: vLLM does not take rank 4 \(over"):
        export.export_peft(root / "run", None, tmp_path / "x", vllm_rank=2)
    assert not list(tmp_path.iterdir())
