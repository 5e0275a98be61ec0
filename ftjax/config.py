"""The config: every key with its default and its check. A run's file changes some of them (see configs/)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ftjax.atomic import write_text
from ftjax.errors import UserError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


class Check(NamedTuple):
    """What a value must be."""

    holds: Callable[[Any], Any]
    wanted: str


class Key(NamedTuple):
    """A key of the config. Its type is that of the default."""

    default: Any
    check: Check


def one_of(*values: str) -> Check:
    return Check(lambda value: value in values, f"one of {', '.join(values)}")


def number(low: float, high: float = math.inf) -> Check:
    wanted = f"a number from {low:g} to {high:g}" if high < math.inf else f"a finite number, {low:g} or more"
    return Check(lambda value: math.isfinite(value) and low <= value <= high, wanted)


def pairs(kind: type) -> Check:
    def holds(value: Any) -> bool:
        entries = [entry for entry in value if isinstance(entry, tuple | list) and len(entry) == 2]
        fits = [type(pattern) is str and type(number) in (int, kind) and number > 0 for pattern, number in entries]
        return len(entries) == len(value) and all(fits)

    return Check(holds, f"pairs of a regular expression and a positive {kind.__name__}, such as (('self_attn', 8),)")


def tokens() -> Check:
    def holds(value: Any) -> bool:
        plain = all(type(token) is str and token and token == token.strip() for token in value)
        return plain and len(set(value)) == len(value)

    return Check(holds, "different tokens without white space around them, such as ('<|call|>',)")


ANY = Check(lambda value: True, "anything")

# Every key with its default and its check, in the order of the sections of a config.
KEYS: dict[str, Key] = {
    "model.source": Key("", Check(bool, "a Hugging Face id, a directory, a .gguf file or package:NAME")),
    # Tokens to add to the tokenizer; rows of embedding and head are added for them and trained (docs/models.md).
    "model.add_tokens": Key((), tokens()),
    # Add rows for tokens that are in the tokenizer but not in the embedding, and train them.
    "model.resize_vocab": Key(False, ANY),
    "model.dtype": Key("bfloat16", one_of(*DTYPES)),  # of activations and matrix products
    "model.param_dtype": Key("bfloat16", one_of(*DTYPES)),  # of the stored base
    # What the backward pass recomputes (docs/devices.md).
    "model.remat": Key("none", one_of("none", "full", "dots", "offload")),
    # auto: the fastest that serves the model here.
    "model.attention": Key("auto", one_of("auto", "splash", "cudnn", "xla")),
    # none: train the parameters that `trainable` selects.
    "adapter.kind": Key("lora", one_of("lora", "dora", "none")),
    # A PEFT adapter directory to go on from; ranks, alphas and targets are then its own.
    "adapter.source": Key("", ANY),
    "adapter.rank": Key(16, number(1)),
    "adapter.alpha": Key(32.0, number(1e-6)),
    # Other ranks, by path: (("self_attn", 8), ("down_proj", 32)); the last one counts.
    "adapter.rank_pattern": Key((), pairs(int)),
    "adapter.alpha_pattern": Key((), pairs(float)),  # alphas, likewise
    "adapter.rslora": Key(False, ANY),  # scale alpha / sqrt(rank) instead of alpha / rank
    "adapter.dropout": Key(0.0, number(0, 0.99)),  # of the adapters' inputs, in training
    # default: the adapted model starts as the base.
    "adapter.init": Key("default", one_of("default", "pissa")),
    "adapter.targets": Key("all-linear", ANY),  # or names, "q_proj,embed_tokens", or a regular expression
    "adapter.modules_to_save": Key((), ANY),  # modules to train whole beside the adapters: ("lm_head", "norm")
    "adapter.trainable": Key(".*", ANY),  # with kind none: a regular expression over parameter paths
    # How the frozen kernels are stored beside adapters.
    "quantize.base": Key("none", one_of("none", "int8", "nf4")),
    # Sources: "rows.jsonl", "tfds:NAME", "task:NAME", or {"source": ..., "split": ...}.
    "data.train": Key((), Check(len, "at least one source, such as ('rows.jsonl',) or ('task:support_ticket',)")),
    "data.eval": Key((), ANY),
    # Tokens of a document, where it is cut: a conversation, or each answer of a pair with its prompt.
    "data.max_length": Key(1024, number(2)),
    "data.packing": Key(True, ANY),  # several examples to a row, none seeing another
    "data.batch_size": Key(16, number(1)),  # rows in a step, over all devices and micro-batches
    # assistant: every assistant turn; last: the last one; all: every turn.
    "data.train_on": Key("assistant", one_of("assistant", "last", "all")),
    # Instead of the model's own, if it has one: alpaca, chatml, gemma, llama3, mistral, zephyr, or a Jinja file.
    "data.chat_template": Key("", ANY),
    "data.system": Key("", ANY),  # a system prompt for conversations that have none
    # Share of the training rows kept for evaluation instead, chosen by a hash of the prompt.
    "data.holdout": Key(0.0, number(0, 0.5)),
    # Of the rows before training; on: stop on errors, warn: print them.
    "data.checks": Key("on", one_of("on", "warn", "off")),
    "data.max_bad_rows": Key(0, number(0)),  # malformed rows to skip (and count) before giving up
    "objective.name": Key("sft", ANY),  # a method of ftjax/method.py: sft or dpo
    "objective.beta": Key(0.1, number(1e-6)),  # dpo: how strongly the reference holds the policy
    "optimizer.name": Key("adamw", one_of("adamw")),
    # 0: the method's own, such as 2e-4 for LoRA and 2e-5 for full fine-tuning with sft.
    "optimizer.learning_rate": Key(0.0, number(0)),
    "optimizer.b1": Key(0.9, number(0, 1)),
    "optimizer.b2": Key(0.999, number(0, 1)),
    "optimizer.eps": Key(1e-8, number(0)),
    "optimizer.weight_decay": Key(0.0, number(0)),
    "optimizer.clip_norm": Key(1.0, number(0)),  # global gradient norm; 0 turns clipping off
    # LoRA+: how much larger the learning rate of lora_b is; 16 is usual
    "optimizer.loraplus_ratio": Key(1.0, number(1e-3)),
    "schedule.name": Key("cosine", one_of("cosine", "linear", "constant")),  # cosine, linear or constant
    "schedule.warmup_ratio": Key(0.03, number(0, 1)),  # of all steps
    "schedule.final_ratio": Key(0.0, number(0, 1)),  # of the peak learning rate, at the end
    "mesh.data": Key(1, ANY),
    "mesh.fsdp": Key(-1, ANY),  # -1: what the other axes leave
    "mesh.tensor": Key(1, ANY),
    "mesh.context": Key(1, ANY),  # the length of a row, split: for long sequences
    "mesh.expert": Key(1, ANY),  # the experts of a mixture
    "evaluate.max_new_tokens": Key(128, number(1)),
    "evaluate.batch_size": Key(64, number(1)),  # prompts completed together
    "evaluate.before": Key(True, ANY),  # also before the first step
    "checkpoint.keep": Key(2, number(1)),  # the newest so many, and the best
    # Go back to this step once, setting later ones aside; -1: the newest.
    "checkpoint.resume_step": Key(-1, number(-1)),
    "steps": Key(0, number(0)),  # 0: as many as `epochs` needs
    "epochs": Key(1.0, number(1e-9)),
    "accumulate": Key(1, number(1)),  # micro-batches in a step
    "seed": Key(0, number(0, 2**31 - 1)),
    "log_every": Key(10, number(1)),
    "eval_every": Key(0, number(0)),  # steps; 0: only at the end
    "checkpoint_every": Key(100, number(1)),
}


def defaults() -> ConfigDict:
    """All keys with their defaults, locked: a misspelled key is refused where it is set."""
    config = ConfigDict()
    for name, key in KEYS.items():
        section, _, leaf = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[leaf] = key.default
    return config.lock()


ENTRY_OPTIONS = {
    "source": Check(lambda value: isinstance(value, str), "a string"),
    "format": Check(lambda value: isinstance(value, str), "a string"),
    "split": Check(lambda value: isinstance(value, str), "a string"),
    "weight": Check(lambda value: type(value) in (int, float) and 0 < value < math.inf, "a positive, finite number"),
    "limit": Check(lambda value: type(value) is int and value > 0, "a positive whole number"),
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
    given = flat(config)
    for key in given.keys() - KEYS.keys():
        raise UserError(f"config has no key {key!r}{did_you_mean(key, KEYS)}")
    if missing := sorted(KEYS.keys() - given.keys()):
        raise UserError(f"config lacks {', '.join(missing)}; build it from ftjax.config.defaults()")
    for key, (default, _) in KEYS.items():
        _check_type(key, given[key], default)
    for key, (_, check) in KEYS.items():
        if (data or key != "data.train") and not check.holds(given[key]):
            raise UserError(f"config.{key}={given[key]!r}: it must be {check.wanted}")
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
        check = ENTRY_OPTIONS[name]
        if not check.holds(value):
            raise UserError(f"config.{key}: {name!r} of entry {dict(entry)} must be {check.wanted}")
    return dict(entry)


def sources(config: ConfigDict, which: str) -> list[dict[str, Any]]:
    """The entries of data.train or data.eval, `which`, each as `source_entry` gives it."""
    return [source_entry(entry, f"data.{which}") for entry in config.data[which]]


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
    """The config that a run wrote; raises UserError when the file is absent or not one of ours.

    A key that is younger than the run has its default, which is what the run did.
    """
    try:
        given = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is {path.parent} the workdir of a run?") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: not the config of a run")
    config = ConfigDict(given)
    for name, key in KEYS.items():
        section, _, leaf = name.rpartition(".")
        values = config.get(section) if section else config
        if isinstance(values, ConfigDict) and leaf not in values:
            values[leaf] = key.default
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def _check_type(key: str, value: Any, default: Any) -> None:
    wanted = type(default)
    fits = isinstance(value, int | float) and not isinstance(value, bool) if wanted is float else type(value) is wanted
    if wanted is tuple:
        fits = isinstance(value, tuple | list)
    if not fits:
        raise UserError(f"config.{key}={value!r} is {type(value).__name__}; it must be {wanted.__name__}")
