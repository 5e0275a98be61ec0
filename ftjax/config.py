"""The config: every key with its default and its check. A run's file changes some of them (see configs/)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ftjax import foreign
from ftjax.atomic import write_text
from ftjax.config_checks import (
    ANY,
    LAYERS,
    Check,
    all_named,
    check_replay,
    check_together,
    check_type,
    losses,
    named,
    names,
    number,
    one_of,
    pairs,
    rewards,
    some_of,
    source_entry,
    tokens,
)
from ftjax.errors import UserError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")
SHIPPED = "general"  # as a source of config.evaluate.general: the texts that come with this package
REWARD = "reward"  # a score of an entry in data.eval is reward:PATH, of the reward model there
GRADER = "grader"  # or grader:FILE, of what the file describes


class Key(NamedTuple):
    """A key of the config. Its type is that of the default."""

    default: Any
    check: Check


# Every key with its default and its check, in the order of the sections of a config.
KEYS: dict[str, Key] = {
    "model.source": Key("", Check(bool, "a Hugging Face id, a directory, a .gguf file or package:NAME")),
    # Of a Hugging Face id: a commit, tag or branch; "": the main branch. The run keeps to the commit that it was then.
    "model.revision": Key("", ANY),
    # Tokens to add to the tokenizer; rows of embedding and head are added for them and trained (docs/models.md).
    "model.add_tokens": Key((), tokens()),
    # Add rows for tokens that are in the tokenizer but not in the embedding, and train them.
    "model.resize_vocab": Key(False, ANY),
    # Of activations and matrix products; auto: float32 on CPUs, which are slow in bfloat16, and bfloat16 elsewhere.
    "model.dtype": Key("auto", one_of("auto", *DTYPES)),
    "model.param_dtype": Key("auto", one_of("auto", *DTYPES)),  # of the stored base; auto: as model.dtype
    # What the backward pass recomputes (docs/devices.md); auto: nothing where that fits.
    "model.remat": Key("auto", one_of("auto", "none", "full", "offload")),
    # auto: the fastest that serves the model here.
    "model.attention": Key("auto", one_of("auto", "splash", "cudnn", "onednn", "xla")),
    # What multiplies with kernels. onednn: on one CPU, with values rounded to bfloat16 where it has instructions for
    # that; auto: onednn where it is to be had (docs/devices.md).
    "model.matmul": Key("xla", one_of("xla", "onednn", "auto")),
    # Read the vision tower of a multimodal model too, so that rows may have images (docs/images.md).
    "model.vision": Key(False, ANY),
    # NEFTune: noise on the embeddings in training, 5 is usual; 0: none.
    "model.neftune_alpha": Key(0.0, number(0)),
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
    # The layers whose targets are adapted, counted from 0: "0-7,20"; all without.
    "adapter.layers": Key("", LAYERS),
    "adapter.modules_to_save": Key((), ANY),  # modules to train whole beside the adapters: ("lm_head", "norm")
    "adapter.trainable": Key(".*", ANY),  # with kind none: a regular expression over parameter paths
    # How the frozen kernels are stored beside adapters.
    "quantize.base": Key("none", one_of("none", "int8", "nf4")),
    # Sources: "rows.jsonl", "tfds:NAME", "task:NAME", or {"source": ..., "split": ...}.
    "data.train": Key((), Check(len, "at least one source, such as ('rows.jsonl',) or ('task:support_ticket',)")),
    "data.eval": Key((), ANY),
    "data.ptx": Key((), ANY),  # ppo: conversations and texts that a step learns from as well, see objective.ptx_coef
    "data.ptx_rows": Key(0, number(0)),  # rows of them in a step; 0: as many as completions
    # Tokens of a document, where it is cut: a conversation, or each answer of a pair with its prompt.
    "data.max_length": Key(1024, number(2)),
    # What becomes of a longer `text`. divide: it goes on in further documents; cut: its rest is left out.
    "data.long_text": Key("divide", one_of("divide", "cut")),
    "data.packing": Key(True, ANY),  # several examples to a row, none seeing another
    # What the documents of a row begin with alike, a system message or the prompt of a pair, is there only once: fewer
    # tokens for the same gradients (docs/data.md).
    "data.share_prefixes": Key(False, ANY),
    # Of the order of the rows; -1: config.seed, which is that of fresh adapters, dropout and noise, too.
    "data.seed": Key(-1, number(-1, 2**31 - 1)),
    # Rows in a step, over all devices and micro-batches; 0: chosen for the data (docs/data.md).
    "data.batch_size": Key(0, number(0)),
    # Tokens of a row; 0: chosen with the batch, or where that is given as many as the longest example may have.
    "data.row_length": Key(0, number(0)),
    # With model.vision: the most pixels of an image, which is made smaller where it has more; 0: the model's own.
    "data.max_pixels": Key(0, number(0)),
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
    # A method of ftjax/method.py: sft; dpo, kto, cpo, simpo, orpo; reward, prm, classify; grpo, rloo, ppo, online_dpo,
    # rejection; gkd
    "objective.name": Key("sft", ANY),
    # sft: the share of a target's probability that is spread over the vocabulary; of pairs: of labels taken to be wrong
    "objective.label_smoothing": Key(0.0, number(0, 0.99)),
    # sft: so much of log(Z)^2 is added, Z being the sum of a softmax; 1e-4 is usual
    "objective.z_loss": Key(0.0, number(0)),
    # sft of mixtures: so much of the loss that evens out the experts' load is added (0.001 to 0.01 is usual), of the
    # routers' own log(Z)^2 (1e-3), and how far a step moves the corrections by which experts are chosen (1e-3)
    "objective.router_balance": Key(0.0, number(0)),
    "objective.router_z_loss": Key(0.0, number(0)),
    "objective.router_bias_rate": Key(0.0, number(0)),
    # sft: so much of KL(the model before training || now) is what a token of a replayed source counts, instead of its
    # cross-entropy; 0: its cross-entropy, as any other's. grpo: so much of KL(now || before) is added to the loss at
    # each token. rloo, ppo: so much of it is subtracted from the reward
    "objective.kl_coef": Key(0.0, number(0)),
    # of preferences: how strongly the reference holds the policy; the scale of a margin where there is none
    "objective.beta": Key(0.1, number(1e-6)),
    # dpo, cpo, kto: losses, by name or with their weights: ("sigmoid", ("sft", 0.2)); (): the method's own
    "objective.loss": Key((), losses()),
    # kto: what a good and a bad answer count; docs/methods.md says how to weigh them where one side is larger
    "objective.desirable_weight": Key(1.0, number(0)),
    "objective.undesirable_weight": Key(1.0, number(0)),
    # dpo: the divergence that holds the policy
    "objective.divergence": Key("reverse_kl", one_of("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")),
    "objective.divergence_alpha": Key(0.5, number(0)),  # alpha_divergence: its alpha
    "objective.discopop_tau": Key(0.05, number(1e-6)),  # the loss discopop: its temperature
    "objective.ld_alpha": Key(1.0, number(0, 1)),  # what tokens beyond the shorter answer's length count; 1: all alike
    # dpo: what a pair counts; wpo: more, the likelier the policy writes its answers
    "objective.weighting": Key("none", one_of("none", "wpo")),
    # dpo, kto: steps after which the reference follows the policy (TR-DPO), by that share of the way; 0: it stays
    "objective.reference_every": Key(0, number(0)),
    "objective.reference_share": Key(0.6, number(1e-6, 1)),
    # dpo: ask the reference of all pairs before the first step, once for all runs over the same base and rows
    "objective.cache_reference": Key(False, ANY),
    "objective.gamma": Key(0.5, number(0)),  # the loss simpo: the margin that is aimed at
    # reward: so much of (r_chosen + r_rejected)^2 is added, which holds rewards around 0; 0.01 is usual
    "objective.center_coef": Key(0.0, number(0)),
    # reward: heads on the one model, each trained on its own bootstrap of the pairs; where they disagree, it is unsure
    "objective.ensemble": Key(1, number(1)),
    "objective.classes": Key((), names()),  # classify: of the labels of its rows, in the order of their logits
    # prm: what stands between the steps of an answer
    "objective.step_separator": Key("\n", Check(bool, "text, such as a line break")),
    "objective.label_noise": Key(0.0, number(0, 0.99)),  # reward: the share of labels that are given at random
    # grpo, rloo, ppo: what is rewarded, scores as of data.eval, with weights: ("score", ("reward:runs/rm", 0.5));
    # (): a task's own
    "objective.rewards": Key((), rewards()),
    # online_dpo, instead: a model that says which of two completions is better, here or behind an endpoint's URL; there
    # its name, and the environment variable with the key
    "objective.judge": Key("", ANY),
    "objective.judge_model": Key("", ANY),
    "objective.judge_key": Key("OPENAI_API_KEY", ANY),
    # grpo: how the rewards of a prompt's completions become advantages: less their mean, over the standard deviation of
    # these (group), of the whole batch (batch), or over nothing (none)
    "objective.scale_rewards": Key("group", one_of("group", "batch", "none")),
    # grpo, rloo, ppo: how far the ratio of probabilities may be from 1 below, and above (0: as below)
    "objective.epsilon": Key(0.2, number(0, 1)),
    "objective.epsilon_high": Key(0.0, number(0)),
    # grpo: whose ratio that is: of each token, or of the whole completion (GSPO)
    "objective.importance": Key("token", one_of("token", "sequence")),
    # grpo, rloo, ppo: what a token counts, by how likely it is before a round and was when it was drawn
    "objective.correction": Key(
        "none", one_of("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
    "objective.correction_min": Key(0.0, number(0)),  # what bounds that ratio, see docs/reinforcement.md
    "objective.correction_max": Key(3.0, number(1e-6)),
    # grpo: how fast the loss sapo closes its gate, for completions better than others and for worse ones
    "objective.sapo_temperature_pos": Key(1.0, number(1e-6)),
    "objective.sapo_temperature_neg": Key(1.05, number(1e-6)),
    # grpo, rloo: completions that reach rollouts.max_new_tokens teach nothing
    "objective.mask_truncated": Key(False, ANY),
    # rloo, ppo, online_dpo, rejection: what such a completion loses of its reward
    "objective.missing_eos_penalty": Key(0.0, number(0)),
    # rloo: what a reward is compared with, the mean of the others to the same prompt or of the whole batch
    "objective.baseline": Key("others", one_of("others", "batch")),
    # ppo: the estimate of KL(now || before) that is subtracted (Schulman 2020)
    "objective.kl_estimator": Key("k1", one_of("k1", "k2", "k3")),
    # ppo: kl_coef follows this KL of a completion, in about so many completions; 0: it stays
    "objective.kl_target": Key(0.0, number(0)),
    "objective.kl_horizon": Key(10000.0, number(1)),
    "objective.discount": Key(1.0, number(0, 1)),  # ppo: gamma and lambda of advantages
    "objective.gae_lambda": Key(0.95, number(0, 1)),
    "objective.ptx_coef": Key(0.0, number(0)),  # ppo: what the mean cross-entropy of a token of data.ptx counts
    "objective.vf_coef": Key(0.1, number(0)),  # ppo: what the loss of the values counts
    "objective.value_clip": Key(0.2, number(1e-6)),  # ppo: how far values may go from those of the round
    "objective.least_reward": Key(-1e9, number(-1e9)),  # rejection: of a completion that is learned from
    "objective.teacher": Key("", ANY),  # gkd: the model that is learned from, named as model.source is
    "objective.teacher_adapter": Key("", ANY),  # a PEFT adapter directory that it is used with
    "objective.distill_beta": Key(0.5, number(0, 1)),  # gkd: from 0, KL(teacher || now), to 1, KL(now || teacher)
    "objective.distill_temperature": Key(1.0, number(0.01)),  # gkd: of both models where they are compared
    "objective.student_share": Key(0.5, number(0, 1)),  # gkd: of steps that learn from what the model itself writes
    # What the model writes in training, with a method that lets it.
    "rollouts.samples": Key(8, number(1)),  # completions of a prompt; data.batch_size counts those learned from
    # Of a completion, or of one turn of an episode; data.max_length is for all of it and its prompt.
    "rollouts.max_new_tokens": Key(256, number(1)),
    # grpo, rloo, ppo: turns that the model writes at most to a prompt, and what answers them in between: an environment
    # of one's own, "my_game:Guess", and functions that the model may call, ("my_tools:add",) (docs/reinforcement.md)
    "rollouts.turns": Key(1, number(1)),
    "rollouts.environment": Key("", named()),
    "rollouts.tools": Key((), all_named()),
    "rollouts.stop_strings": Key((), ANY),  # texts; a completion ends where it first has one, which it keeps
    "rollouts.temperature": Key(1.0, number(0.01)),
    "rollouts.top_k": Key(0, number(0)),  # with the next two: filters, without which the loss compares probabilities
    "rollouts.top_p": Key(1.0, number(1e-6, 1)),
    "rollouts.min_p": Key(0.0, number(0, 0.999999)),
    "rollouts.batch_size": Key(64, number(1)),  # completions written together
    "rollouts.iterations": Key(1, number(1)),  # steps on the same completions
    "rollouts.ahead": Key(0, number(0, 1)),  # rounds between the weights that write and those that learn at first
    "rollouts.learned": Key(0, number(0)),  # grpo: of the completions of a prompt, those that differ most; 0: all
    # grpo, rloo: how often at most other prompts are written to replace those whose completions have equal rewards
    "rollouts.resample": Key(0, number(0)),
    "optimizer.name": Key("adamw", one_of("adamw", "adafactor", "lion", "muon")),
    # 0: the method's own for the width of the model, such as 2e-4 for LoRA and 2e-5 for full fine-tuning with sft.
    "optimizer.learning_rate": Key(0.0, number(0)),
    "optimizer.b1": Key(0.9, number(0, 1)),
    "optimizer.b2": Key(0.999, number(0, 1)),
    "optimizer.eps": Key(1e-8, number(0)),
    "optimizer.weight_decay": Key(0.0, number(0)),
    # L2-SP: a decay towards the values that training starts from, where weight decay is one towards zero
    "optimizer.l2_sp": Key(0.0, number(0)),
    "optimizer.clip_norm": Key(1.0, number(0)),  # global gradient norm; 0 turns clipping off
    # LoRA+: how much larger the learning rate of lora_b is; 16 is usual
    "optimizer.loraplus_ratio": Key(1.0, number(1e-3)),
    # Other learning rates, as factors, by path: (("lora_b", 4.0), ("embed_tokens", 0.1)); the last one counts.
    "optimizer.groups": Key((), pairs(float)),
    # Of the first moment; the second is always float32.
    "optimizer.momentum_dtype": Key("float32", one_of("float32", "bfloat16")),
    # Moving average of what is trained, which is then what is evaluated and exported; 0: none.
    "optimizer.ema_decay": Key(0.0, number(0, 0.999999)),
    # constant with a warm-up is elsewhere called constant_with_warmup; wsd: warm up, stable, decay
    "schedule.name": Key("cosine", one_of("cosine", "linear", "constant", "wsd")),
    "schedule.warmup_ratio": Key(0.03, number(0, 1)),  # of all steps
    "schedule.warmup_steps": Key(0, number(0)),  # 0: by warmup_ratio
    "schedule.decay_ratio": Key(0.2, number(0, 1)),  # wsd: the share of all steps in which it falls, at the end
    "schedule.final_ratio": Key(0.0, number(0, 1)),  # of the peak learning rate, at the end
    "mesh.data": Key(1, ANY),
    "mesh.fsdp": Key(-1, ANY),  # -1: what the other axes leave
    "mesh.tensor": Key(1, ANY),
    "mesh.context": Key(1, ANY),  # the length of a row, split: for long sequences
    "mesh.expert": Key(1, ANY),  # the experts of a mixture
    "evaluate.max_new_tokens": Key(128, number(1)),
    "evaluate.batch_size": Key(64, number(1)),  # prompts completed together
    # Answers to each prompt; more than one are drawn at evaluate.temperature and have a pass@k.
    "evaluate.samples": Key(1, number(1)),
    "evaluate.temperature": Key(0.0, number(0)),  # of answers that are scored; 0: the likeliest tokens
    "evaluate.run_code": Key(False, ANY),  # whether the score `python` may run what the model writes
    "evaluate.before": Key(True, ANY),  # also before the first step
    # What decides which checkpoint is best: "eval_loss", "eval_NAME/score - 0.5 * eval_general/change", after "min:" or
    # "max:" where that is not plain; "": the first task's score, else eval_loss.
    "evaluate.best": Key("", ANY),
    "evaluate.patience": Key(0, number(0)),  # evaluations without improvement of it that end the run; 0: none do
    "evaluate.min_delta": Key(0.0, number(0)),  # what counts as an improvement: more than this
    # Text on which to see what a run forgets (docs/forgetting.md): "general", which ships, or sources; (): none.
    "evaluate.general": Key((SHIPPED,), ANY),
    "evaluate.general_tokens": Key(1280, number(128)),  # of it, at each evaluation
    "checkpoint.keep": Key(2, number(1)),  # the newest so many, and the best
    # Go back to this step once, setting later ones aside; -1: the newest.
    "checkpoint.resume_step": Key(-1, number(-1)),
    "steps": Key(0, number(0)),  # 0: as many as `epochs` needs
    "epochs": Key(0.0, number(0)),  # 0: the method's own, such as 3 for sft; more where there are few rows
    "accumulate": Key(0, number(0)),  # micro-batches in a step; 0: as few as fit the memory
    "seed": Key(0, number(0, 2**31 - 1)),
    "log_every": Key(10, number(1)),
    # What gets the metrics beside metrics.jsonl and TensorBoard (docs/running.md): ("wandb",)
    "trackers": Key((), some_of("wandb", "mlflow", "trackio")),
    "eval_every": Key(0, number(0)),  # steps; 0: only at the end
    "eval_epochs": Key(0.0, number(0)),  # instead, in epochs: 0.5 is twice in each
    "checkpoint_every": Key(100, number(1)),
    # What the result is meant for: peft, merged, hf, gguf; what an export would refuse is refused before step 1.
    "export_formats": Key((), some_of("peft", "merged", "hf", "gguf")),
    # Hours after which the run saves and ends with status 75, in time for what a scheduler allows; 0: no limit.
    "max_hours": Key(0.0, number(0)),
}


# What a run chooses where these keys have their defaults (`ftjax.choices`). Its config.json has what was chosen.
OPEN = (
    "model.dtype",
    "model.param_dtype",
    "model.remat",
    "data.batch_size",
    "data.row_length",
    "optimizer.learning_rate",
    "epochs",
    "accumulate",
)


def defaults(keys: Mapping[str, Key] = KEYS) -> ConfigDict:
    """All keys with their defaults, locked: a misspelled key is refused where it is set.

    keys: of a run; another table of them is of something else that has a config, such as the server.
    """
    config = ConfigDict()
    for name, key in keys.items():
        section, _, leaf = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[leaf] = key.default
    return config.lock()


# Where a run finds its base, an adapter to go on from, its rows and its teacher. Digests say whether they are still the
# same (origin.py, Loader.fingerprint), so they may be found elsewhere when it is resumed.
PLACES = (
    *("model.source", "model.revision", "adapter.source", "data.train", "data.ptx"),
    *("objective.teacher", "objective.teacher_adapter"),
)

# What a run did that is older than a key, where that is not the key's default.
BEFORE = {"data.long_text": "cut", "evaluate.general": ()}


def flat(config: ConfigDict) -> dict[str, Any]:
    """{dotted key: value} of all leaves."""
    out = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            out |= {f"{name}.{key}": leaf for key, leaf in flat(value).items()}
        else:
            out[name] = value
    return out


def unknown_key(name: str, keys: Mapping[str, Key] = KEYS) -> str:
    """The message about a key that there is none of; it names the one that is meant where that can be known."""
    leaf = name.rpartition(".")[2]
    same = [key for key in keys if key.rpartition(".")[2] == leaf]
    if same and leaf == name:
        return f"config has no key {name!r}; did you mean {' or '.join(map(repr, same))}?"
    theirs = None if same or keys is not KEYS else foreign.find(leaf)
    if theirs is None:
        sections = {key.partition(".")[0] for key in keys}
        return f"config has no key {name!r}{did_you_mean(name, same if len(same) == 1 else sections | keys.keys())}"
    if not theirs.key:
        return f"config has no key {name!r}: {theirs.note}"
    return f"config has no key {name!r}; did you mean {theirs.key!r}?" + (f" ({theirs.note})" if theirs.note else "")


def assign(config: ConfigDict, key: str, value: Any, keys: Mapping[str, Key] = KEYS) -> None:
    """Sets one key, given by its dotted name; UserError where there is none of that name, or for another type."""
    if key not in keys:
        raise UserError(unknown_key(key, keys))
    check_type(key, value, keys[key].default)
    section, _, leaf = key.rpartition(".")
    holder = config.get(section) if section else config
    if holder is None or leaf not in holder:
        raise UserError(f"config lacks {key}; build it from ftjax.config.defaults()")
    holder[leaf] = type(keys[key].default)(value)


def check_values(config: ConfigDict, keys: Mapping[str, Key] = KEYS, but: Sequence[str] = ()) -> dict[str, Any]:
    """The values by their dotted keys; UserError for unknown, missing and mistyped keys, and values that may not be.

    but: keys that may have any value.
    """
    given = flat(config)
    for key in given.keys() - keys.keys():
        raise UserError(unknown_key(key, keys))
    if missing := sorted(keys.keys() - given.keys()):
        raise UserError(f"config lacks {', '.join(missing)}; build it from ftjax.config.defaults()")
    for key, (default, _) in keys.items():
        check_type(key, given[key], default)
    for key, (_, check) in keys.items():
        if key not in but and not check.holds(given[key]):
            raise UserError(f"config.{key}={given[key]!r}: it must be {check.wanted}")
    return given


def validate(config: ConfigDict, data: bool = True) -> None:
    """Raises UserError naming the key, its value and what it may be; also for unknown, missing and mistyped keys.

    data: False does without data.train, which a plan does not need.
    """
    given = check_values(config, but=() if data else ("data.train",))
    check_together(given)
    for which in ("train", "eval", "ptx"):
        for entry in sources(config, which):
            if which == "eval" and entry["source"].startswith(("tfds:", "hf:")) and "split" not in entry:
                raise UserError(f"config.data.eval: say which split of {entry['source']}, as {{'source', 'split'}}")
    general_sources(config)
    check_replay({which: sources(config, which) for which in ("train", "eval", "ptx")})
    evaluated = [json.dumps(entry, sort_keys=True) for entry in sources(config, "eval")]
    if twice := sorted({entry for entry in evaluated if evaluated.count(entry) > 1}):
        raise UserError(f"config.data.eval: {twice[0]} stands there twice")


def evaluates(config: ConfigDict) -> bool:
    """Whether there is something to evaluate on."""
    return bool(config.data.eval) or config.data.holdout > 0


def replays(config: ConfigDict) -> bool:
    """Whether a source of data.train is replayed: general data, against forgetting."""
    return any("replay" in entry for entry in sources(config, "train"))


def sources(config: ConfigDict, which: str) -> list[dict[str, Any]]:
    """The entries of data.train, data.eval or data.ptx, `which`, each as `source_entry` gives it."""
    return [source_entry(entry, f"data.{which}") for entry in config.data[which]]


def general_sources(config: ConfigDict) -> list[dict[str, Any]]:
    """The entries of evaluate.general, likewise; [] where nothing is evaluated at all."""
    entries = [source_entry(entry, "evaluate.general") for entry in config.evaluate.general]
    return entries if evaluates(config) else []


def with_recorded(config: ConfigDict, recorded: ConfigDict) -> ConfigDict:
    """`config` where what it leaves open is what a run has, which goes on with what it chose when it began."""
    given, chosen = flat(config), flat(recorded)
    return changed(config, {key: chosen[key] for key in OPEN if given[key] == KEYS[key].default})


def is_default(config: ConfigDict, key: str) -> bool:
    """Whether a key, by its dotted name, has its default; a list, as JSON has it, is a tuple here."""
    section, _, leaf = key.rpartition(".")
    value = (config[section] if section else config)[leaf]
    return json.dumps(value) == json.dumps(KEYS[key].default)


def changed(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """A copy of `config` with other values, {dotted key: value}."""
    out = config.copy_and_resolve_references()
    out.update_from_flattened_dict(values)
    return out


def as_json(config: ConfigDict) -> dict[str, Any]:
    """Nested dicts of plain JSON values (tuples become lists)."""
    return json.loads(config.to_json_best_effort())


def write(config: ConfigDict, path: Path) -> None:
    write_text(path, json.dumps(as_json(config), indent=2) + "\n")


def read(path: Path) -> ConfigDict:
    """The config that a run wrote; raises UserError when the file is absent or not one of ours.

    A key that is younger than the run has the value of BEFORE, or its default: what the run did.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
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
            values[leaf] = BEFORE.get(name, key.default)
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config
