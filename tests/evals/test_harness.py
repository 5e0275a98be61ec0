"""EleutherAI's harness over our model gives the numbers of its own Hugging Face backend over the exported one."""

import json

import pytest
from support.runs import command, finish, write_run

from ftjax import assemble, harness
from ftjax.evals import best

TASKS = {
    "lamps_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "lamps_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{question}} {{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "lamps_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: [" re"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
COLORS = ("blue", "red", "green", "brown")


def write_tasks(folder, rows):
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, fields in TASKS.items():
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{folder / 'rows.jsonl'}'}}}}"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{where}\ntest_split: test\n{fields}")
    return folder


@pytest.mark.slow
def test_a_run_has_the_numbers_of_its_export_under_the_harness_s_own_backend(tmp_path, monkeypatch, record_figure):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    config, workdir, merged = write_run(tmp_path), str(tmp_path / "run"), str(tmp_path / "merged")
    finish(command("ftjax.train", "--config", str(config), "--workdir", workdir, "--config.steps=8"))
    finish(command("ftjax.export", "--workdir", workdir, "--format", "merged", "--out", merged))
    rows = [
        {"question": f"The {color} lamp {'is broken' * (i % 3)}", "choices": [f"send {c}" for c in COLORS]}
        | {"answer": COLORS.index(color), "written": f"x{i}"}
        for i, color in enumerate(COLORS * 3)
    ]
    tasks = write_tasks(tmp_path / "tasks", rows)
    out = tmp_path / "results.json"
    names = ("--tasks", ",".join(TASKS), "--include_path", str(tasks), "--out", str(out))
    printed = finish(command("ftjax.harness", "--workdir", workdir, *names))
    assert "lamps_choice" in printed
    ours = json.loads(out.read_text())

    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": merged, "dtype": "float32"},
        device="cpu",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks)),
        batch_size=1,
    )
    compared = 0
    for name in TASKS:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                record_figure(f"{name} {metric}, difference", abs(ours[name][metric] - value))
                assert ours[name][metric] == pytest.approx(value, rel=1e-4, abs=1e-9), (name, metric)
                compared += 1
    assert compared >= 5

    _, base, variables, _ = assemble.load_run(tmp_path / "run", best.choose(tmp_path / "run", None))
    answers = harness.evaluate(base, variables, ["lamps_answer"], str(tasks), 4)["samples"]["lamps_answer"]
    written = [[sample["resps"] for sample in samples] for samples in (answers, theirs["samples"]["lamps_answer"])]
    assert written[0] == written[1]
    assert len({str(answer) for answer in written[0]}) > 1
