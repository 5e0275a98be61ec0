"""What is checked before the first step: that the config fits model and mesh, that every process is started alike on
the same files, and that the rows are worth training on."""

import json

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import assemble, distributed, sharding, tree
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.data.audit import checks
from ftjax.data.audit.findings import ERROR
from ftjax.data.batch.loader import Loader
from ftjax.data.read.sources import TASK, read_sources
from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.training.display import Display
from ftjax.tree import Tree
from ftjax.weights.peft import continued


def check_length(config: ConfigDict, spec: DecoderSpec) -> None:
    """That the model has positions for the longest document."""
    positions = spec.max_position_embeddings
    if config.data.max_length > positions:
        raise UserError(
            f"config.data.max_length={config.data.max_length} is more than the model's {positions} positions; lower it"
        )


def check_mesh(config: ConfigDict, spec: DecoderSpec, mesh: Mesh) -> None:
    """That rows, their length and the experts divide by the mesh axes that split them, and offloading has a place."""
    rows, parts = config.data.batch_size // config.accumulate, sharding.row_parts(mesh)
    if rows % parts:
        axes = " x ".join(sharding.RULES["batch"])
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} in {config.accumulate} micro-batch(es) is {rows} rows, "
            f"not a multiple of the mesh's {axes} = {parts}; set it to a multiple of {parts * config.accumulate}"
        )
    if config.data.max_length % mesh.shape["context"]:
        raise UserError(
            f"config.data.max_length={config.data.max_length} is not a multiple of config.mesh.context="
            f"{mesh.shape['context']}, over which rows are split; set it to a multiple"
        )
    if config.model.remat == "offload":
        sharding.check_host_memory(mesh)
    experts = spec.experts
    if mesh.shape["expert"] > 1 and (experts is None or experts.count % mesh.shape["expert"]):
        has = "no experts" if experts is None else f"{experts.count} experts"
        raise UserError(
            f"config.mesh.expert={mesh.shape['expert']}: {config.model.source} has {has} to split; "
            "set it to 1 (mesh.data and mesh.fsdp split rows as well) or to a divisor"
        )


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


def check_same_everywhere(config: ConfigDict, base: Base, train: Loader, heldout: Loader | None) -> None:
    """UserError where this process was not started as the first one was, or reads other files."""
    if distributed.count() == 1:
        return
    ours = configs.flat(ConfigDict(configs.as_json(config)))
    facts = {
        "training data, or tokenizer": train.fingerprint(),
        "evaluation data": heldout and heldout.fingerprint(),
        "model weights (config.model.source)": assemble.base_facts(config, base).digest,
        "adapter (config.adapter.source)": continued.digest(config),
    }
    theirs, others = json.loads(distributed.tell(json.dumps([ours, facts]), limit=distributed.LOADING_SECONDS))
    if other := [f"{key}: {ours[key]!r}, there {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]:
        raise UserError(
            f"process {distributed.index()} was started with another config than process 0:\n  " + "\n  ".join(other)
        )
    if other := [name for name in facts if facts[name] != others[name]]:
        raise UserError(
            f"process {distributed.index()} has other {', '.join(other)} than process 0; give every host the same files"
        )


def check_rows(config: ConfigDict, base: Base, train: Loader, heldout: Loader | None, display: Display) -> None:
    """Says what the checks of the rows find; errors end the run here, unless config.data.checks is "warn" or "off"."""
    if config.data.checks == "off":
        return
    tasks = [entry for entry in configs.sources(config, "eval") if entry["source"].startswith(TASK)]
    evaluated = [read_sources([{"split": "test", **entry} for entry in tasks])] if tasks else []
    if heldout is not None:
        evaluated.append(checks.RowsOf(heldout.examples))
    facts = checks.TokenFacts.of(base.tokenizer, base.end_tokens, config.data.max_length, base.known_rows)
    findings = checks.at_start(train.examples, evaluated, facts)
    errors = [str(finding) for finding in findings if finding.severity == ERROR]
    stops = bool(errors) and config.data.checks == "on"
    for finding in findings:
        if finding.severity != ERROR or not stops:
            display.say(str(finding))
    if stops:
        raise UserError(
            "\n  ".join(["the rows have errors", *errors])
            + "\npython -m ftjax.inspect_data with the same --config shows them; config.data.checks=warn starts anyway"
        )
