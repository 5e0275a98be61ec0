"""What a run leaves goes into peft, transformers and ftjax.generate, and says the same everywhere."""

import runpy

import numpy as np
import peft
import pytest
import torch
from runs import command, finish, write_run
from tiny import batch_of, logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftjax import assemble
from ftjax.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run in run/, exported to adapter/ and merged/."""
    path = tmp_path_factory.mktemp("export")
    config = runpy.run_path(str(write_run(path)))["get_config"]()
    config.steps, config.data.eval = 12, ()
    assert train(config, path / "run") == 0
    for format, out in (("peft", "adapter"), ("merged", "merged")):
        run, target = f"--workdir={path / 'run'}", f"--out={path / out}"
        assert str(path / out) in finish(command("ftjax.export", run, target, f"--format={format}"))
    return path


@pytest.fixture(scope="module")
def ours(root):
    """Tokens of a conversation, and the logits of the run for them."""
    _, base, variables, step = assemble.load_run(root / "run")
    assert step == 12
    text = "<|im_start|>user\nThe red lamp is broken<|im_end|>\n<|im_start|>assistant\nsend red<|im_end|>"
    tokens = np.asarray(base.tokenizer.encode(text), np.int32)
    batch = batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens))
    adapted = logits(base.model, variables, batch)[0]
    plain = logits(base.model, {"params": variables["params"]}, batch)[0]
    assert np.abs(adapted - plain).max() > 1  # so that a lost adapter shows
    return tokens, adapted


def assert_same_logits(model, ours, record_figure):
    tokens, expected = ours
    with torch.no_grad():
        found = model(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()
    record_figure("largest logit difference", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_peft_loads_the_adapter(root, ours, record_figure):
    base = AutoModelForCausalLM.from_pretrained(root / "model", attn_implementation="eager")
    assert_same_logits(peft.PeftModel.from_pretrained(base, root / "adapter"), ours, record_figure)


def test_transformers_loads_the_merged_model(root, ours, record_figure):
    model = AutoModelForCausalLM.from_pretrained(root / "merged", attn_implementation="eager")
    assert_same_logits(model, ours, record_figure)
    tokenizer = AutoTokenizer.from_pretrained(root / "merged")
    conversation = [{"role": "user", "content": "The red lamp"}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("user\nThe red lamp<|im_end|>\n<|im_start|>assistant\n")


def test_generate_says_the_same_from_run_adapter_and_merged_model(root):
    sources = (
        [f"--workdir={root / 'run'}"],
        [f"--model={root / 'model'}", f"--adapter={root / 'adapter'}"],
        [f"--model={root / 'merged'}"],
    )
    options = ["--prompt=The red lamp is broken", "--max_new_tokens=8"]
    said = [finish(command("ftjax.generate", *source, *options)).strip() for source in sources]
    assert said[0] == said[1] == said[2]
    plain = finish(command("ftjax.generate", f"--model={root / 'model'}", *options)).strip()
    assert plain != said[0]


def test_sampling_is_reproduced_by_its_seed(root):
    options = [f"--workdir={root / 'run'}", "--prompt=The lamp", "--max_new_tokens=8", "--temperature=1.5"]
    first, again, other = (finish(command("ftjax.generate", *options, f"--seed={seed}")) for seed in (1, 1, 2))
    assert first == again != other


def test_chat_answers_line_by_line(root):
    process = command("ftjax.generate", f"--workdir={root / 'run'}", "--chat", "--max_new_tokens=4", talks=True)
    out, err = process.communicate("The red lamp\nThe blue lamp\n\n", timeout=120)
    assert process.returncode == 0, err
    assert out.count("> ") == 3


def test_mistakes_are_told(root):
    run = f"--workdir={root / 'run'}"
    for arguments, words in (
        (["ftjax.export", run, "--format=peft", f"--out={root / 'adapter'}"], "exists"),
        (["ftjax.export", run, "--format=pfet", "--out=x"], "pfet"),
        (["ftjax.export", f"--workdir={root}", "--format=peft", "--out=x"], "workdir of a run"),
        (["ftjax.generate", run, "--model=x", "--prompt=x"], "either --workdir"),
        (["ftjax.generate", run, "--prompt=x", "--top_p=2"], "top_p"),
        (["ftjax.generate", run, "--prompt=x", "--step=3"], "no step 3"),
    ):
        printed = finish(command(*arguments), 2)
        assert words in printed
        assert "Traceback" not in printed
