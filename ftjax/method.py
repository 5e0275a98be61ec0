"""The methods: what a kind of run is, in one table.

A method says how its objective is made, what a row of it is, and what it needs besides: a reference, a head, further
arrays in a batch, state that it keeps. Data, planner, loader, inspection, evaluation and the loop ask here and know no
method by name.
"""

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax.config_checks import is_endpoint
from ftjax.data.batch.mismatched import MISMATCHED
from ftjax.data.batch.packing import BATCH, CORRECTED, CRITIC, KL, LABELS, PTX, REFERENCE, REPLAY, ROLLOUT
from ftjax.data.tokens.kinds import ROW_KINDS
from ftjax.errors import UserError, did_you_mean
from ftjax.models.decoder import Decoder
from ftjax.models.heads import COLLECTION, VALUE
from ftjax.objectives.classify import make_classify, make_prm
from ftjax.objectives.distillation import make_distillation
from ftjax.objectives.loss import Objective
from ftjax.objectives.policy import make_policy, make_rloo
from ftjax.objectives.ppo import make_ppo, make_ppo_totals
from ftjax.objectives.preference import make_preference, preference_totals
from ftjax.objectives.reward import make_reward
from ftjax.objectives.scores import SCORE
from ftjax.objectives.sft import make_sft
from ftjax.objectives.unpaired import estimates_kl, make_unpaired, make_unpaired_totals
from ftjax.returns import Learned, Round, of_groups, of_sequences, of_tokens
from ftjax.training.state import Kept, earlier_writer, kl_controller, moving_reference, reward_sums, together
from ftjax.tree import Tree


class Method(NamedTuple):
    """What a run of one kind is.

    Attributes:
      objective: (model, config.objective) -> what is minimized.
      rows: what a row of its data is, a key of `data.tokens.kinds.ROW_KINDS`.
      learning_rates: by config.adapter.kind, where optimizer.learning_rate is 0; those of adapters at a width of 4,096.
      epochs: how many there are usually, and at most for few rows, where config.epochs is 0.
      settings: the keys of config.objective that it reads, beside `name`; any other one that is set is refused.
      reference: whether a step compares with the model as it was before training (`objectives.reference`); with
        objective.kl_coef every one does, and with objective.cache_reference it was asked before (`cached_reference`).
      heads: config.objective -> {name: how many numbers it gives}, the heads that it adds (`models.heads`).
      critic: whether its heads only help in training: what it made is loaded and exported without them.
      generates: whether what it trains is to generate. Without, only heads count: those of the vocabulary are neither
        computed nor trained, and no answers are evaluated.
      batch: the arrays [rows, length] of its batches, beside the labels of rows that have some.
      mismatched: config.objective -> whether batches have prompts with completions of other rows, too
        (`data.batch.mismatched`).
      totals: (model, config.objective) -> the function (variables, batch) -> sums that the objective needs of a whole
        step, or evaluation, first (`make_step`); None where this config needs none.
      credit: (config.objective, `returns.Round`, the coefficient of the KL divergence now) -> what is learned of
        completions that it wrote; None where it writes none.
      kl_in_reward: whether objective.kl_coef is of a penalty in the reward, and not of one in the loss.
      kept: what it keeps from step to step beside the weights, such as a controller or a moving average.
      source: where its batches come from, a key of `sources.SOURCES`.
    """

    objective: Callable[[Decoder, ConfigDict], Objective]
    rows: str
    learning_rates: Mapping[str, float]
    epochs: tuple[float, float] = (1.0, 3.0)
    settings: tuple[str, ...] = ()
    reference: bool = False
    heads: Callable[[ConfigDict], Mapping[str, int]] = lambda config: {}
    critic: bool = False
    generates: bool = True
    batch: Mapping[str, type[np.generic]] = types.MappingProxyType(BATCH)
    mismatched: Callable[[ConfigDict], bool] = lambda config: False
    totals: Callable[[Decoder, ConfigDict], Callable[[Tree, dict], Tree] | None] | None = None
    kept: Kept | None = None
    credit: Callable[[ConfigDict, Round, float], Learned] | None = None
    kl_in_reward: bool = False
    source: str = "files"

    @property
    def rollouts(self) -> bool:
        """Whether the model writes what it learns from, or some of it, as config.rollouts says."""
        return self.source in _WRITING

    @property
    def rollout_settings(self) -> tuple[str, ...]:
        """The keys of config.rollouts that it reads."""
        keys = _WRITING.get(self.source, ())
        # Completions with equal rewards teach nothing only where they are compared with each other alone.
        alone = self.credit in (of_groups, of_sequences)
        left_out = {"resample": not alone, "learned": self.credit is not of_groups}
        return tuple(key for key in keys if not left_out.get(key))

    @property
    def answered(self) -> bool:
        """Whether its rows hold what is learned from, so that rows that are held out have a loss."""
        return ROW_KINDS[self.rows].answered

    @property
    def pairs(self) -> bool:
        """Whether the documents of its batches are pairs, of rows or of what the model writes."""
        return self.rows == "pair" or self.source == "pairs"

    @property
    def distills(self) -> bool:
        """Whether it learns from another model, which stands beside the one that learns."""
        return "teacher" in self.settings


_WRITTEN = ("max_new_tokens", "stop_strings", "temperature", "top_k", "top_p", "min_p", "batch_size")
_REWARDED = (*_WRITTEN, "samples", "iterations", "ahead")
_EPISODES = ("turns", "environment", "tools")
_CORRECTED = ("correction", "correction_min", "correction_max")
# The keys of config.rollouts that a source reads; any other one that is set is refused.
_WRITING = {
    "distillation": _WRITTEN,
    "rollouts": (*_REWARDED, "resample", "learned", *_EPISODES),
    "pairs": _REWARDED,
    "best": _REWARDED,
}


_PAIRS = Method(
    make_preference,
    rows="pair",
    learning_rates={"lora": 1e-5, "dora": 1e-5, "none": 1e-6},
    epochs=(1.0, 3.0),  # Rafailov et al. 2023; Zephyr (Tunstall et al. 2023), where more made it worse
    totals=lambda model, config: preference_totals,
)

METHODS = {
    "sft": Method(
        make_sft,
        rows="conversation",
        learning_rates={"lora": 2e-4, "dora": 2e-4, "none": 2e-5},
        epochs=(3.0, 15.0),  # Alpaca's 52,000 rows (Taori et al. 2023), LIMA's 1,000 (Zhou et al. 2023)
        settings=("label_smoothing", "z_loss", "kl_coef", "router_balance", "router_z_loss", "router_bias_rate"),
    ),
    "dpo": _PAIRS._replace(
        objective=functools.partial(make_preference, usual=(("sigmoid", 1.0),)),
        settings=(
            *("beta", "loss", "label_smoothing", "divergence", "divergence_alpha", "discopop_tau", "ld_alpha"),
            *("weighting", "reference_every", "reference_share", "cache_reference"),
        ),
        reference=True,
    ),
    "kto": Method(
        make_unpaired,
        rows="labeled",
        learning_rates={"lora": 1e-5, "dora": 1e-5, "none": 1e-6},
        epochs=(1.0, 3.0),
        settings=("beta", "loss", "desirable_weight", "undesirable_weight", "reference_every", "reference_share"),
        reference=True,
        mismatched=estimates_kl,
        totals=make_unpaired_totals,
    ),
    "cpo": _PAIRS._replace(
        objective=functools.partial(make_preference, usual=(("sigmoid", 1.0), ("sft", 1.0)), reference=False),
        settings=("beta", "loss", "label_smoothing", "ld_alpha", "gamma"),
    ),
    "simpo": _PAIRS._replace(
        objective=functools.partial(make_preference, usual=(("simpo", 1.0),), reference=False),
        settings=("beta", "gamma", "label_smoothing"),
    ),
    "orpo": _PAIRS._replace(
        objective=functools.partial(make_preference, usual=(("sft", 1.0), ("odds_ratio", 1.0)), reference=False),
        settings=("beta",),
    ),
    "reward": Method(
        make_reward,
        rows="ranked",
        learning_rates={"lora": 1e-4, "dora": 1e-4, "none": 1e-4},  # TRL's
        epochs=(1.0, 3.0),  # more overfits (Stiennon et al. 2020, appendix B.1; Touvron et al. 2023, section 3.2.2)
        settings=("center_coef", "ensemble", "label_noise"),
        heads=lambda config: {SCORE: config.ensemble},
        generates=False,
        kept=reward_sums(),
    ),
    "prm": Method(
        make_prm,
        rows="stepwise",
        learning_rates={"lora": 1e-4, "dora": 1e-4, "none": 1e-5},  # TRL's, and for adapters ten times it, as elsewhere
        epochs=(1.0, 3.0),
        settings=("step_separator",),
        heads=lambda config: {SCORE: 2},
        generates=False,
    ),
    "classify": Method(
        make_classify,
        rows="classified",
        learning_rates={"lora": 2e-4, "dora": 2e-4, "none": 2e-5},
        epochs=(3.0, 15.0),  # three is usual (Devlin et al. 2019, appendix A.3)
        settings=("classes",),
        heads=lambda config: {SCORE: len(config.classes)},
        generates=False,
    ),
    "grpo": Method(
        make_policy,
        rows="prompt",
        learning_rates={"lora": 1e-5, "dora": 1e-5, "none": 1e-6},  # TRL's, and for adapters ten times it, as elsewhere
        epochs=(1.0, 1.0),
        settings=(
            *("loss", "epsilon", "epsilon_high", "importance", "kl_coef"),
            *("sapo_temperature_pos", "sapo_temperature_neg", "rewards", "scale_rewards", "mask_truncated"),
            *_CORRECTED,
        ),
        batch=types.MappingProxyType(BATCH | ROLLOUT),
        credit=of_groups,
        source="rollouts",
    ),
    "rloo": Method(
        make_rloo,
        rows="prompt",
        learning_rates={"lora": 1e-5, "dora": 1e-5, "none": 1e-6},  # TRL's, and for adapters ten times it, as elsewhere
        epochs=(1.0, 1.0),
        settings=(
            *("epsilon", "epsilon_high", "kl_coef", "rewards", "mask_truncated", "missing_eos_penalty", "baseline"),
            *_CORRECTED,
        ),
        batch=types.MappingProxyType(BATCH | ROLLOUT),
        credit=of_sequences,
        kl_in_reward=True,
        source="rollouts",
    ),
    "ppo": Method(
        make_ppo,
        rows="prompt",
        learning_rates={"lora": 1e-5, "dora": 1e-5, "none": 1e-6},  # of grpo
        epochs=(1.0, 1.0),
        settings=(
            *("epsilon", "epsilon_high", "kl_coef", "rewards", "missing_eos_penalty", "kl_estimator", "kl_target"),
            *("kl_horizon", "discount", "gae_lambda", "vf_coef", "value_clip", "ptx_coef", *_CORRECTED),
        ),
        heads=lambda config: {VALUE: 1},
        critic=True,
        reference=True,  # for objective/kl, which is to be seen where nothing holds it, too
        batch=types.MappingProxyType(BATCH | ROLLOUT | CRITIC),
        totals=make_ppo_totals,
        credit=of_tokens,
        kl_in_reward=True,
        source="rollouts",
    ),
    "online_dpo": _PAIRS._replace(
        objective=functools.partial(make_preference, usual=(("sigmoid", 1.0),), sampled=True),
        rows="prompt",
        epochs=(1.0, 1.0),
        settings=(
            *("beta", "loss", "label_smoothing", "divergence", "divergence_alpha", "discopop_tau", "ld_alpha"),
            *("weighting", "reference_every", "reference_share", "rewards", "missing_eos_penalty"),
            *("judge", "judge_model", "judge_key"),
        ),
        reference=True,
        source="pairs",
    ),
    "rejection": Method(
        make_sft,
        rows="prompt",
        learning_rates={"lora": 2e-4, "dora": 2e-4, "none": 2e-5},
        epochs=(1.0, 1.0),
        settings=("label_smoothing", "z_loss", "rewards", "missing_eos_penalty", "least_reward"),
        source="best",
    ),
    "gkd": Method(
        make_distillation,
        rows="conversation",
        learning_rates={"lora": 2e-4, "dora": 2e-4, "none": 2e-5},  # as sft, of which it is TRL's, too
        epochs=(1.0, 3.0),
        settings=("teacher", "teacher_adapter", "distill_beta", "distill_temperature", "student_share"),
        source="distillation",
    ),
}


def method_of(config: ConfigDict) -> Method:
    """The method that config.objective.name names.

    Raises:
      UserError: there is none of that name; or a key of config.objective, or of config.data, is set that it has no use
        for.
    """
    name = config.objective.name
    if name not in METHODS:
        raise UserError(f"config.objective.name={name!r} is no method{did_you_mean(name, METHODS)}")
    method = METHODS[name]
    unused = [f"objective.{key}" for key in config.objective if key not in ("name", *method.settings)]
    if method.rows != "conversation" and not config.data.ptx:
        unused += ["data.train_on", "data.long_text"]
    if "ptx_coef" not in method.settings:
        unused += ["data.ptx", "data.ptx_rows"]
    unused += [f"rollouts.{key}" for key in config.rollouts if key not in method.rollout_settings]
    unused = [key for key in unused if not configs.is_default(config, key)]
    if unused:
        users = [other for other, its in METHODS.items() if unused[0].removeprefix("objective.") in its.settings]
        section, _, key = unused[0].partition(".")
        users += [o for o, its in METHODS.items() if section == "rollouts" and key in its.rollout_settings]
        users += [other for other, its in METHODS.items() if "data.ptx" in unused[0] and "ptx_coef" in its.settings]
        hint = f" (of {', '.join(users)})" if users else ""
        raise UserError(f"config.{unused[0]}: objective.name={name!r} does not use it{hint}; leave it at its default")
    if method.rows != "conversation" and configs.replays(config):
        raise UserError(
            f"config.data.train: the option 'replay' is for conversations and texts, which {name!r} does not learn "
            "from; mix rows by 'weight'"
        )
    if every := config.objective.reference_every:
        method = method._replace(kept=moving_reference(every, config.objective.reference_share))
    elif not configs.is_default(config, "objective.reference_share"):
        raise UserError("config.objective.reference_share is of a reference that moves; set objective.reference_every")
    if "classes" in method.settings and not config.objective.classes:
        raise UserError("config.objective.classes: name the classes of the rows' labels, such as ('spam', 'other')")
    if method.distills:
        _check_distills(config)
    if "judge" in method.settings:
        _check_judge(config)
    to_others = "baseline" in method.settings and config.objective.baseline == "others"
    compares = "scale_rewards" in method.settings or to_others or method.source == "pairs"
    if compares and config.rollouts.samples < 2:
        raise UserError(
            f"config.rollouts.samples={config.rollouts.samples}: objective.name={name!r} compares completions "
            "of the same prompt; set it to 2 or more"
        )
    if method.source == "rollouts":
        for key in ("adapter.dropout", "model.neftune_alpha"):
            if not configs.is_default(config, key):
                raise UserError(
                    f"config.{key}: objective.name={name!r} compares how likely what the model wrote is in training "
                    "and was in writing, and noise in training would be all the difference; leave it out"
                )
        if config.rollouts.learned and not 2 <= config.rollouts.learned <= config.rollouts.samples:
            raise UserError(
                f"config.rollouts.learned={config.rollouts.learned}: of config.rollouts.samples="
                f"{config.rollouts.samples} completions of a prompt 2 or more are compared; set it to 2 to "
                f"{config.rollouts.samples}, or to 0 for all"
            )
        _check_correction(config, method)
        _check_resample(config, method)
        longest = config.rollouts.max_new_tokens * config.rollouts.turns
        how = {"temperature": config.rollouts.temperature, "max_new_tokens": longest}
        method = method._replace(objective=functools.partial(method.objective, **how))
    if config.objective.kl_target:
        settings, every = config.objective, config.rollouts.iterations
        method = method._replace(kept=kl_controller(settings.kl_coef, settings.kl_target, settings.kl_horizon, every))
    if config.rollouts.ahead:
        method = method._replace(kept=together(method.kept, earlier_writer(config.rollouts.iterations)))
    if config.objective.ensemble > 1:
        method = method._replace(objective=functools.partial(method.objective, seed=config.seed))
    batch = dict(method.batch) | (LABELS if ROW_KINDS[method.rows].labeled else {})
    batch |= REPLAY if configs.replays(config) else {}
    batch |= MISMATCHED if method.mismatched(config.objective) else {}
    batch |= KL if config.objective.kl_target else {}
    batch |= PTX if config.data.ptx else {}
    batch |= CORRECTED if config.objective.correction != "none" else {}
    cached = config.objective.cache_reference
    batch |= REFERENCE if cached else {}
    reference = (method.reference and not cached) or config.objective.kl_coef > 0
    return method._replace(reference=reference, batch=batch)


def _check_resample(config: ConfigDict, method: Method) -> None:
    """Of completions with equal rewards the advantages must be 0, so that nothing is lost with them."""
    for key, value in (("kl_coef", 0.0), ("baseline", "others")):
        if config.rollouts.resample and method.credit is of_sequences and config.objective[key] != value:
            raise UserError(
                f"config.rollouts.resample: with config.objective.{key}={config.objective[key]!r} completions of "
                f"{config.objective.name!r} that are rewarded alike teach something, too, and would be replaced; set "
                f"objective.{key} to {value!r}, or leave resample out"
            )


def _check_correction(config: ConfigDict, method: Method) -> None:
    objective = config.objective
    bounds = [key for key in ("correction_min", "correction_max") if not configs.is_default(config, f"objective.{key}")]
    if objective.correction == "none" and bounds:
        raise UserError(
            f"config.objective.{bounds[0]} bounds what corrects for the weights that wrote; set objective.correction"
        )
    if objective.correction_min > objective.correction_max:
        raise UserError(
            f"config.objective.correction_min={objective.correction_min:g} is above config.objective.correction_max="
            f"{objective.correction_max:g}; lower it"
        )
    if objective.correction.startswith("token") and method.credit is of_sequences:
        raise UserError(
            f"config.objective.correction={objective.correction!r}: objective.name={objective.name!r} has one ratio of "
            f"a whole completion; use sequence_{objective.correction.removeprefix('token_')}"
        )


def lasting(method: Method, variables: Tree) -> Tree:
    """`variables` without heads that only helped in training."""
    return {name: part for name, part in variables.items() if name != COLLECTION or not method.critic}


def _check_judge(config: ConfigDict) -> None:
    objective, behind_url = config.objective, is_endpoint(config.objective.judge)
    if objective.judge and objective.rewards:
        raise UserError(
            f"config.objective.judge={objective.judge}: the judge alone says what is better; leave objective.rewards "
            "out"
        )
    if behind_url and not objective.judge_model:
        raise UserError(f"config.objective.judge_model: name the model that {objective.judge} is to ask")
    for key in ("judge_model", "judge_key"):
        if not behind_url and not configs.is_default(config, f"objective.{key}"):
            raise UserError(
                f"config.objective.{key} is of a judge behind an endpoint; set objective.judge to its URL, such as "
                "https://HOST/v1"
            )


def _check_distills(config: ConfigDict) -> None:
    if not config.objective.teacher:
        raise UserError(
            "config.objective.teacher: name the model to learn from, as config.model.source names the one that learns"
        )
    given = [f"rollouts.{key}" for key in config.rollouts if not configs.is_default(config, f"rollouts.{key}")]
    if given and not config.objective.student_share:
        raise UserError(
            f"config.{given[0]}: with config.objective.student_share=0 the model writes nothing; leave it at its "
            "default"
        )


def holds_reference_in_vain(config: ConfigDict) -> bool:
    """Whether full fine-tuning holds a second model that objective.cache_reference would make needless."""
    objective, settings = config.objective, METHODS[config.objective.name].settings
    possible = "cache_reference" in settings and objective.ld_alpha == 1 and not objective.reference_every
    held = config.adapter.kind == "none" and not objective.cache_reference and not config.optimizer.l2_sp
    return held and possible


def samples(config: ConfigDict) -> int:
    """How many rows of a batch are made of one row of the data: 1, or completions of a prompt that are learned from."""
    each = config.rollouts.learned or config.rollouts.samples
    return each if METHODS[config.objective.name].source == "rollouts" else 1


def ptx_rows(config: ConfigDict) -> int:
    """How many rows of data.ptx a step has beside config.data.batch_size completions."""
    return (config.data.ptx_rows or config.data.batch_size) if config.data.ptx else 0


def iterations(config: ConfigDict) -> int:
    """How many steps are made on the same rows, one after the other."""
    writes = "iterations" in METHODS[config.objective.name].rollout_settings
    return config.rollouts.iterations if writes else 1


def learning_rate(config: ConfigDict) -> float:
    """The peak learning rate: config.optimizer.learning_rate, or where that is 0 the method's own for its adapters."""
    return config.optimizer.learning_rate or method_of(config).learning_rates[config.adapter.kind]


def idle(config: ConfigDict, paths: Iterable[str]) -> set[str]:
    """Those of the parameters `paths` that the method does not use: of a model that does not generate the head."""
    return set() if method_of(config).generates else {path for path in paths if path.startswith("lm_head/")}


def check_generates(config: ConfigDict, *_: object) -> None:
    """UserError for a run of a method that does not make a model which generates; as `check` of `assemble.load_run`."""
    if not method_of(config).generates:
        raise UserError(
            f"objective.name={config.objective.name!r} made a model that gives numbers and does not generate, so there "
            "are no answers of this run; name one of another method"
        )
