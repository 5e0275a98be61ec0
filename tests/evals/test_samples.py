"""Several answers to each prompt: drawn anew each, alike at every step, all scored and kept in samples.jsonl."""

import json
from types import SimpleNamespace

import jax
from support.chat_templates import CHATML, make_tokenizer
from support.tiny import numpy_params, one_device, spec

from ftjax import config as configs
from ftjax.evals.evaluator import Evaluator
from ftjax.models.decoder import Decoder
from ftjax.training.display import Display


def test_every_answer_is_scored_and_kept(tmp_path, capsys):
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {letter}", "completion": letter}) + "\n" for letter in "abc")
    )
    config = configs.defaults()
    config.data.eval = ({"source": str(tmp_path / "asked.jsonl"), "score": "exact"},)
    config.evaluate.update({"samples": 4, "temperature": 1.0, "max_new_tokens": 4, "general": ()})
    model, tokenizer = Decoder(spec(vocab_size=400, max_position_embeddings=128)), make_tokenizer(CHATML)
    base = SimpleNamespace(model=model, tokenizer=tokenizer, end_tokens=(tokenizer.eos_token_id,), images=None)
    never = SimpleNamespace(check=lambda: None)
    mesh = one_device()
    program = SimpleNamespace(mesh=mesh, objective=None, totals=None)  # no rows have a loss
    evaluator = Evaluator(config, base, program, None, tmp_path, never, Display(1))
    variables = {"params": numpy_params(model)}
    with jax.set_mesh(mesh):
        metrics = evaluator(0, variables, {})
        again = evaluator(5, variables, {})
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    first = [record for record in records if record["step"] == 0]
    assert [record["expected"] for record in first] == [*"aaaabbbbcccc"]
    assert len({record["completion"] for record in first}) > 3
    assert [record["completion"] for record in first] == [r["completion"] for r in records if r["step"] == 5]
    assert metrics == again == {"eval_asked/exact": 0.0, "eval_asked/pass@4": 0.0}
    assert "asked scores 0.0% on 3 examples (4 answers each; pass@4 0.0%)" in capsys.readouterr().out
