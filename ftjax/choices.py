"""What a config leaves open (`config.OPEN`) and a run chooses: by its devices, its model, its data and its memory.

Each function returns a copy of the config with more of it settled. What is given stays as it is.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import assemble, memory, sharding
from ftjax import config as configs
from ftjax.data.batch import sizes
from ftjax.data.batch.sizes import Limits, Sizes
from ftjax.errors import UserError
from ftjax.method import iterations, method_of, samples
from ftjax.models import onednn
from ftjax.models.decoder import Decoder
from ftjax.models.spec import DecoderSpec
from ftjax.sharding import AnyMesh

_WIDTH, _NARROWEST, _POWER = 4096, 512, 0.78
_ROWS = 16  # of full length in a batch, where no data is there to choose by
_PROMPTS = 8  # in a batch, where the model writes completions of them
_SEVERAL = 4  # rows of a batch at least, where their completions are to meet other prompts of it


def by_devices(config: ConfigDict, platform: str, count: int = 1) -> ConfigDict:
    """With dtypes and what multiplies: CPUs compute in float32, since XLA is no faster in bfloat16 there.

    platform, count: of the devices, see `sharding.platform`. UserError where there is no oneDNN that was asked for.
    """
    given = config.model
    matmul, reason = onednn.choose(given.matmul, platform, count)
    if reason and given.matmul != "auto":
        raise UserError(onednn.refusal(reason))
    dtype = given.dtype if given.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    stored = given.param_dtype if given.param_dtype != "auto" else dtype
    return configs.changed(config, {"model.dtype": dtype, "model.param_dtype": stored, "model.matmul": matmul})


def by_model(config: ConfigDict, spec: DecoderSpec) -> ConfigDict:
    """With a learning rate, and without general text where the method makes a model that does not generate.

    The learning rate of adapters is larger in narrower models.
    As width^-0.78: what the authors of "LoRA Without Regret" (Schulman et al. 2025) fitted to Llama models in
    tinker-cookbook's `hyperparam_utils` (Qwen models depend less on it). QLoRA's 2e-4 at widths of 4,096 and 5,120 and
    1e-4 at 8,192 (Dettmers et al. 2023) agree with it, and so does the quickstart's 1e-3 at 576.
    """
    if not method_of(config).generates:  # what it would say is no matter any more
        config = configs.changed(config, {"evaluate.general": ()})
    if config.optimizer.learning_rate:
        return config
    rate = method_of(config).learning_rates[config.adapter.kind]
    if config.adapter.kind != "none":
        rate *= (_WIDTH / max(spec.hidden_size, _NARROWEST)) ** _POWER
    return configs.changed(config, {"optimizer.learning_rate": float(f"{rate:.2g}")})


def by_data(
    config: ConfigDict, spec: DecoderSpec, mesh: AnyMesh, lengths: np.ndarray, count: float, prefix: int = 0
) -> ConfigDict:
    """With epochs, rows in a batch and their length.

    lengths, count: of the examples, as in `sizes.choose`; prefix: as in `Limits`.

    Raises:
      UserError: data.row_length is shorter than an example.
    """
    data = config.data
    if method_of(config).rollouts:
        return _with(config, _of_rollouts(config, int(lengths.max()), limits(config, spec, mesh)))
    if 0 < data.row_length < (longest := prefix + int(lengths.max())):
        raise UserError(
            f"config.data.row_length={data.row_length}: the longest example has {longest} tokens; set "
            f"--config.data.row_length={longest} or more, or lower --config.data.max_length, where examples are cut"
        )
    chosen = sizes.choose(_given(config), lengths, count, limits(config, spec, mesh)._replace(prefix=prefix))
    return _with(config, chosen)


def _of_rollouts(config: ConfigDict, longest: int, limits: Limits) -> Sizes:
    """longest: tokens of the longest prompt, or of the longest row where rows have answers."""
    given, each = _given(config), samples(config)
    if given.batch_size % each:
        key = "config.rollouts.learned" if config.rollouts.learned else "config.rollouts.samples"
        raise UserError(
            f"config.data.batch_size={given.batch_size} completions in a step, of which {key}={each} are of the same "
            f"prompt; set it to a multiple, such as --config.data.batch_size={8 * each}"
        )
    what = "row" if method_of(config).answered else "prompt"
    documents = 2 if method_of(config).pairs else 1  # of a row
    needed = documents * (longest + config.rollouts.max_new_tokens)
    if config.rollouts.turns > 1:  # an episode may go on until the row is full
        needed = max(needed, config.data.max_length)
        if 0 < given.row_length < needed:
            raise UserError(
                f"config.data.row_length={given.row_length}: episodes of config.rollouts.turns="
                f"{config.rollouts.turns} may have {needed} tokens (config.data.max_length); leave it out"
            )
    if 0 < given.row_length < needed:
        raise UserError(
            f"config.data.row_length={given.row_length}: the longest {what} has {longest} tokens, and "
            f"config.rollouts.max_new_tokens={config.rollouts.max_new_tokens} follow"
            f"{', twice' * (documents > 1)}; leave it out, or set {needed}"
        )
    length = min(-(-needed // limits.multiple) * limits.multiple, documents * limits.length)
    rows = given.batch_size or -(-_PROMPTS * each // limits.rows) * limits.rows
    return Sizes(rows, given.row_length or length, given.epochs or limits.epochs[0])


def without_data(
    config: ConfigDict, spec: DecoderSpec, mesh: Mesh, room: float | None, teacher: DecoderSpec | None = None
) -> ConfigDict:
    """With everything, for rows that are not there: as if they were many, and as long as they may be.

    room, teacher: as in `by_memory`.
    """
    config = by_model(by_devices(config, sharding.platform(mesh), mesh.size), spec)
    given, limit = _given(config), limits(config, spec, mesh)
    models = _decoder(config, spec), mesh, room, teacher and _decoder(config, teacher)
    if method_of(config).rollouts:
        chosen = _of_rollouts(config, config.data.max_length - config.rollouts.max_new_tokens, limit)
        return by_memory(_with(config, chosen), *models)
    rows = given.batch_size or max(_ROWS // limit.rows, 1) * limit.rows
    config = _with(config, Sizes(rows, given.row_length or limit.length, given.epochs or limit.epochs[0]))
    return by_memory(config, *models)


def _decoder(config: ConfigDict, spec: DecoderSpec) -> Decoder:
    dtypes = jnp.dtype(config.model.dtype), jnp.dtype(config.model.param_dtype)
    how = {"matmul": config.model.matmul, "shares": config.data.share_prefixes}
    return Decoder(spec, *dtypes, "none", config.model.attention, **how)


def by_memory(
    config: ConfigDict, model: Decoder, mesh: Mesh, room: float | None, teacher: Decoder | None = None
) -> ConfigDict:
    """With remat and accumulate. room: bytes of a device's memory, None where they are unknown; teacher: beside it."""
    if config.model.remat != "auto" and config.accumulate:
        return config
    whole = configs.changed(config, {"accumulate": 1})
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = assemble.program(whole, model, mesh, 1, teacher)
        remat, count = memory.choose(config, program, room)
    return configs.changed(config, {"model.remat": remat, "accumulate": count})


def limits(config: ConfigDict, spec: DecoderSpec, mesh: AnyMesh) -> Limits:
    """What a choice for these devices has to keep to."""
    parts, context = sharding.row_parts(mesh), mesh.shape["context"]
    # Where rows are split, each part has the length that the attention kernels want.
    multiple = 128 * context if context > 1 else 64
    data = assemble.data_spec(config, spec)
    rows = parts * max(config.accumulate, 1)
    if method_of(config).mismatched(config.objective):  # a step needs several prompts
        rows *= -(-_SEVERAL // rows)
    rows = math.lcm(rows, samples(config))
    return Limits(data.longest, data.packing, rows, parts, multiple, method_of(config).epochs)


def few_updates(
    config: ConfigDict, asked: ConfigDict, spec: DecoderSpec, mesh: AnyMesh, rows: int, examples: float, updates: int
) -> str:
    """What to change where a run has few updates, "" where it has enough, or as many as config.steps asks for.

    config, asked: with and without what was chosen for the data; rows, examples: of an epoch.
    """
    if config.steps or updates >= sizes.FEW_UPDATES:
        return ""
    batch, unit = config.data.batch_size, limits(asked, spec, mesh).rows
    rows *= samples(config) * iterations(config)  # of batches that an epoch makes
    epochs = math.ceil(sizes.FEW_UPDATES * batch / max(rows, 1))
    if not asked.data.batch_size:  # which is then chosen again
        epochs = max(epochs, math.ceil(sizes.SEEN / max(examples, 1)))
    hints = [f"--config.epochs={epochs}"]
    if (smaller := int(rows * config.epochs / sizes.FEW_UPDATES) // unit * unit) >= unit:
        length = f" --config.data.row_length={config.data.row_length}"
        hints.append(f"--config.data.batch_size={smaller}{length}")
    return (
        f"{updates} updates in {config.epochs:g} epochs are few to learn from; {' or '.join(hints)} makes "
        f"{sizes.FEW_UPDATES} or more"
    )


def _given(config: ConfigDict) -> Sizes:
    return Sizes(config.data.batch_size, config.data.row_length, config.epochs)


def _with(config: ConfigDict, chosen: Sizes) -> ConfigDict:
    values = {"data.batch_size": chosen.batch_size, "data.row_length": chosen.row_length, "epochs": chosen.epochs}
    return configs.changed(config, values)
