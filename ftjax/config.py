"""The config: every key with its default and its check. A run's file changes some of them (see configs/)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ftjax.atomic import write_text
from ftjax.errors import UserError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")
LEARNING_RATES = {"lora": 2e-4, "dora": 2e-4, "none": 2e-5}  # used where optimizer.learning_rate is 0


def defaults() -> ConfigDict:
    """All keys with their defaults, locked: a misspelt key is refused where it is set."""
    config = ConfigDict()
    config.model = ConfigDict()
    config.model.source = ""  # a Hugging Face id, a directory, a .gguf file, or package:NAME
    config.model.dtype = "bfloat16"  # of activations and matrix products
    config.model.param_dtype = "bfloat16"  # of the stored base
    config.model.remat = "none"  # none, full, dots or offload: what the backward pass recomputes (docs/devices.md)
    config.model.attention = "auto"  # auto (the fastest that serves the model here), splash, cudnn or xla

    config.adapter = ConfigDict()
    config.adapter.kind = "lora"  # lora, dora, or none: train the parameters that `trainable` selects
    config.adapter.source = ""  # a PEFT adapter directory to go on from; ranks, alphas and targets are then its own
    config.adapter.rank = 16
    config.adapter.alpha = 32.0
    config.adapter.rank_pattern = ()  # other ranks, by path: (("self_attn", 8), ("down_proj", 32)); the last one counts
    config.adapter.alpha_pattern = ()  # alphas, likewise
    config.adapter.rslora = False  # scale alpha / sqrt(rank) instead of alpha / rank
    config.adapter.dropout = 0.0  # of the adapters' inputs, in training
    config.adapter.init = "default"  # default (the adapted model starts as the base) or pissa
    config.adapter.targets = "all-linear"  # or names, "q_proj,embed_tokens", or a regular expression
    config.adapter.modules_to_save = ()  # modules to train whole beside the adapters: ("lm_head", "norm")
    config.adapter.trainable = ".*"  # with kind none: a regular expression over parameter paths

    config.quantize = ConfigDict()
    config.quantize.base = "none"  # none, int8 or nf4: how the frozen kernels are stored beside adapters

    config.data = ConfigDict()
    config.data.train = ()  # of sources: "rows.jsonl", "tfds:NAME", "task:NAME", or {"source": ..., "split": ...}
    config.data.eval = ()
    config.data.max_length = 1024  # tokens in a row
    config.data.packing = True  # several examples to a row, none seeing another
    config.data.batch_size = 16  # rows in a step, over all devices and micro-batches
    config.data.train_on = "assistant"  # assistant, last (the last assistant turn) or all (every turn)
    config.data.holdout = 0.0  # share of the training rows kept for evaluation instead, chosen by a hash of the prompt
    config.data.checks = "on"  # of the rows before training: on (stop on errors), warn (print them) or off
    config.data.max_bad_rows = 0  # malformed rows to skip (and count) before giving up

    config.objective = ConfigDict()
    config.objective.name = "sft"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.0  # 0: 2e-4 for LoRA, 2e-5 for full fine-tuning
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0  # global gradient norm; 0 turns clipping off
    config.optimizer.loraplus_ratio = 1.0  # LoRA+: how much larger the learning rate of lora_b is; 16 is usual

    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # cosine, linear or constant
    config.schedule.warmup_ratio = 0.03  # of all steps
    config.schedule.final_ratio = 0.0  # of the peak learning rate, at the end

    config.mesh = ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = -1  # -1: what the other axes leave
    config.mesh.tensor = 1
    config.mesh.context = 1  # the length of a row, split: for long sequences
    config.mesh.expert = 1  # the experts of a mixture

    config.evaluate = ConfigDict()
    config.evaluate.max_new_tokens = 128
    config.evaluate.batch_size = 64  # prompts completed together
    config.evaluate.before = True  # also before the first step

    config.checkpoint = ConfigDict()
    config.checkpoint.keep = 2  # the newest so many, and the best
    config.checkpoint.resume_step = -1  # go back to this step once, setting later ones aside; -1: the newest

    config.steps = 0  # 0: as many as `epochs` needs
    config.epochs = 1.0
    config.accumulate = 1  # micro-batches in a step
    config.seed = 0
    config.log_every = 10
    config.eval_every = 0  # steps; 0: only at the end
    config.checkpoint_every = 100
    return config.lock()


def _one_of(*values: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in values, f"one of {', '.join(values)}"


def _number(low: float, high: float = math.inf) -> tuple[Callable[[Any], bool], str]:
    wanted = f"a number from {low:g} to {high:g}" if high < math.inf else f"a finite number, {low:g} or more"
    return lambda value: math.isfinite(value) and low <= value <= high, wanted


def _pairs(kind: type) -> tuple[Callable[[Any], bool], str]:
    def holds(value: Any) -> bool:
        pairs = [one for one in value if isinstance(one, tuple | list) and len(one) == 2]
        fits = [type(pattern) is str and type(number) in (int, kind) and number > 0 for pattern, number in pairs]
        return len(pairs) == len(value) and all(fits)

    return holds, f"pairs of a regular expression and a positive {kind.__name__}, such as (('self_attn', 8),)"


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model.source": (bool, "a Hugging Face id, a directory, a .gguf file or package:NAME"),
    "model.dtype": _one_of(*DTYPES),
    "model.param_dtype": _one_of(*DTYPES),
    "model.remat": _one_of("none", "full", "dots", "offload"),
    "model.attention": _one_of("auto", "splash", "cudnn", "xla"),
    "adapter.kind": _one_of("lora", "dora", "none"),
    "adapter.rank": _number(1),
    "adapter.alpha": _number(1e-6),
    "adapter.rank_pattern": _pairs(int),
    "adapter.alpha_pattern": _pairs(float),
    "adapter.dropout": _number(0, 0.99),
    "adapter.init": _one_of("default", "pissa"),
    "quantize.base": _one_of("none", "int8", "nf4"),
    "data.train": (len, "at least one source, such as ('rows.jsonl',) or ('task:support_ticket',)"),
    "data.max_length": _number(2),
    "data.batch_size": _number(1),
    "data.train_on": _one_of("assistant", "last", "all"),
    "data.holdout": _number(0, 0.5),
    "data.checks": _one_of("on", "warn", "off"),
    "data.max_bad_rows": _number(0),
    "objective.name": _one_of("sft"),
    "optimizer.name": _one_of("adamw"),
    "optimizer.learning_rate": _number(0),
    "optimizer.b1": _number(0, 1),
    "optimizer.b2": _number(0, 1),
    "optimizer.eps": _number(0),
    "optimizer.weight_decay": _number(0),
    "optimizer.clip_norm": _number(0),
    "optimizer.loraplus_ratio": _number(1e-3),
    "schedule.name": _one_of("cosine", "linear", "constant"),
    "schedule.warmup_ratio": _number(0, 1),
    "schedule.final_ratio": _number(0, 1),
    "evaluate.max_new_tokens": _number(1),
    "evaluate.batch_size": _number(1),
    "checkpoint.keep": _number(1),
    "checkpoint.resume_step": _number(-1),
    "steps": _number(0),
    "epochs": _number(1e-9),
    "accumulate": _number(1),
    "seed": _number(0, 2**31 - 1),
    "log_every": _number(1),
    "eval_every": _number(0),
    "checkpoint_every": _number(1),
}

ENTRY_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "source": (lambda value: isinstance(value, str), "a string"),
    "format": (lambda value: isinstance(value, str), "a string"),
    "split": (lambda value: isinstance(value, str), "a string"),
    "weight": (lambda value: type(value) in (int, float) and 0 < value < math.inf, "a positive, finite number"),
    "limit": (lambda value: type(value) is int and value > 0, "a positive whole number"),
}

# Keys that may differ between a run and its resumption: they change nothing that is learned.
FREE_TO_CHANGE = (
    "log_every",
    "checkpoint_every",
    "checkpoint.",
    "evaluate.",
    "eval_every",
    "mesh.",
    "model.remat",
    "model.attention",
    "data.eval",
    "data.checks",
)


def flat(config: ConfigDict) -> dict[str, Any]:
    """{dotted key: value} of all leaves."""
    out = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            out |= {f"{name}.{key}": leaf for key, leaf in flat(value).items()}
        else:
            out[name] = value
    return out


def validate(config: ConfigDict, data: bool = True) -> None:
    """Raises UserError naming the key, its value and what it may be; also for unknown, missing and mistyped keys.

    data: False does without data.train, which a plan does not need.
    """
    known, given = flat(defaults()), flat(config)
    for key in given.keys() - known.keys():
        raise UserError(f"config has no key {key!r}{did_you_mean(key, known)}")
    if missing := sorted(known.keys() - given.keys()):
        raise UserError(f"config lacks {', '.join(missing)}; build it from ftjax.config.defaults()")
    for key, default in known.items():
        _check_type(key, given[key], default)
    for key, (check, wanted) in CHECKS.items():
        if (data or key != "data.train") and not check(given[key]):
            raise UserError(f"config.{key}={given[key]!r}: it must be {wanted}")
    if config.data.batch_size % config.accumulate:
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} is not a multiple of config.accumulate="
            f"{config.accumulate}; every micro-batch has the same number of rows"
        )
    for which in ("train", "eval"):
        for entry in sources(config, which):
            if which == "eval" and entry["source"].startswith(("tfds:", "hf:")) and "split" not in entry:
                raise UserError(f"config.data.eval: say which split of {entry['source']}, as {{'source', 'split'}}")
    evaluated = [json.dumps(entry, sort_keys=True) for entry in sources(config, "eval")]
    if twice := sorted({entry for entry in evaluated if evaluated.count(entry) > 1}):
        raise UserError(f"config.data.eval: {twice[0]} stands there twice")


def evaluates(config: ConfigDict) -> bool:
    """Whether there is something to evaluate on."""
    return bool(config.data.eval) or config.data.holdout > 0


def source_entry(entry: Any, key: str) -> dict[str, Any]:
    """One entry of data.train or data.eval, a string or a mapping, as a dict of "source" and, where given, options.

    Options: "format" and "split" (strings), "weight" (how many times an epoch has each row), "limit" (rows at most).
    """
    if isinstance(entry, str):
        return {"source": entry}
    if not hasattr(entry, "keys") or not isinstance(entry.get("source"), str):
        raise UserError(f"config.{key}: {entry!r} is neither a string nor a mapping with a 'source'")
    for name, value in entry.items():
        if name not in ENTRY_OPTIONS:
            raise UserError(
                f"config.{key}: entry {dict(entry)} has no option {name!r}{did_you_mean(name, ENTRY_OPTIONS)}"
            )
        fits, wanted = ENTRY_OPTIONS[name]
        if not fits(value):
            raise UserError(f"config.{key}: {name!r} of entry {dict(entry)} must be {wanted}")
    return dict(entry)


def sources(config: ConfigDict, which: str) -> list[dict[str, Any]]:
    """The entries of data.train or data.eval, `which`, each as `source_entry` gives it."""
    return [source_entry(entry, f"data.{which}") for entry in config.data[which]]


def learning_rate(config: ConfigDict) -> float:
    return config.optimizer.learning_rate or LEARNING_RATES[config.adapter.kind]


def changes(saved: ConfigDict, now: ConfigDict) -> list[str]:
    """What differs in a way that a resumed run must not differ: ["adapter.rank: 16 -> 8", ...]."""
    before, after = (flat(ConfigDict(as_json(config))) for config in (saved, now))
    keys = [key for key in after if not key.startswith(FREE_TO_CHANGE)]
    return [f"{key}: {before[key]!r} -> {after[key]!r}" for key in keys if before[key] != after[key]]


def as_json(config: ConfigDict) -> dict[str, Any]:
    """Nested dicts of plain JSON values (tuples become lists)."""
    return json.loads(config.to_json_best_effort())


def write(config: ConfigDict, path: Path) -> None:
    write_text(path, json.dumps(as_json(config), indent=2) + "\n")


def read(path: Path) -> ConfigDict:
    """The config that a run wrote; raises UserError when the file is absent or not one of ours."""
    try:
        given = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is {path.parent} the workdir of a run?") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: not the config of a run")
    config = ConfigDict(given)
    validate(config)
    return config


def _check_type(key: str, value: Any, default: Any) -> None:
    wanted = type(default)
    fits = isinstance(value, int | float) and not isinstance(value, bool) if wanted is float else type(value) is wanted
    if wanted is tuple:
        fits = isinstance(value, tuple | list)
    if not fits:
        raise UserError(f"config.{key}={value!r} is {type(value).__name__}; it must be {wanted.__name__}")
