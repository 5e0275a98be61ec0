"""From config sections to the objects that the command lines share: the base model, its variables, and the program of a
run: everything of it but the data."""

import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from ftjax import config as configs
from ftjax import distributed, environments, interpolation, lora, origin, pictures, quant, sharding, tree
from ftjax.data.images.rules import ImageRules
from ftjax.data.pipeline import DataSpec
from ftjax.data.tokens import templates
from ftjax.data.tokens import tokenizer as tokenizers
from ftjax.data.tokens.kinds import Settings
from ftjax.errors import UserError
from ftjax.method import Method, idle, lasting, learning_rate, method_of, ptx_rows, samples
from ftjax.models import onednn, params
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.groups import stack_of
from ftjax.models.heads import COLLECTION, SCORE, abstract_heads, init_heads
from ftjax.models.routing import is_correction
from ftjax.models.spec import DecoderSpec
from ftjax.objectives import balance
from ftjax.objectives.loss import Objective
from ftjax.objectives.reference import TEACHER, frozen_with_reference
from ftjax.training import optim
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.state import AVERAGE, Kept, TrainState, abstract_state, with_average
from ftjax.training.step import Batch, Metrics, make_step
from ftjax.tree import Tree
from ftjax.weights import load as weights
from ftjax.weights.gguf.read import GGUFReader, hub_id
from ftjax.weights.hf.keys import hf_names
from ftjax.weights.peft import begun_heads, continued
from ftjax.weights.peft.adapter import BaseFacts, StoredAdapter, base_digest, embedding_rows
from ftjax.weights.resized import ResizedReader, original
from ftjax.weights.source import Reader, locate, open_source

log = logging.getLogger(__name__)

NEW_TOKENS = frozenset({"embed_tokens/embedding", "lm_head/kernel"})  # what has a row for each token


class Base(NamedTuple):
    """A pretrained model that is described but not yet read."""

    source: str  # as the user named it
    path: Path
    reader: Reader  # its weights on disk, and its Hugging Face config
    model: Decoder
    tokenizer: PreTrainedTokenizerFast
    end_tokens: tuple[int, ...]  # generation stops at any of them
    known_rows: int | None = None  # of the embedding in the files; tokens beyond them are new ones
    images: ImageRules | None = None  # how it takes images, if it does


def open_base(
    config: ConfigDict, data: ConfigDict | None = None, adapter: Path | None = None, weights: bool = True
) -> Base:
    """Finds and describes `config.source`, with the tokens that `config` adds; reads headers and the tokenizer only.

    data: config.data, whose template and system prompt the tokenizer gets. None: the model's own template.
    adapter: a PEFT directory that is to be used with it, whose tokenizer and number of tokens count, where it has them.
    weights: False is for looking at it without them: of a Hugging Face id they are not downloaded, and `reader` has no
    tensors.
    """
    path = locate(config.source, config.revision, weights)
    reader = open_source(path, weights)
    known_rows = spec_from_config(reader.config).vocab_size
    if adapter is not None and (rows := embedding_rows(adapter)) > known_rows:
        reader, known_rows = ResizedReader(reader, rows), rows
    has_tokenizer = adapter is not None and (adapter / "tokenizer.json").is_file()
    tokenizer = tokenizers.load(adapter if has_tokenizer else path)
    template, system = (data.chat_template, data.system) if data is not None else ("", "")
    tokenizers.prepare(tokenizer, template, system, config.add_tokens)
    reader = _with_rows(config, reader, tokenizer, known_rows)
    spec = spec_from_config(reader.config, config.vision)
    images = pictures.rules(reader, data.max_pixels if data is not None else 0) if config.vision else None
    dtypes = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
    remat = "none" if config.remat == "auto" else config.remat  # for training, which chooses when it knows its batch
    shares = data is not None and data.share_prefixes
    model = Decoder(spec, *dtypes, remat, config.attention, config.neftune_alpha, config.matmul, shares)
    ends = tokenizers.end_tokens(tokenizer, reader.config)
    return Base(config.source, path, reader, model, tokenizer, ends, known_rows, images)


def _with_rows(config: ConfigDict, reader: Reader, tokenizer: PreTrainedTokenizerFast, known: int) -> Reader:
    """The reader with rows for every token, where config.model asks for them."""
    needed = tokenizers.rows_needed(tokenizer)
    if config.resize_vocab and not config.add_tokens and needed <= known:
        raise UserError(
            f"config.model.resize_vocab: the embedding has {known} rows, enough for the {needed} ids of the tokenizer; "
            "leave it out (config.adapter.modules_to_save=('embed_tokens',) trains the rows that are there)"
        )
    if needed > known and _has_new_tokens(config):
        return ResizedReader(reader, needed)
    tokenizers.check_vocab(tokenizer, known)
    return reader


def _has_new_tokens(config: ConfigDict) -> bool:
    """Whether `config`, config.model, has tokens whose rows are still to be learned."""
    return bool(config.add_tokens) or config.resize_vocab


def new_token_paths(config: ConfigDict, paths: Iterable[str]) -> set[str]:
    """Those of the parameters `paths` that are trained whole because they hold the rows of new tokens."""
    return (NEW_TOKENS & set(paths)) - idle(config, paths) if _has_new_tokens(config.model) else set()


class Program(NamedTuple):
    """A run before anything of it is loaded or compiled: functions, shapes and shardings. Train, planner and load share
    it.

    Attributes:
      model, mesh: what it is for.
      variables: all collections, ShapeDtypeStructs; is_trained: which of their paths training changes.
      trained_count: how many parameters it changes, without zeros that only fill stacks of adapters up.
      frozen: those that it does not, with the reference where the method needs one beside them.
      kept: what the method keeps, and the average of what is trained where config.optimizer.ema_decay asks for it.
      state, batch: what `step` takes, a batch as [accumulate, batch / accumulate, length].
      totals: those of the method for this model, None where it needs none.
      step: see `training.step.make_step`.
      teacher: the model that is learned from, None where the method has none, or the run is only described.
    """

    model: Decoder
    mesh: Mesh
    method: Method
    objective: Objective
    variables: Tree
    is_trained: Callable[[str], bool]
    trained_count: int
    frozen: Tree
    optimizer: optax.GradientTransformation
    kept: Kept | None
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    totals: Callable[[Tree, Batch], Tree] | None
    step: Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]
    teacher: Decoder | None

    @property
    def row_length(self) -> int:
        return self.batch["tokens"].shape[-1]

    @property
    def tokens(self) -> int:
        """Slots of a batch, over all devices and micro-batches."""
        return math.prod(self.batch["tokens"].shape)


def program(
    config: ConfigDict, model: Decoder, mesh: Mesh, total_steps: int, teacher: Decoder | None = None
) -> Program:
    """The program of `config`, to be made and used under its mesh; teacher: the model to learn from, if there is one.

    Raises:
      UserError: what `method_of` and `abstract_variables` raise.
    """
    method = method_of(config)
    variables, is_trained = abstract_variables(config, model, mesh)
    trainable, frozen = tree.partition(variables, is_trained)
    watched = method.reference or _watches_forgetting(config, trainable)
    if config.optimizer.l2_sp or (watched and not starts_as_base(config, trainable)):
        frozen = frozen_with_reference(frozen, trainable)
    frozen |= {TEACHER: {"params": params.abstract_params(teacher, mesh)}} if teacher else {}
    schedule = optim.make_schedule(learning_rate(config), config.schedule, total_steps)
    balance.check(config.objective, model.spec, tree.flatten(trainable))
    rate, paths = config.objective.router_bias_rate, list(tree.flatten(trainable))
    # For its errors.
    optim.rate_factors(config.optimizer, [path for path in paths if not (rate and is_correction(path))])
    optimizer = optim.make_optimizer(config.optimizer, schedule)
    if rate:
        optimizer = optim.with_corrections(optimizer, rate)
    kept = with_average(method.kept, config.optimizer.ema_decay)
    state = abstract_state(optimizer, trainable, mesh, kept)
    objective = method.objective(model, config.objective, **({"teacher": teacher} if method.distills else {}))
    totals = method.totals and method.totals(model, config.objective)
    step = make_step(objective, optimizer, schedule, state, config.seed, model.dtype, kept, totals)
    rows = (config.data.batch_size + ptx_rows(config)) // config.accumulate
    shape = (config.accumulate, rows, data_spec(config, model.spec).row_length)
    where = sharding.named(mesh, (None, "batch", "length"), shape)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in method.batch.items()}
    batch |= pictures.abstract(model.spec, mesh, shape) if model.spec.vision else {}
    count = _trained_count(config, model.spec, trainable)
    return Program(
        *(model, mesh, method, objective, variables, is_trained, count, frozen, optimizer, kept, state, batch),
        *(totals, step, teacher),
    )


def starts_as_base(config: ConfigDict, trainable: Tree) -> bool:
    """Whether what is trained changes nothing at first: LoRA alone, whose B is zero, and not gone on from."""
    fresh = not config.adapter.source and config.adapter.kind == "lora" and config.adapter.init == "default"
    return fresh and set(trainable) <= {"lora", COLLECTION}


def _watches_forgetting(config: ConfigDict, trainable: Tree) -> bool:
    """Whether evaluations are to compare with the values that adapters had at first; a copy of more would be large."""
    return bool(configs.general_sources(config)) and set(trainable) <= {"lora", COLLECTION}


def data_spec(
    config: ConfigDict, spec: DecoderSpec, mesh: Mesh | None = None, images: ImageRules | None = None
) -> DataSpec:
    """What decides the batches of training, beside the rows and the tokenizer; images: those of `Base`."""
    data = config.data
    return DataSpec(
        kind=method_of(config).rows,
        chosen_length=data.row_length,
        max_length=data.max_length,
        batch_size=data.batch_size // samples(config),
        packing=data.packing and not method_of(config).rollouts,
        train_on=data.train_on,
        vocab_size=spec.vocab_size,
        seed=config.seed if data.seed < 0 else data.seed,
        max_bad_rows=data.max_bad_rows,
        holdout=data.holdout,
        long_text=data.long_text,
        mismatched=method_of(config).mismatched(config.objective),
        shares=data.share_prefixes and data.packing,
        settings=Settings(
            config.objective.step_separator,
            tuple(config.objective.classes),
            config.rollouts.max_new_tokens if method_of(config).rollouts else 0,
            environments.schemas(config),
            images,
        ),
        # Where rows are split, each part has the length that the attention kernels want.
        multiple=128 * mesh.shape["context"] if mesh is not None and mesh.shape["context"] > 1 else 1,
    )


def abstract_variables(config: ConfigDict, model: Decoder, mesh: Mesh) -> tuple[Tree, Callable[[str], bool]]:
    """({"params", "lora"?, "quant"?, "heads"?} as ShapeDtypeStructs with shardings, and which of their paths training
    changes).

    config.adapter and config.quantize decide. What is trained is kept in float32: an update of 1e-5 of a weight is lost
    in bfloat16.
    """
    leaves, axes = tree.flatten(params.abstract_params(model, mesh)), params.logical_axes(model)
    adapter, out = config.adapter, {}
    if adapter.kind == "none":
        if adapter.source:
            raise UserError("config.adapter.source is an adapter to go on from; adapter.kind='none' has none")
        trained = set(tree.matching(adapter.trainable, list(leaves), "adapter.trainable")) - idle(config, leaves)
        if untrained := sorted(new_token_paths(config, leaves) - trained):
            raise UserError(
                f"config.adapter.trainable={adapter.trainable!r} leaves out {', '.join(untrained)}, which must "
                "learn the new tokens of config.model; let it match them too"
            )
        if config.quantize.base != "none":
            raise UserError("config.quantize.base is for a base beside adapters; set config.adapter.kind or drop it")
    else:
        ranks, extras, trained = _adapters(config, model, leaves)
        out["lora"] = lora.abstract_adapters(tree.unflatten(leaves), axes, list(ranks), ranks, mesh, extras)
        if both := sorted(trained & set(ranks)):
            raise UserError(f"config.adapter: {both[0]} is in targets and in modules_to_save; it can have one of them")
    for path in trained:
        leaf = leaves[path]
        leaves[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
    if config.quantize.base != "none":
        if adapter.init == "pissa":
            raise UserError("config.adapter.init=pissa changes the base; it does not go with config.quantize.base")
        kernels = {path: leaves.pop(path).shape for path in lora.quantizable(leaves) if path not in trained}
        out["quant"] = quant.abstract(config.quantize.base, kernels, axes, mesh)
    if heads := method_of(config).heads(config.objective):
        out[COLLECTION] = abstract_heads(heads, model.spec, mesh)
    out["params"] = tree.unflatten(leaves)
    always = (lora.TRAINABLE, re.compile(f"^{COLLECTION}/"))
    return out, lambda path: path.removeprefix("params/") in trained or any(some.match(path) for some in always)


def _adapters(config: ConfigDict, model: Decoder, leaves: dict) -> tuple[dict[str, int], list[str], set[str]]:
    """({path: rank}, the `extras` of lora.abstract_adapters, the paths that are trained whole), of a run with adapters.

    leaves: all parameter paths.
    """
    adapter, stored = config.adapter, continued.stored_adapter(config, model.spec)
    chosen = {"magnitude": adapter.kind == "dora", "dropout": adapter.dropout, "pissa": adapter.init == "pissa"}
    if stored is not None:
        ranks = {continued.path_of(module): stored.rank(module) for module in stored.modules}
        chosen["magnitude"], trained = stored.settings.dora, set(stored.saved)
    else:
        targets = _in_layers(adapter.layers, lora.find_targets(adapter.targets, lora.adaptable(leaves)), model.spec)
        ranks = lora.by_pattern(adapter.rank, adapter.rank_pattern, targets, "adapter.rank_pattern")
        lora.by_pattern(adapter.alpha, adapter.alpha_pattern, targets, "adapter.alpha_pattern")  # for its errors
        trained = _modules_to_save(adapter.modules_to_save, leaves)
    trained |= new_token_paths(config, leaves)
    if vain := sorted(idle(config, {*ranks, *trained})):
        raise UserError(
            f"config.adapter: objective.name={config.objective.name!r} does not use {vain[0].partition('/')[0]}, which "
            "would learn nothing; leave it out of targets and modules_to_save"
        )
    return ranks, [name for name, wanted in chosen.items() if wanted], trained


def _in_layers(layers: str, targets: Sequence[str], spec: DecoderSpec) -> list[str]:
    """The targets of which at least one layer is in `layers`, see lora.layer_numbers."""
    numbers = lora.layer_numbers(layers, spec.num_hidden_layers)
    if layers and (outside := [path for path in targets if stack_of(spec, path) is None]):
        raise UserError(f"adapter.layers={layers!r}: {outside[0]} is in no layer; leave it out of adapter.targets")
    stacks = {path: stack_of(spec, path) for path in targets}
    found = [path for path, stack in stacks.items() if stack is None or numbers.intersection(stack.layers)]
    if not found:
        raise UserError(f"adapter.layers={layers!r}: none of adapter.targets is in these layers")
    return found


def _adapted_layers(config: ConfigDict, spec: DecoderSpec, modules: Iterable[str]) -> dict[str, list[float]]:
    """{module: of each layer of its stack, which share of its adapter's rank is there}, of `modules` in layers."""
    stored, out = continued.stored_adapter(config, spec), {}
    numbers = lora.layer_numbers(config.adapter.layers, spec.num_hidden_layers)
    for module in modules:
        if (stack := stack_of(spec, module)) is None:
            continue
        if stored is not None:
            out[module] = [rank / stored.rank(module) for rank in stored.ranks[module]]
        else:
            out[module] = [float(layer in numbers) for layer in stack.layers]
    return out


def _trained_count(config: ConfigDict, spec: DecoderSpec, trained: Tree) -> int:
    total = tree.count(trained)
    modules = tree.by_module(trained.get("lora", {}))
    for module, shares in _adapted_layers(config, spec, modules).items():
        for name, leaf in modules[module].items():
            of_layer = leaf.size // len(shares)
            present = (bool(share) for share in shares) if name == "lora_magnitude" else shares
            total -= sum(of_layer - round(of_layer * share) for share in present)
    return total


def _modules_to_save(names: Sequence[str], paths: Iterable[str]) -> set[str]:
    paths = lora.of_language_model(paths)
    found = {name: [path for path in paths if path.split("/")[-2] == name] for name in names}
    if missing := [name for name, its in found.items() if not its]:
        known = ", ".join(sorted({path.split("/")[-2] for path in paths}))
        tied = "; the head is tied to embed_tokens here" if "lm_head" in missing else ""
        raise UserError(f"config.adapter.modules_to_save: no module named {missing}; there are {known}{tied}")
    return {path for its in found.values() for path in its}


def load_variables(
    config: ConfigDict, base: Base, abstract: Tree, wanted: Callable[[str], bool] = lambda path: True
) -> Tree:
    """The base's weights, quantized where `abstract` says so, its adapters and heads, each placed by its sharding.

    The adapters are fresh ones, or those of config.adapter.source with what was trained whole beside them.
    wanted: of these paths only; the base's other weights are not even read.
    """
    begun = begun_heads.kernel(config, base.reader, base.model.spec, abstract.get(COLLECTION, {}))
    params = {path: leaf for path, leaf in tree.flatten(abstract["params"]).items() if wanted(f"params/{path}")}
    variables = weights.load_variables(base.reader, base.model.spec, tree.unflatten(params), abstract.get("quant"))
    with distributed.together("reading the weights", limit=distributed.LOADING_SECONDS):
        pass  # some hosts read faster, and what they compute together next waits for none
    if COLLECTION in abstract and any(wanted(f"{COLLECTION}/{path}") for path in tree.flatten(abstract[COLLECTION])):
        variables[COLLECTION] = init_heads(abstract[COLLECTION], config.seed)
        if begun is not None:
            variables[COLLECTION][SCORE]["kernel"] = _placed(begun, abstract[COLLECTION][SCORE]["kernel"])
    if "lora" in abstract:
        variables = _with_adapters(config, base, abstract, variables)
    return tree.partition(variables, wanted)[0]


def _with_adapters(config: ConfigDict, base: Base, abstract: Tree, variables: Tree) -> Tree:
    if (stored := continued.stored_adapter(config, base.model.spec)) is not None:
        return _continued(config, base, abstract, variables, stored)
    adapter, is_part = config.adapter, abstract["lora"]
    modules = [path.removesuffix("/lora_a") for path in tree.flatten(is_part) if path.endswith("/lora_a")]
    paths = [f"{module}/{'embedding' if module.startswith('embed') else 'kernel'}" for module in modules]
    ranks = lora.by_pattern(adapter.rank, adapter.rank_pattern, paths, "adapter.rank_pattern")
    alphas = lora.by_pattern(adapter.alpha, adapter.alpha_pattern, paths, "adapter.alpha_pattern")
    scales = {path: lora.scale(ranks[path], alphas[path], adapter.rslora) for path in paths}
    adapters = lora.init_adapters(is_part, config.seed, scales, adapter.dropout)
    adapters = lora.only_in_layers(adapters, _adapted_layers(config, base.model.spec, modules))
    if adapter.init == "pissa":
        variables["params"], adapters = lora.pissa(variables["params"], adapters)
    if adapter.kind == "dora":
        adapters = lora.with_magnitudes(functools.partial(quant.kernel, variables), adapters)
    return variables | {"lora": adapters}


def _continued(config: ConfigDict, base: Base, abstract: Tree, variables: Tree, stored: StoredAdapter) -> Tree:
    stored.check_base(base_facts(config, base), base.reader)
    adapters, saved = stored.read()
    leaves = tree.flatten(adapters)
    for path, leaf in tree.flatten(abstract["lora"]).items():
        if path.endswith("/lora_dropout"):  # a matter of training: the run's own, not the directory's
            leaves[path] = np.full(leaf.shape, config.adapter.dropout, np.float32)
        leaves[path] = _placed(leaves[path], leaf)
    params = tree.flatten(variables["params"])
    wanted = tree.flatten(abstract["params"])
    params |= {path: _placed(values, wanted[path]) for path, values in saved.items() if path in params}
    return variables | {"params": tree.unflatten(params), "lora": tree.unflatten(leaves)}


def _placed(values: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index].astype(leaf.dtype))


def base_facts(config: ConfigDict, base: Base) -> BaseFacts:
    """What an adapter of this base is told of it."""
    # peft has no packages: it is told the id on the Hub, or else the path.
    name = published(base) or (str(base.path) if base.source.startswith("package:") else base.source)
    digest = base_digest(base.reader, base.model.spec)
    return BaseFacts(name, digest, config.quantize.base, config.model.revision)


def published(base: Base) -> str:
    """The Hugging Face id of the model in a GGUF file, as far as the file says it; "" for all else."""
    return hub_id(reader.metadata) if isinstance(reader := original(base.reader), GGUFReader) else ""


def trained_whole(config: ConfigDict, base: Base) -> set[str]:
    """The paths of the parameters that are trained beside the adapters."""
    leaves = dict.fromkeys(hf_names(base.model.spec))
    return _adapters(config, base.model, leaves)[2]


def load_run(
    workdir: Path,
    step: int | None = None,
    moved: Mapping[str, str] | None = None,
    check: Callable[[ConfigDict, Base, Tree], None] | None = None,
    share: float = 1.0,
) -> tuple[ConfigDict, Base, Tree, int]:
    """A run's (config, base, variables, step) from its checkpoint `step`, by default the newest.

    check: is called with the config, the base and the variables' shapes before any weights are read.
    share: how far to go from the base to what was trained, 1 for all the way (see `interpolation`).

    What was trained, or where the run keeps one its average, comes from the checkpoint, without the optimizer's state,
    and only what was not from the base; beside a head, "kept" is what the method keeps. The mesh is this machine's, not
    the run's. moved: {"model" or "adapter": where it is now}. Raises UserError where `workdir` holds no run or no such
    step, and for another base or adapter than the run began with.
    """
    config = _found(configs.read(workdir / "config.json"), moved or {})
    origin.check_there(config, workdir)
    mesh = sharding.make_mesh({"fsdp": -1})
    matmul, _ = onednn.choose(config.model.matmul, sharding.platform(mesh), mesh.size)  # of these devices
    config = configs.changed(config, {"model.matmul": matmul})
    template = templates.kept(config.data.chat_template, workdir)
    base = open_base(config.model, configs.changed(config, {"data.chat_template": template}).data)
    config = origin.located(config, base.path)
    base = base._replace(source=config.model.source)
    origin.check(config, workdir, origin.contents(config, base.reader, base.model.spec))
    if not origin.is_recorded(workdir):
        log.warning("%s: this run is too old to say whether %s is still its base", workdir, base.source)
    with jax.set_mesh(mesh):
        run = program(config, base.model, mesh, total_steps=1)  # of which the optimizer is not used
        result = lasting(run.method, run.variables)
        if share != 1 and COLLECTION in result:
            raise UserError("--interpolate: this run has a head, which its base has not; there is nothing between them")
        if check is not None:
            check(config, base, result)
        with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
            averaged = AVERAGE in run.state.kept
            kept = {AVERAGE: run.state.result} if averaged else {}
            kept |= run.state.collections.get("kept", {}) if COLLECTION in result else {}
            part = ({} if averaged else {"trainable": run.state.result}) | ({"kept": kept} if kept else {})
            step, state, _ = checkpoints.restore(part, step, partial=True)
        kept = dict(state.get("kept", {}))
        trained = lasting(run.method, kept.pop(AVERAGE) if averaged else state["trainable"])
        frozen = load_variables(config, base, run.variables, lambda path: not run.is_trained(path))
        variables = tree.combine(trained, frozen) | ({"kept": kept} if kept else {})
        return config, base, variables if share == 1 else _interpolated(base, run, variables, share), step


def _interpolated(base: Base, run: Program, variables: Tree, share: float) -> Tree:
    wanted = interpolation.changed(tree.flatten(run.variables), run.is_trained)
    abstract, _ = tree.partition(run.variables["params"], wanted.__contains__)
    params = tree.flatten(weights.load_params(base.reader, base.model.spec, abstract)) if wanted else {}
    return interpolation.interpolated(variables, params, quant.kernel, share)


def _found(config: ConfigDict, moved: Mapping[str, str]) -> ConfigDict:
    if moved.get("model"):
        config.model.update(source=moved["model"], revision="")
    if moved.get("adapter"):
        if not config.adapter.source:
            raise UserError("--adapter: this run did not go on from an adapter; leave it out")
        config.adapter.source = moved["adapter"]
    return config
