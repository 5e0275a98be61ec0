"""What is checked before the first step: that no setting is idle, that the config fits model and mesh, that every
process is started alike on the same files, and that the rows are worth training on."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import config_flag, distributed, sharding, tree
from ftjax.assemble import Base
from ftjax.data.audit import checks
from ftjax.data.audit.findings import ERROR
from ftjax.data.batch.loader import Loader
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens import tokenizer as tokenizers
from ftjax.data.tokens.kinds import ROW_KINDS
from ftjax.errors import UserError
from ftjax.evals.entries import likely_entries, split_entries
from ftjax.method import METHODS, learning_rate, method_of, ptx_rows
from ftjax.models.groups import stacks
from ftjax.models.spec import DecoderSpec
from ftjax.objectives.preference import compares_pairs
from ftjax.objectives.unpaired import imbalance
from ftjax.training import optim
from ftjax.training.display import Display
from ftjax.tree import Tree


def check_used(config: ConfigDict) -> None:
    """UserError for a setting that does nothing beside the others.

    For what is about to begin: a run that began before this was checked may go on with such settings.
    """
    given, defaults = (configs.flat(ConfigDict(configs.as_json(of))) for of in (config, configs.defaults()))
    changed = {key: value for key, value in given.items() if value != defaults[key]}
    for keys, unused, why in _unused(config):
        for key in keys:
            if unused and key in changed:
                raise UserError(
                    f"config.{key}={changed[key]!r} does nothing with {why}; leave it out, or set "
                    f"{config_flag.spelled(key, configs.KEYS[key].default)}"
                )
    _check_vision(config)
    if config.objective.kl_coef and method_of(config).rows == "conversation" and not configs.replays(config):
        raise UserError(
            f"config.objective.kl_coef={config.objective.kl_coef} does nothing without rows that are replayed; add a "
            "source of general data to config.data.train, such as {'source': 'general.jsonl', 'replay': 0.2}"
        )
    if config.optimizer.ema_decay and config.objective.name == "reward":
        raise UserError(
            f"config.optimizer.ema_decay={config.optimizer.ema_decay}: the mean and spread that a reward model is "
            "normalized by are those of the weights as they are trained, not of their average; leave it out"
        )
    schedule = config.schedule
    if schedule.warmup_steps and schedule.warmup_ratio and "schedule.warmup_ratio" in changed:
        raise UserError(
            f"config.schedule.warmup_steps={schedule.warmup_steps} and config.schedule.warmup_ratio="
            f"{schedule.warmup_ratio} both say how long the warm-up is; set --config.schedule.warmup_steps=0 or "
            "--config.schedule.warmup_ratio=0"
        )
    if config.optimizer.name == "lion" and not {"optimizer.learning_rate", "optimizer.b2"} <= changed.keys():
        raise UserError(
            "config.optimizer.name='lion': the defaults are AdamW's; set --config.optimizer.b2=0.99, as its paper has, "
            f"and a third to a tenth of AdamW's learning rate, which is {learning_rate(config):g} here, such as "
            f"--config.optimizer.learning_rate={learning_rate(config) / 5:.2g}"
        )


def _check_vision(config: ConfigDict) -> None:
    """UserError where a model that sees images is asked for what only one of text can do here."""
    if not config.model.vision:
        return
    method, name = method_of(config), config.objective.name
    if not ROW_KINDS[method.rows].images or method.source != "files":
        able = ", ".join(
            other for other, its in METHODS.items() if ROW_KINDS[its.rows].images and its.source == "files"
        )
        raise UserError(
            f"config.model.vision: rows of objective.name={name!r} cannot have images; those of {able} can. Choose one "
            "of these, or set --config.model.vision=False to train on text"
        )
    for key in ("model.add_tokens", "model.resize_vocab"):
        if not configs.is_default(config, key):
            raise UserError(f"config.{key} does not go with config.model.vision; leave one of them out")


def _unused(config: ConfigDict) -> list[tuple[list[str], bool, str]]:
    """[(keys, whether they do nothing, what it is that makes them do nothing)]"""
    adapter, optimizer, schedule = config.adapter, config.optimizer, config.schedule
    adapters = [f"adapter.{key}" for key in adapter if key not in ("kind", "source", "trainable")]
    used = {name: set(one.uses) for name, one in optim.OPTIMIZERS.items()}
    others = sorted(set().union(*used.values()) - used[optimizer.name])
    return [
        ([*adapters, "optimizer.loraplus_ratio"], adapter.kind == "none", "adapter.kind='none'"),
        (["adapter.trainable"], adapter.kind != "none", f"adapter.kind={adapter.kind!r}"),
        ([f"optimizer.{key}" for key in others], True, f"optimizer.name={optimizer.name!r}"),
        (
            ["evaluate.samples", "evaluate.temperature"],
            not split_entries(config)[0],
            "no scored entry in config.data.eval",
        ),
        (["objective.kl_target"], not config.objective.kl_coef, "objective.kl_coef=0, of which it is a multiple"),
        (["objective.kl_horizon"], not config.objective.kl_target, "objective.kl_target=0"),
        (["data.ptx_rows", "objective.ptx_coef"], not config.data.ptx, "no source in config.data.ptx"),
        (["data.ptx"], not config.objective.ptx_coef, "objective.ptx_coef=0"),
        (
            ["rollouts.turns"],
            not config.rollouts.environment and not config.rollouts.tools,
            "neither an environment nor tools in config.rollouts, so that nothing answers a turn",
        ),
        (["rollouts.tools"], config.rollouts.turns == 1, "rollouts.turns=1, in which no call has an answer"),
        (["data.share_prefixes"], not config.data.packing, "data.packing=False, as each row is padded by itself"),
        (
            ["data.share_prefixes"],
            method_of(config).source != "files",
            f"objective.name={config.objective.name!r}, whose batches are made while training",
        ),
        (
            ["data.share_prefixes"],
            method_of(config).mismatched(config.objective),
            f"objective.name={config.objective.name!r} and this loss, whose prompts with other completions are whole",
        ),
        (
            ["data.share_prefixes"],
            method_of(config).rows == "classified",
            f"objective.name={config.objective.name!r}, all tokens of whose documents count as trained",
        ),
        (
            ["data.share_prefixes"],
            config.objective.ensemble > 1,
            "objective.ensemble, whose bootstraps know a pair by all its tokens",
        ),
        (["data.max_pixels"], not config.model.vision, "model.vision=False, without which there are no images"),
        (["schedule.decay_ratio"], schedule.name != "wsd", f"schedule.name={schedule.name!r}"),
        (["schedule.final_ratio"], schedule.name == "constant", "schedule.name='constant'"),
    ]


def check_evaluation(config: ConfigDict) -> None:
    """UserError for a setting of what decides that does nothing, in a run that goes on too: it may be set for that."""
    evaluate = config.evaluate
    during = "config.eval_every (steps) or config.eval_epochs says how often"
    for key, why, fix in (
        ("best", not configs.evaluates(config), "nothing is evaluated; set config.data.eval"),
        ("patience", not configs.evaluates(config), "nothing is evaluated; set config.data.eval"),
        ("patience", not (config.eval_every or config.eval_epochs), f"a run is evaluated only at its end; {during}"),
        ("min_delta", not evaluate.patience, "it says what counts as an improvement for config.evaluate.patience"),
    ):
        if evaluate[key] and why:
            raise UserError(f"config.evaluate.{key}={evaluate[key]!r} does nothing: {fix}")
    unscored = [entry["source"] for entry in split_entries(config)[1]]
    if not method_of(config).answered and (unscored or config.data.holdout):
        what = (
            f"config.data.eval: {unscored[0]} has no 'score'" if unscored else "config.data.holdout: rows without one"
        )
        raise UserError(
            f"{what}, and objective.name={config.objective.name!r} has no loss of other answers than the model's own; "
            "evaluate on {'source': ..., 'score': ...}"
        )
    if not method_of(config).generates:
        name = config.objective.name
        if answered := [*split_entries(config)[0], *likely_entries(config)]:
            raise UserError(
                f"config.data.eval: {answered[0]['source']} is about what a model says, and objective.name={name!r} "
                "makes one that gives numbers; give it rows like those of training, which have a loss, and no 'score'"
            )
        if evaluate.general and not configs.is_default(config, "evaluate.general"):
            raise UserError(
                f"config.evaluate.general: objective.name={name!r} makes a model that gives numbers and says nothing; "
                "leave it out"
            )


def check_adapter_tokenizer(config: ConfigDict, base: Base, display: Display) -> None:
    """That the adapter which a run goes on from numbers the tokens as the base does, and says where it renders chats
    in another way. Adapters bring a tokenizer where theirs is not the base's.
    """
    directory = Path(config.adapter.source).expanduser()
    if not config.adapter.source or not (directory / "tokenizer.json").is_file():
        return
    own = tokenizers.load(directory)
    theirs, ours = own.get_vocab(), base.tokenizer.get_vocab()
    if other := sorted(token for token in theirs if theirs[token] != ours.get(token)):
        raise UserError(
            f"config.adapter.source: {directory} has another tokenizer than this run, {other[0]!r} among others; set "
            "--config.model.add_tokens (in the same order) and --config.data.chat_template as they were when it was "
            "trained"
        )
    if own.chat_template != base.tokenizer.chat_template:
        template = config_flag.spelled("data.chat_template", str(directory / "chat_template.jinja"))
        display.say(
            f"warning: {directory} was trained with another chat template; set {template} and --config.data.system as "
            "they were then, unless that is meant"
        )


def check_steps(config: ConfigDict, done: int | None, steps: int) -> None:
    """That there is something to do. done: the steps of a run that goes on, None for a new one."""
    if done is None:
        check_schedule(config, steps)
    elif done > steps:
        raise UserError(
            f"the run has done {done} steps, and config.steps and config.epochs now ask for {steps}; raise them, go "
            "back with --config.checkpoint.resume_step, or choose another --workdir"
        )


def check_schedule(config: ConfigDict, steps: int) -> None:
    """That a run of so many steps has a step after its warm-up, and with wsd one before it falls."""
    schedule = config.schedule
    warmup = optim.warmup_steps(schedule, steps) if schedule.warmup_steps else 0
    falling = optim.decay_steps(schedule, steps) if schedule.name == "wsd" else 0
    if (warmup or falling) and warmup + falling > max(steps - 1, 1):
        raise UserError(
            f"config.schedule: the run has {steps} steps, of which {warmup} warm up"
            + (f" and {falling} (decay_ratio={schedule.decay_ratio}) fall" if falling else "")
            + ", and none is left at the peak; lower --config.schedule.warmup_steps"
            + (" or --config.schedule.decay_ratio" if falling else ", or 0 for --config.schedule.warmup_ratio")
        )


def check_length(config: ConfigDict, spec: DecoderSpec) -> None:
    """That the model has positions for the longest document."""
    positions = spec.max_position_embeddings
    if config.data.max_length > positions:
        raise UserError(
            f"config.data.max_length={config.data.max_length} is more than the model's {positions} positions; set "
            f"--config.data.max_length={positions}, or less"
        )


def check_mesh(config: ConfigDict, spec: DecoderSpec, mesh: Mesh) -> None:
    """That rows, their length and the experts divide by the mesh axes that split them, and offloading has a place.

    What is still open will fit.
    """
    micro, parts = max(config.accumulate, 1), sharding.row_parts(mesh)
    rows = config.data.batch_size // micro
    if rows % parts:
        axes = " x ".join(sharding.RULES["batch"])
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} in {micro} micro-batch(es) is {rows} rows, "
            f"not a multiple of the mesh's {axes} = {parts}; set it to a multiple of {parts * micro}, such as "
            f"--config.data.batch_size={-(-config.data.batch_size // (parts * micro)) * parts * micro}"
        )
    if ptx_rows(config) % (parts * micro):
        raise UserError(
            f"config.data.ptx_rows={ptx_rows(config)} rows in {micro} micro-batch(es) are no multiple of the mesh's "
            f"{' x '.join(sharding.RULES['batch'])} = {parts}; set it to a multiple of {parts * micro}"
        )
    for key in ("max_length", "row_length"):
        if config.data[key] % mesh.shape["context"]:
            raise UserError(
                f"config.data.{key}={config.data[key]} is not a multiple of config.mesh.context="
                f"{mesh.shape['context']}, over which rows are split; set it to a multiple, such as "
                f"--config.data.{key}={-(-config.data[key] // mesh.shape['context']) * mesh.shape['context']}"
            )
    if config.model.remat == "offload":
        sharding.check_host_memory(mesh)
    experts = spec.experts
    if mesh.shape["expert"] > 1 and (experts is None or experts.count % mesh.shape["expert"]):
        has = "no experts" if experts is None else f"{experts.count} experts"
        raise UserError(
            f"config.mesh.expert={mesh.shape['expert']}: {config.model.source} has {has} to split; "
            "set --config.mesh.expert=1 (mesh.data and mesh.fsdp split rows as well) or a divisor"
        )


def check_sharing(config: ConfigDict, spec: DecoderSpec, mesh: Mesh) -> None:
    """UserError where documents would not be what they are by themselves if they shared what they begin with."""
    if not config.data.share_prefixes:
        return
    longest, routing = config.data.max_length, ("router_balance", "router_z_loss", "router_bias_rate")
    used = [f"config.objective.{key}" for key in routing if config.objective[key]]
    reasons = {
        "carries a memory from token to token": any(stack.spec.carries for stack in stacks(spec)),
        "has attention in chunks": any(spec.layer_chunks),
        f"turns the tokens of long documents otherwise (LongRoPE), as those of config.data.max_length={longest}": any(
            rope.long_after is not None and longest > rope.long_after for rope in spec.ropes
        ),
        "sees images (config.model.vision)": config.model.vision,
        "gets noise by the length of a document (config.model.neftune_alpha)": config.model.neftune_alpha > 0,
        f"counts every token for its experts ({', '.join(used)})": bool(used),
        "splits rows over devices (config.mesh.context)": mesh.shape["context"] > 1,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), ""):
        raise UserError(
            f"config.data.share_prefixes: this run's model {reason}, and so a document is not what it would be in a "
            "row of its own; set --config.data.share_prefixes=False"
        )


def check_whole_step(config: ConfigDict) -> None:
    """UserError where the objective compares the pairs of a step with each other and micro-batches keep them apart."""
    if method_of(config).pairs and (name := compares_pairs(config.objective)) and config.accumulate > 1:
        raise UserError(
            f"config.objective.loss: {name!r} compares all pairs of a step with each other, which "
            f"{config.accumulate} micro-batches keep apart; set config.accumulate=1, and config.data.batch_size lower "
            "if the memory asks for it"
        )


def check_partners(train: Loader, steps: int) -> None:
    """UserError where one of so many batches has one prompt only, so that no completion can meet another."""
    if not train.mismatched or (documents := train.without_partner(steps)) is None:
        return
    origin, count = train.examples.origin(int(documents[0])), len(documents)
    if (train.prompts.numbers == train.prompts.numbers[0]).all():
        raise UserError(f"{origin}: all rows have this prompt, and kto needs answers to several; add rows with others")
    what = f"all {count} answers of its batch are to this prompt"
    if count == 1:
        what = f"it is alone in its batch of {train.batch_size} row(s)"
    raise UserError(
        f"{origin}: {what}, and kto estimates a KL divergence from prompts with the answers to other ones of the same "
        f"step; raise config.data.batch_size (such as --config.data.batch_size={max(4, 2 * train.batch_size)}), or use "
        "the loss without, --config.objective.loss=apo_zero_unpaired"
    )


def check_balance(config: ConfigDict, train: Loader, display: Display) -> None:
    """Says so where good and bad answers should be weighed otherwise."""
    if "desirable_weight" not in method_of(config).settings:
        return
    weights, good = np.asarray(train.examples.weights)[train.examples.source_ids], train.examples.first_labels > 0
    if found := imbalance(config.objective, weights[good].sum(), weights[~good].sum()):
        display.say(f"warning: {found}")


def check_ranks(adapters: Tree, display: Display) -> None:
    """Says which of the abstract `adapters` have a rank above the width of their layer: no mistake, but a waste."""
    wide = {}
    for module, parts in tree.by_module(adapters).items():
        rank, width = parts["lora_a"].shape[-1], min(parts["lora_a"].shape[-2], parts["lora_b"].shape[-1])
        if rank > width:
            wide[module.rpartition("/")[2]] = f"{module.rpartition('/')[2]} (rank {rank}, width {width})"
    if wide:
        display.say(
            f"warning: the rank is above the width of {', '.join(sorted(wide.values()))}: a product of that width "
            "could be learned as well; config.adapter.rank_pattern gives single layers a lower one"
        )


def check_same_everywhere(
    config: ConfigDict, contents: Mapping[str, str], fingerprint: str, heldout: Loader | None
) -> None:
    """UserError where this process was not started as the first one was, or reads other files.

    contents: of base and adapter (`origin.contents`). fingerprint: of the rows of training.
    """
    if distributed.count() == 1:
        return
    ours = configs.flat(ConfigDict(configs.as_json(config)))
    facts = {
        "training data, or tokenizer": fingerprint,
        "evaluation data": heldout and heldout.fingerprint(),
    }
    names = {"adapter": "adapter (config.adapter.source)", "teacher": "teacher (config.objective.teacher)"}
    names |= {part: part for part in contents if part.startswith("config.")}
    facts |= {names.get(part, f"{part} (config.model.source)"): digest for part, digest in contents.items()}
    theirs, others = json.loads(distributed.tell(json.dumps([ours, facts]), limit=distributed.LOADING_SECONDS))
    if other := [f"{key}: {ours[key]!r}, there {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]:
        raise UserError(
            f"process {distributed.index()} was started with another config than process 0:\n  " + "\n  ".join(other)
        )
    if other := [name for name in facts if facts[name] != others[name]]:
        raise UserError(
            f"process {distributed.index()} has other {', '.join(other)} than process 0; give every host the same files"
        )


def check_classes(config: ConfigDict, train: Loader, display: Display) -> None:
    """Says which classes no row has."""
    if method_of(config).rows != "classified":
        return
    seen = {int(label) for part in train.examples.parts for label in np.unique(part.labels)}
    if missing := [name for i, name in enumerate(config.objective.classes) if i not in seen]:
        display.say(
            f"warning: no row of training has the class {', '.join(map(repr, missing))}, which is then never found"
        )


def check_rows(
    config: ConfigDict, base: Base, train: Loader, heldout: Loader | None, display: Display, kind: str = ""
) -> None:
    """Says what the checks of the rows find; errors end the run here, unless config.data.checks is "warn" or "off".

    kind: what a row is, a key of ROW_KINDS, where that is not what the method learns from.
    """
    if config.data.checks == "off":
        return
    entries, _ = split_entries(config)
    evaluated = [read_sources(entries)] if entries else []
    if heldout is not None:
        evaluated.append(checks.RowsOf(heldout.examples))
    answered = ROW_KINDS[kind or method_of(config).rows].answered
    facts = checks.TokenFacts.of(base.tokenizer, base.end_tokens, config.data.max_length, base.known_rows, answered)
    findings = checks.at_start(train.examples, evaluated, facts)
    errors = [str(finding) for finding in findings if finding.severity == ERROR]
    stops = bool(errors) and config.data.checks == "on"
    for finding in findings:
        if finding.severity != ERROR or not stops:
            display.say(str(finding))
    if stops:
        raise UserError(
            "\n  ".join(["the rows have errors", *errors])
            + ("\n" if kind else "\npython -m ftjax.inspect_data with the same --config shows them; ")
            + "--config.data.checks=warn starts anyway"
        )
