"""Each family through the whole flow: transformers' files in, a few LoRA steps, transformers' files out."""

import json
import runpy

import numpy as np
import pytest
import torch
from support.chat_templates import CHATML, make_tokenizer
from support.family_configs import CONFIGS
from support.runs import write_rows, write_run
from support.tiny import batch_of, logits
from support.torch_models import torch_model
from transformers import AutoModelForCausalLM

from ftjax import assemble
from ftjax.export import export_model
from ftjax.train import train
from ftjax.training import metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("families")
    write_run(path)
    write_rows(path / "train.jsonl", 40)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_of_every_family_comes_out_in_transformers(root, name, record_figure):
    positions = "n_positions" if CONFIGS[name]["model_type"] == "gpt2" else "max_position_embeddings"
    tokenizer = make_tokenizer(CHATML)
    sizes = {size: 400 for size in ("vocab_size", "vocab_size_per_layer_input") if size in CONFIGS[name]}
    model = torch_model(CONFIGS[name] | sizes | {positions: 256, "eos_token_id": tokenizer.eos_token_id})
    where = root / name
    model.save_pretrained(where / "model")
    tokenizer.save_pretrained(where / "model")

    config = runpy.run_path(str(root / "run.py"))["get_config"]()
    config.model.source, config.data.eval = str(where / "model"), ()
    config.steps, config.data.batch_size, config.checkpoint_every = 4, 2, 4
    config.optimizer.learning_rate = 1e-2  # 3e-2, which the other runs use, is too much for GPT-2
    assert train(config, where / "run") == 0
    losses = [record["loss"] for record in metrics.read(where / "run/metrics.jsonl")]
    assert losses[-1] < losses[0]

    assert export_model(where / "run", None, "hf", where / "out", "float32", "f16") == 4
    parity = json.loads((where / "out/parity.json").read_text())
    assert parity["max_abs_logit_difference"] < 1e-3
    _, base, variables, _ = assemble.load_run(where / "run")
    tokens = np.asarray(base.tokenizer.encode("<|im_start|>user\nThe red lamp is broken<|im_end|>\n"), np.int32)
    ours = logits(base.model, variables, batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens)))[0]
    again = AutoModelForCausalLM.from_pretrained(where / "out", attn_implementation="eager")
    with torch.no_grad():
        theirs = again(torch.tensor(tokens[None]).long()).logits[0].numpy()
        before = model(torch.tensor(tokens[None]).long()).logits[0].numpy()
    record_figure("logits", np.abs(ours - theirs).max())
    assert np.abs(before - theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
