"""What scripts/benchmark.py runs, each in a process of its own: python scripts/contestants.py CASE WHO DTYPE

ftjax, transformers with PEFT, and TRL do the same work: the same model and rows, batch, rank, optimizer, learning rate
and new tokens. Prints one line of JSON with the seconds of each step, or each call, and the tokens that were in them,
padding left out.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

NEW_TOKENS = 64  # of a prompt, where completions are written
WARM = 2  # steps or calls that do not count: compilation, allocation, caches
RATE, RANK, ALPHA = 2e-4, 16, 32
PROMPT = "A customer writes to a shop about an order. Answer in one paragraph, kindly."


class Case(NamedTuple):
    """Work to be timed.

    Attributes:
      kind: lora, full, dpo or generate.
      rows: in a batch.
      length: tokens of a row, or at most so many where `data` has rows of their own lengths.
      data: the file of rows in the benchmark's directory.
    """

    kind: str
    rows: int
    length: int
    data: str = "texts.jsonl"


CASES = {
    "lora": Case("lora", 4, 256),
    "lora-long": Case("lora", 2, 1024),
    "lora-rows": Case("lora", 8, 256, "chats.jsonl"),
    "full": Case("full", 4, 256),
    "full-long": Case("full", 2, 1024),
    "full-rows": Case("full", 8, 256, "chats.jsonl"),
    "dpo": Case("dpo", 4, 256, "pairs.jsonl"),
    "generate": Case("generate", 16, 256),
    "generate-one": Case("generate", 1, 256),
}


class Found(NamedTuple):
    """What was timed.

    Attributes:
      tokens, seconds: of each step or call, but for the first WARM.
      loss: of the last step, None where there is none.
      first: when the first step or call had ended, by time.time(); None where that is not known.
    """

    tokens: list[int]
    seconds: list[float]
    loss: float | None
    first: float | None


def ftjax(case: Case, dtype: str, place: Path, steps: int, device: str) -> Found:
    """The command itself, `ftjax.train`, or the engine that `ftjax.generate` and rollouts write with."""
    os.environ["JAX_PLATFORMS"] = device
    from ftjax import config as configs
    from ftjax import train
    from ftjax.models import onednn

    config = configs.defaults()
    config.model.source = str(place / "model")
    config.model.dtype = config.model.param_dtype = dtype
    # Where it multiplies float32 it is the fastest at that as well, but what generates keeps kernels in bfloat16.
    exact = onednn.operands() == "float32" and case.kind != "generate"
    if (dtype == "bfloat16" or exact) and onednn.choose("auto", device, 1)[0] == "onednn":
        config.model.matmul, config.model.dtype, config.model.param_dtype = "onednn", "float32", "float32"
    if case.kind == "generate":
        return _engine(config, case, place, steps)
    config.objective.name = "dpo" if case.kind == "dpo" else "sft"
    config.adapter.kind = "none" if case.kind == "full" else "lora"
    config.data.train = (str(place / case.data),)
    config.data.max_length, config.data.checks = case.length, "off"
    config.data.batch_size = case.rows
    if case.data == "texts.jsonl":
        config.data.row_length = case.length
        config.data.long_text = "cut"
    elif case.kind != "dpo":  # about four of the examples to a row
        config.data.train_on = "all"  # as the others do
        config.data.batch_size, config.data.row_length = case.rows // 4, 2 * case.length
    else:  # all pairs of a batch in one row, which has the system message and each prompt once
        config.data.share_prefixes = True
        config.data.batch_size, config.data.row_length = 1, 112 * case.rows
    config.optimizer.learning_rate, config.schedule.name = RATE, "constant"
    config.adapter.rank, config.adapter.alpha = RANK, float(ALPHA)
    config.evaluate.general = ()
    config.steps, config.log_every, config.checkpoint_every = steps, 1, steps
    workdir = place / f"run-{os.getpid()}"
    if train.train(config, workdir):
        raise SystemExit("ftjax.train failed")
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["step"] > WARM and "step_time" in record]
    # Those that rows hold, and those that they hold once for several documents, as the others have them.
    held = [record["tokens_per_second"] * record["step_time"] for record in steps]
    tokens = [round(own + record.get("shared_tokens", 0)) for own, record in zip(held, steps, strict=True)]
    return Found(tokens, [record["step_time"] for record in steps], steps[-1]["loss"], None)


def _engine(config: Any, case: Case, place: Path, calls: int) -> Found:
    from ftjax.adapted import load_model
    from ftjax.sampling.engine import generate
    from ftjax.sampling.sampler import Sampling

    base, models = load_model(config.model.source, {}, config.model.dtype)
    (variables,) = models.values()
    base = base._replace(model=base.model.clone(matmul=config.model.matmul))
    prompts = prompts_of(case, base.tokenizer)

    def call() -> int:
        done = generate(base.model, variables, prompts, NEW_TOKENS, (), Sampling(), case.rows)
        return sum(len(one.tokens) for one in done)

    return timed(call, calls)


def prompts_of(case: Case, tokenizer: Any) -> list[Any]:
    """Of 15 to about 80 tokens."""
    import numpy as np

    texts = [" ".join([PROMPT] * (1 + i % 5)) for i in range(case.rows)]
    return [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]


def timed(call: Callable[[], int], calls: int) -> Found:
    tokens, seconds, ends = [], [], []
    for _ in range(calls):
        began = time.perf_counter()
        tokens.append(call())
        seconds.append(time.perf_counter() - began)
        ends.append(time.time())
    return Found(tokens[WARM:], seconds[WARM:], None, ends[0])


def peft(case: Case, dtype: str, place: Path, steps: int, device: str) -> Found:
    """transformers' model under PEFT's adapters in the shortest loop of torch; generation by `generate`."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = _torch_model(place, dtype, device)
    if case.kind == "generate":
        return _generate(model, tokenizer, case, steps, device)
    if case.kind == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, _lora())
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0, fused=True)
    batches = iter(_batches(case, tokenizer, place, steps))
    losses = []

    def step() -> int:
        batch = {name: value.to(device) for name, value in next(batches).items()}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for it
        return int(batch["attention_mask"].sum())

    return timed(step, steps)._replace(loss=losses[-1])


def _torch_model(place: Path, dtype: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    how = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    return AutoModelForCausalLM.from_pretrained(place / "model", **how).to(device)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def _batches(case: Case, tokenizer: Any, place: Path, steps: int) -> list[dict[str, Any]]:
    """Padded to their longest, which is nothing where all rows are long."""
    rows = [json.loads(line) for line in (place / case.data).read_text().splitlines()]
    if case.data == "chats.jsonl":
        ids = [tokenizer.apply_chat_template(row["messages"], return_dict=False)[: case.length] for row in rows]
    else:
        ids = [tokenizer(row["text"])["input_ids"][: case.length] for row in rows]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batches = []
    for step in range(steps):
        its = [ids[(step * case.rows + i) % len(ids)] for i in range(case.rows)]
        batch = tokenizer.pad({"input_ids": its}, return_tensors="pt")
        batches.append(batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})
    return batches


def _generate(model: Any, tokenizer: Any, case: Case, calls: int, device: str) -> Found:
    import torch

    model.eval()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ids = [prompt.tolist() for prompt in prompts_of(case, tokenizer)]
    inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    def call() -> int:
        with torch.no_grad():
            done = model.generate(**inputs, **length, pad_token_id=tokenizer.pad_token_id)
        return case.rows * (done.shape[1] - inputs["input_ids"].shape[1])

    return timed(call, calls)


def trl(case: Case, dtype: str, place: Path, steps: int, device: str) -> Found:
    """SFTTrainer and DPOTrainer as they come, with the same batch; bfloat16 is their mixed precision."""
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    marks, seen, losses, ends = [], [], [], []

    class Marks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict, **kwargs: Any) -> None:
            if "loss" in logs:
                marks.append(time.perf_counter())
                ends.append(time.time())
                seen.append(logs.get("num_tokens", 0))
                losses.append(float(logs["loss"]))

    how = {
        "output_dir": str(place / f"trl-{os.getpid()}"),
        "per_device_train_batch_size": case.rows,
        "max_steps": steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_length": case.length,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": device == "cpu",
        "bf16": dtype == "bfloat16",
    }
    rows = datasets.load_dataset("json", data_files=str(place / case.data), split="train")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    made, config = (DPOTrainer, DPOConfig) if case.kind == "dpo" else (SFTTrainer, SFTConfig)
    trainer = made(
        model=_torch_model(place, "float32", device),
        args=config(**how),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=None if case.kind == "full" else _lora(),
        callbacks=[Marks()],
    )
    trainer.train()
    seconds = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]
    tokens = [round(now - before) for before, now in zip([0, *seen], seen)]
    if case.kind == "dpo":  # which does not count them
        tokens = [round(case.rows * tokens_of_pair(tokenizer, place / case.data))] * len(seconds)
    return Found(tokens[WARM:], seconds[WARM:], losses[-1], ends[0])


def tokens_of_pair(tokenizer: Any, file: Path) -> float:
    """On average, of both of its conversations."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    whole = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    counts = [len(tokenizer.apply_chat_template(messages, return_dict=False)) for messages in whole]
    return 2 * sum(counts) / len(counts)


WHO = {"ftjax": ftjax, "peft": peft, "trl": trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("who", choices=list(WHO))
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--place", type=Path, required=True, help="the benchmark's directory")
    parser.add_argument("--steps", type=int, default=6, help="that count")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # what they print themselves is not the result
    found = WHO[args.who](CASES[args.case], args.dtype, args.place, args.steps + WARM, args.device)
    print(json.dumps(found._asdict() | {"peak": peak()}), file=out, flush=True)


def peak() -> int:
    """Bytes of memory, at most, of this process. getrusage would count those of the one that started it, too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
