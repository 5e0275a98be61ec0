"""Does an export compute what the run computes? Both get the same prompts in float32, and their logits are compared.

First the run, with its adapter beside the base as in training; then the exported files, read from the disk by the same
readers as any model. So the difference is that of merging and of the stored type, nothing else. One model at a time is
on the devices; the run's logits wait on the host (about 400 MB for a vocabulary of 256,000).
"""

import functools
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from ftjax import sharding
from ftjax.data.tokens.chat import render_prompt
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.heads import COLLECTION, SCORE, values
from ftjax.models.params import abstract_params
from ftjax.models.spec import DecoderSpec
from ftjax.models.vision import Images
from ftjax.training.metrics import read
from ftjax.tree import Tree
from ftjax.weights.hf.classifier import ClassifierReader
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

TEXTS = (
    "Name three colors of the rainbow.",
    "What is 17 plus 25? Answer with the number alone.",
    "Write one sentence about the sea, and one about the mountains.",
    "Übersetze ins Englische: Der Zug fährt um neun Uhr ab.",
    'Complete this: {"name": "Ada", "born":',
)
MAX_TOKENS = 96  # in one prompt
MAX_SAMPLES = 3
_PACKAGES = ("ftjax", "jax", "jaxlib", "flax", "numpy", "safetensors", "transformers", "tokenizers", "gguf")

# The largest `relative_difference` that an export in each stored type may have. For SmolLM2-135M (30 layers), rounding
# all weights gives 0.0012 in float16, 0.0066 in bfloat16 and 0.033 in Q8_0; merging in float32 about 1e-6. The limits
# are at least ten times that, since some models amplify differences and a mixture of experts may choose another expert.
# One wrong tensor in a middle layer of that model gives 0.32 (no MLP), 0.40 (kernels of two layers exchanged) or 0.82
# (no norm).
LIMITS = {"float64": 1e-3, "float32": 1e-3, "float16": 0.05, "bfloat16": 0.15, "q8_0": 0.3}


class Prompt(NamedTuple):
    text: str
    tokens: np.ndarray  # int32 [n]
    images: Images | None = None  # of NumPy arrays, for this prompt as a batch of one row


def prompts(
    tokenizer: PreTrainedTokenizerFast, samples: Path, max_length: int, spec: DecoderSpec | None = None
) -> list[Prompt]:
    """TEXTS, and up to MAX_SAMPLES completions of the run's evaluations (`samples.jsonl`), each after its prompt; where
    the `spec` has a vision tower also the first of these after an image.

    All are in the chat template, where there is one, and cut to MAX_TOKENS and the model's own max_length.
    """
    out = []
    for text, answer in [(text, "") for text in TEXTS] + _samples(samples):
        tokens = render_prompt([{"role": "user", "content": text}] if tokenizer.chat_template else text, tokenizer)
        answered = tokenizer.encode(answer, add_special_tokens=False)
        tokens = np.concatenate([tokens, np.asarray(answered, np.int32)])[: min(MAX_TOKENS, max_length)]
        out.append(Prompt(text + (f" -> {answer}" if answer else ""), tokens.astype(np.int32)))
    return out if spec is None or spec.vision is None else [*out, _pictured(spec, out[0])]


def _pictured(spec: DecoderSpec, prompt: Prompt) -> Prompt:
    """The prompt after an image of noise: of the tower's own size, or of several windows, whole ones and others."""
    vision = spec.vision
    sides = np.array([vision.grid] * 2 if vision.grid else [vision.window + vision.merge, 2 * vision.window])
    sides //= vision.merge  # in tokens
    count, each = sides.prod(), vision.merge
    tokens = np.stack(np.divmod(np.arange(count), sides[1]), axis=-1)  # row and column of each
    inside = np.stack(np.divmod(np.arange(each**2), each), axis=-1)
    places = (tokens[:, None] * each + inside).reshape(1, -1, 2).astype(np.int32)
    rng, shape = np.random.default_rng(0), (1, places.shape[1], 3 * vision.patch**2)
    patches, numbers = rng.integers(0, 256, shape, np.uint8), np.ones(shape[:2], np.int32)
    rope_positions = None
    if spec.mrope:
        after = sides.max() + np.arange(len(prompt.tokens))
        of_image = np.pad(tokens, ((0, 0), (1, 0)))
        rope_positions = np.concatenate([of_image, np.repeat(after[:, None], 3, axis=1)])[None].astype(np.int32)
    images = Images(patches, places, numbers, rope_positions)
    with_image = np.concatenate([np.full(count, vision.image_token), prompt.tokens]).astype(np.int32)
    return Prompt(f"(an image) {prompt.text}", with_image, images)


def _samples(path: Path) -> list[tuple[str, str]]:
    records = read(path)[-200:]
    return [(record["prompt"], record["completion"]) for record in records[:MAX_SAMPLES]]


def logits(model: Decoder, variables: Tree, texts: list[Prompt], mesh: Mesh) -> list[np.ndarray]:
    """float32 [tokens, vocab] for each prompt, in float32 whatever the model's dtype; the same in all processes.

    Those with images come last. Of a model whose head gives K numbers instead, these: [tokens, K].
    """
    model = model.clone(dtype=jnp.float32, remat="none")
    plain = [prompt for prompt in texts if prompt.images is None]
    pictured = (_logits(model, variables, [prompt], mesh) for prompt in texts if prompt.images is not None)
    return [*_logits(model, variables, plain, mesh), *(its for rows in pictured for its in rows)]


def _logits(model: Decoder, variables: Tree, texts: list[Prompt], mesh: Mesh) -> list[np.ndarray]:
    """Of prompts without images, or of a single one."""
    lengths = np.array([len(prompt.tokens) for prompt in texts])
    tokens = np.zeros((len(texts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, texts):
        row[: len(prompt.tokens)] = prompt.tokens
    positions = np.arange(tokens.shape[1], dtype=np.int32)
    is_token = positions < lengths[:, None]  # the rest is padding
    whole = sharding.replicated(mesh)
    # By default TPUs and GPUs multiply float32 in lower precision.
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        images = texts[0].images

        def said(variables: Tree, images: Images | None, *batch: np.ndarray) -> jax.Array:
            return model.apply(variables, *batch, images=images)[0]

        forward = jax.jit(said, out_shardings=whole)

        def head(variables: Tree, hidden: jax.Array) -> jax.Array:
            if COLLECTION in variables:
                return values(variables, SCORE, hidden)
            return model.apply(variables, hidden, method=model.unembed)

        unembed = jax.jit(head, out_shardings=whole)
        hidden = forward(variables, images, tokens, np.where(is_token, positions, 0), is_token.astype(np.int32))
        # One prompt at a time: logits are much wider than anything else.
        rows = (np.asarray(unembed(variables, row)) for row in np.asarray(hidden))
        return [row[:length].copy() for row, length in zip(rows, lengths)]


def reload(path: Path, mesh: Mesh, vision: bool = False) -> tuple[Decoder, Tree]:
    """(model, variables on `mesh`) of a directory or a .gguf file, with parameters in their stored type.

    vision: with the tower of a multimodal model.
    """
    reader = open_source(path)
    spec = spec_from_config(reader.config, vision)
    dtype = functools.reduce(jnp.promote_types, sorted({reader.dtype(name).name for name in reader.names()}))
    model = Decoder(spec, jnp.float32, jnp.dtype(dtype))
    variables = {"params": load_params(reader, spec, abstract_params(model, mesh))}
    if isinstance(reader, ClassifierReader):
        variables[COLLECTION] = {SCORE: {"kernel": jax.device_put(reader.head(), sharding.replicated(mesh))}}
    return model, variables


def differences(expected: list[np.ndarray], actual: list[np.ndarray]) -> dict[str, float]:
    """How far `actual` is from `expected`, each a list of float32 [tokens, vocab], over all positions.

    KL(expected || actual) is in nats per position. `relative_difference`: the root mean square of the difference over
    that of the expected logits, both less their mean over the vocabulary, which does not change a softmax.
    """
    rows = []  # of float64 one position at a time
    for ours, theirs in zip(np.concatenate(expected), np.concatenate(actual)):
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        gap, p, q = np.abs(theirs - ours), _log_softmax(ours), _log_softmax(theirs)
        kl, same = np.sum(np.exp(p) * (p - q)), ours.argmax() == theirs.argmax()
        rows.append((gap.max(), gap.mean(), kl, same, np.var(theirs - ours), np.var(ours)))
    largest, mean, kl, same, off, size = np.transpose(rows)
    return {
        "max_abs_logit_difference": float(largest.max()),
        "mean_abs_logit_difference": float(mean.mean()),
        "max_kl": float(kl.max()),
        "mean_kl": float(kl.mean()),
        "top1_agreement": float(same.mean()),
        "relative_difference": float(np.sqrt(off.sum() / size.sum())),
    }


def number_differences(expected: list[np.ndarray], actual: list[np.ndarray]) -> dict[str, float]:
    """How far `actual` is from `expected`, each a list of float32 [tokens, K], the numbers of a head.

    `relative_difference`: the root mean square of the difference over the standard deviation of the expected numbers.
    """
    ours, theirs = (np.concatenate(part).astype(np.float64) for part in (expected, actual))
    gap = np.abs(theirs - ours)
    return {
        "max_abs_score_difference": float(gap.max()),
        "mean_abs_score_difference": float(gap.mean()),
        "relative_difference": float(np.sqrt(np.mean(gap**2) / np.mean(np.var(ours, axis=0)))),
    }


def report(
    texts: list[Prompt], stored: str, difference: dict[str, float], base: dict[str, float] | None, **about: Any
) -> dict[str, Any]:
    """The content of parity.json. stored: a key of LIMITS; difference, base: `differences` of export and base."""
    versions = {name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    device = jax.devices()[0]
    return {
        **about,
        "stored_as": stored,
        "computed_in": "float32",
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "versions": versions,
        "positions": sum(len(prompt.tokens) for prompt in texts),
        **difference,
        "limit_of_relative_difference": LIMITS[stored],
        "base_without_adapter": base,
        "prompts": [{"text": prompt.text, "tokens": prompt.tokens.tolist()} for prompt in texts],
    }


def check(difference: dict[str, float], stored: str) -> None:
    """Raises UserError when an export differs from its run by more than its stored type explains."""
    limit = LIMITS[stored]
    if not difference["relative_difference"] <= limit:  # NaN included
        if "mean_kl" in difference:
            what = (
                f"logits differ by {difference['max_abs_logit_difference']:.3g} at most, KL {difference['mean_kl']:.2g}"
            )
        else:
            what = f"scores differ by {difference['max_abs_score_difference']:.3g} at most"
        raise UserError(
            f"the export does not say what the run says: its {what}, {difference['relative_difference']:.2g} of their "
            f"size, where {stored} explains {limit:g}; nothing was written. Try --dtype float32, and report this if "
            "that fails as well"
        )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
