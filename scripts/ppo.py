"""What PPO makes of a learned reward, on SmolLM2 with the support tickets: python scripts/ppo.py

A short supervised run comes first, then an ensemble of reward heads on pairs of tickets, then PPO against it: with the
penalty on the KL divergence and without, with the pretraining mix, and pessimistic. The tickets' own score, which no
reward model has seen, says what a rise of the reward is worth. An hour and a half on two CPU cores. Everything is kept
in OUT; the same command again goes on, and a finished one only prints. With --write the table goes to
docs/reinforcement.md.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pages import write_measured
from remedies import write_replay

from ftjax import assemble, config_files, export, sharding, train
from ftjax.evals.intervals import interval
from ftjax.training import metrics

TEXTS = 96  # of the pretraining mix: what the base itself answers to general requests
ROUNDS = 3  # of which the first and the last of a curve are means

VARIANTS: dict[str, dict[str, Any]] = {
    "PPO": {},
    "without the KL penalty": {"objective.kl_coef": 0.0},
    "PPO-ptx": {"objective.ptx_coef": 1.0, "data.ptx_rows": 4},
    "pessimistic": {"rewards": "?std=1"},
}


def finished(config: str, changes: Mapping[str, Any], workdir: Path, steps: int) -> Path:
    """The workdir of a run of a config that ships, with these changes; it is finished."""
    its = config_files.load(config)
    its.update_from_flattened_dict(dict(changes) | ({"steps": steps} if steps else {}))
    if status := train.train(its, workdir):
        raise SystemExit(status)
    return workdir


def results(out: Path, wanted: Sequence[str], steps: int, tickets: int) -> dict[str, Path]:
    """{variant: its workdir}, all finished."""
    sft = finished("quickstart", {"steps": 16, "data.eval": ()}, out / "sft", steps)
    if not (out / "adapter").exists():
        export.export_peft(sft, None, out / "adapter")
    begun = {"adapter.source": str(out / "adapter")}
    judge = begun | {"objective.ensemble": 4, "data.eval": ()}
    reward = finished("quickstart_reward", judge, out / "reward", steps)
    if not (out / "texts.jsonl").exists():
        _, base, variables, _ = assemble.load_run(sft)
        plain = {part: leaves for part, leaves in variables.items() if part != "lora"}
        with jax.set_mesh(sharding.make_mesh({"fsdp": -1})):
            write_replay(base, plain, out / "texts.jsonl", TEXTS)
    found = {}
    for name in wanted:
        changes = begun | {"data.eval": ({"source": "task:support_ticket", "limit": tickets},)} | VARIANTS[name]
        changes["objective.rewards"] = (f"reward:{reward}{changes.pop('rewards', '')}",)
        if "objective.ptx_coef" in changes:
            changes["data.ptx"] = (str(out / "texts.jsonl"),)
        found[name] = finished("quickstart_ppo", changes, out / name.replace(" ", "-"), 4 * steps)
    return found


def table(runs: Mapping[str, Path]) -> str:
    """Markdown. The tickets of all runs are the same, so that differences are paired."""
    lines = [
        "| | reward | KL | tickets right | against before | general text |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, workdir in runs.items():
        records = metrics.read(workdir / "metrics.jsonl")
        rounds = {record["episode"]: record for record in records if "episode" in record}.values()
        scores, kl = ([its[name] for its in rounds] for name in ("objective/scores", "objective/kl"))
        samples = metrics.read(workdir / "samples.jsonl")
        first, last = ([s["score"] for s in samples if s["step"] == end] for end in (0, records[-1]["step"]))
        general = [r["eval_general/change"] for r in records if "eval_general/change" in r]
        cells = [
            name,
            f"{np.mean(scores[:ROUNDS]):.2f} to {np.mean(scores[-ROUNDS:]):.2f}",
            f"{np.mean(kl[-ROUNDS:]):.1f}",
            f"{np.mean(first):.0%} to {np.mean(last):.0%}",
            with_interval(np.subtract(last, first)),
            f"{general[-1]:+.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_interval(values: Sequence[float]) -> str:
    """The mean in percent, with its 95 % interval."""
    low, high = interval(values)
    return f"{100 * np.mean(values):+.0f} % [{100 * low:+.0f}, {100 * high:+.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ppo-measured"), help="where everything is kept")
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="these variants alone")
    parser.add_argument("--steps", type=int, default=0, help="of each training (default: those of the configs)")
    parser.add_argument("--tickets", type=int, default=100, help="how many are scored")
    parser.add_argument("--write", action="store_true", help="also write the table in docs/reinforcement.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = table(results(args.out.absolute(), args.only or list(VARIANTS), args.steps, args.tickets))
    print(drawn)
    if args.write:
        write_measured("reinforcement.md", drawn)


if __name__ == "__main__":
    main()
