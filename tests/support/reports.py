"""Workdirs of runs that never ran, with every file that the report reads."""

import json
from pathlib import Path
from typing import Any

from ftjax import config as configs

EVIL = "</script><img src=x onerror=alert(1)> {{ 7 * 7 }} & \u202egnp.exe \x1b[31m \ud800 <b id='verdict'>"
NAME = "eval_support_ticket/score"


def write_workdir(
    path: Path, steps: int = 80, scores: tuple[float, ...] = (0.0, 0.5, 0.875), evil: bool = False, **changes: Any
) -> Path:
    """A run that logged every step, was scored before, in the middle and at the end, and kept these two checkpoints."""
    path.mkdir(parents=True)
    config = configs.defaults()
    config.model.source, config.data.train = "package:small", ("rows.jsonl",)
    config.data.eval, config.steps, config.log_every = ("task:support_ticket",), steps, 1
    config.update_from_flattened_dict(changes)
    configs.write(config, path / "config.json")
    records, samples = [], []
    for step in range(steps + 1):
        if step:
            loss = {"loss": 3 / step, "grad_norm": 50.0 if step == 37 else 0.3, "learning_rate": 1e-3, "step_time": 2.0}
            records.append({"step": step, **loss, "tokens_per_second": 100.0, "num_tokens": 200 * step, "epoch": 0.1})
        if step % (steps // 2) == 0:
            number = step // (steps // 2)
            general = {"loss": 2.9 + number / 100, "change": number / 100, "kl": number / 10, "news": 3.0}
            metrics = {NAME: scores[number], "eval_loss": 2.0 - number / 2}
            records.append({"step": step, **metrics, **{f"eval_general/{name}": v for name, v in general.items()}})
            samples += [sample(step, i, scores[number], evil) for i in range(16)]
            if step:
                (path / "checkpoints" / str(step)).mkdir(parents=True)
                (path / "checkpoints" / str(step) / "digests.json").write_text("{}")
    write_lines(path / "metrics.jsonl", records)
    write_lines(path / "samples.jsonl", samples)
    return path


def sample(step: int, i: int, score: float, evil: bool) -> dict[str, Any]:
    """The i-th of 16 samples; `score` of them are right, but the last is right before training and wrong after it."""
    right = i < 16 * score if i < 15 else step == 0
    prompt = f"Order {i} {EVIL if evil else 'is broken'}"
    completion = f'{{"order": "{i if right else 99}"}}' if step else f"I am sorry about {i}"
    expected = f'{{"order": "{i}"}}'
    found = {"prompt": prompt, "completion": completion + EVIL * evil, "expected": expected, "score": float(right)}
    return {"step": step, "source": "support_ticket"} | found


def evaluation(step: int = 80, text: str = "tuning wins") -> dict[str, Any]:
    """What ftjax.evaluate writes, with `text` wherever somebody's text stands."""
    contestants = [
        {"name": "base", "kind": "base", "shots": 0, "score": 0.0, "interval": [0.0, 0.02], "prompt_tokens": 68.0},
        {"name": f"base, 8 examples {text}", "kind": "shots", "shots": 8, "score": 0.49, "interval": [0.42, 0.56]},
        {"name": "tuned", "kind": "tuned", "score": 0.905, "interval": [0.86, 0.94], "valid": 0.97, "seconds": 0.41},
    ]
    contestants[1] |= {"prompt_tokens": 812.0, "cost": None, "note": text, "loss": float("nan"), "younger": [1]}
    answers = {
        "prompt": text,
        "expected": "send 5 blue lamps",
        "completions": {"base": "send blue lamps", "tuned": f"send 6 blue lamps {text}"},
        "scores": {"base": 0.0, "tuned": None},
    }
    differences = [{"of": "tuned", "against": "base, 8 examples", "score": 0.41, "interval": [0.33, 0.49]}]
    differences[0]["prompt_tokens"] = -0.92
    scored = {"name": "support_ticket", "metric": "score", "examples": 200, "verdict": text, "contestants": contestants}
    categories = [
        {"name": name, "language": "en", "tokens": 812, "base": 2.31, "tuned": 2.35} for name in ("code", text)
    ]
    forgetting = {"categories": categories, "base": 2.9, "tuned": 2.93, "change": 0.03, "interval": [0.01, 0.05]}
    forgetting |= {"kl": 0.8, "abilities": [{"name": text, "examples": 60, "base": 0.55, "tuned": 0.53}]}
    forgetting |= {"drift": [{"layer": layer, "relative": 0.011} for layer in range(3)], "verdict": None}
    win_rate = {"of": "tuned", "against": "base", "rate": 0.75, "interval": [0.7, 0.8]}
    sets = [scored | {"differences": differences, "samples": [answers] * 16, "win_rate": win_rate}]
    return {"version": 1, "step": step, "verdict": f"Tuning wins: {text}", "sets": sets, "forgetting": forgetting}


def start(step: int, began: float, ended: float | None, count: int = 4, text: str = "x") -> dict[str, Any]:
    """A start of environment.json."""
    devices = {"platform": "tpu", "kind": f"TPU v5e {text}", "count": count, "processes": 1}
    about = {"model": f"small: {text}", "steps": "80"}
    data = {
        "examples": 120,
        "tokens": 4412,
        "dropped": 0,
        "per_source": [{"source": text, "rows": 120, "tokens": 4412}],
    }
    run = {"step": step, "steps": 80, "began": began, "ended": ended, "devices": devices}
    return run | {"versions": {"jax": f"0.10.2 {text}"}, "run": about, "data": data}


def write_all(path: Path) -> Path:
    """A workdir with all there can be, and something nasty in every text."""
    write_workdir(path, evil=True)
    (path / "evaluation.json").write_text(json.dumps(evaluation(text=EVIL)))
    starts = [start(0, 1000.0, 4600.0, text=EVIL), start(40, 5000.0, 6800.0, text=EVIL)]
    (path / "environment.json").write_text(json.dumps({"version": 1, "starts": starts}))
    return path


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
