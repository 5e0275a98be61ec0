"""The page on adapters: its Python runs as it stands there, with adapters that the real peft made."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import ROOT
from support.runs import write_model
from transformers import AutoModelForCausalLM

from ftjax.adapted import NONE, load_model, side_by_side
from ftjax.errors import UserError
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling

(EXAMPLE,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adapters.md").read_text(), re.DOTALL)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def write_adapter(path, seed, **fields):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained("MODEL")
    get_peft_model(base, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **fields)).save_pretrained(path)


def test_rows_of_one_batch_with_other_adapters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "MODEL")
    write_adapter("DIR1", 0, r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"])
    write_adapter("DIR2", 1, r=2, lora_alpha=32, target_modules="all-linear")
    there = {}
    exec(EXAMPLE, there)
    printed = capsys.readouterr().out
    texts = []
    for number, name in enumerate((NONE, "formal", "brief")):
        how = 20, there["base"].end_tokens, Sampling()
        (alone,) = generate(there["base"].model, there["variables"][name], [there["prompt"]], *how)
        texts.append(there["base"].tokenizer.decode(alone.tokens))
        assert f"{[None, 0, 1][number]} {texts[-1]}\n" in printed
    assert len(set(texts)) == 3


def test_what_was_trained_whole_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "MODEL", tie_word_embeddings=False)
    write_adapter("DIR1", 0, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    base, variables = load_model("MODEL", {"own": "DIR1"}, "float32")
    with pytest.raises(UserError, match=r"adapter own: embed_tokens/embedding was trained whole.*merge it"):
        side_by_side(base, variables)
