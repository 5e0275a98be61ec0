"""Adapters of the language model of a multimodal one, loaded by the class that their card names."""

import re
import runpy

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from support.chat_templates import CHATML, make_tokenizer
from support.family_configs import CONFIGS
from support.runs import write_rows, write_run
from support.tiny import batch_of, logits

from ftjax import assemble
from ftjax.export import export_peft
from ftjax.train import train

QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
QWEN |= {"out_hidden_size": 32, "num_position_embeddings": 16}
PIXTRAL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXTRAL |= {"model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14}
# (transformers' names of the whole and of its language model, the tower)
CASES = {"qwen3_5": ("Qwen3_5", "qwen3_5", QWEN), "mistral3": ("Mistral3", "ministral3", PIXTRAL)}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_goes_into_the_model_that_its_card_loads(name, tmp_path, record_figure):
    cls, text, vision = CASES[name]
    tokenizer = make_tokenizer(CHATML)
    sizes = {
        "vocab_size": 400,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0,
        "max_position_embeddings": 256,
    }
    config = getattr(transformers, f"{cls}Config")(text_config=CONFIGS[text] | sizes, vision_config=vision)
    torch.manual_seed(0)
    getattr(transformers, f"{cls}ForConditionalGeneration")(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "run-files").mkdir()
    write_run(tmp_path / "run-files")
    run = runpy.run_path(str(tmp_path / "run-files/run.py"))["get_config"]()
    run.model.source, run.data.train, run.data.eval = str(tmp_path / "model"), (str(tmp_path / "rows.jsonl"),), ()
    run.steps = 1
    write_rows(tmp_path / "rows.jsonl", 20)
    assert train(run, tmp_path / "run") == 0
    export_peft(tmp_path / "run", None, tmp_path / "out")

    (auto,) = re.findall(r"^model = (Auto\w+)\.from_pretrained", (tmp_path / "out/README.md").read_text(), re.MULTILINE)
    base = getattr(transformers, auto).from_pretrained(tmp_path / "model", attn_implementation="eager")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokens = np.asarray(tokenizer.encode("The red lamp is broken"), np.int32)
    _, opened, variables, _ = assemble.load_run(tmp_path / "run")
    batch = batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens))
    ours, plain = (logits(opened.model, its, batch)[0] for its in (variables, {"params": variables["params"]}))
    with torch.no_grad():
        theirs = adapted(torch.tensor(tokens[None]).long()).logits[0].numpy()
    record_figure("logits", np.abs(ours - theirs).max())
    assert np.abs(ours - plain).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
