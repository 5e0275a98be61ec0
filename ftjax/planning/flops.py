"""How many FLOPs a training step needs: counted from the model, without what is computed twice to save memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ftjax import tree
from ftjax.assemble import Program
from ftjax.data.batch.mismatched import MISMATCHED
from ftjax.data.tokens.kinds import ROW_KINDS
from ftjax.models.groups import stack_of, stacks
from ftjax.models.spec import DecoderSpec
from ftjax.objectives.reference import TEACHER
from ftjax.planning.chips import CHIPS
from ftjax.tree import Tree


@dataclass(frozen=True)
class Flops:
    """Of one step over all chips. A product of [n, k] and [k, m] is 2 n k m."""

    forward: float  # products with weights
    to_inputs: float  # their gradients with respect to what they are given
    to_weights: float  # and to the weights, of those that are trained
    attention: float  # scores and sums of values, forward; in layers that carry a memory, what that takes
    attention_backward: float
    reference: float = 0.0  # forward passes without gradients: of a reference, a teacher, documents that only measure

    @property
    def total(self) -> float:
        products = self.forward + self.to_inputs + self.to_weights
        return products + self.attention + self.attention_backward + self.reference


def count(
    spec: DecoderSpec,
    variables: Tree,
    is_trained: Callable[[str], bool],
    rows: int,
    length: int,
    reference: bool = False,
    generates: bool = True,
) -> Flops:
    """For `rows` rows of `length` tokens, each one document (packed rows need less attention), all of them trained on.

    variables: shapes of all collections, a quantized kernel under the name of its packed arrays. reference: whether
    there is one beside it; its adapters, if it has any, are not counted. generates: whether there are logits.
    """
    tokens = rows * length
    weights = {path: size * _share(path, spec) for path, size in products(spec, variables).items()}
    if not generates:
        words = "params/embed_tokens/embedding", "lm_head/"  # of which the first is only a table then
        weights = {path: size for path, size in weights.items() if not any(name in path for name in words)}
    trained = sum(size for path, size in weights.items() if is_trained(path))
    # Two products, over all pairs of a query and a key that it sees, of the elements of all heads; of the delta rule
    # three, of a token with each head's memory: what that has for a key, its step, what a query reads; of Mamba-2 the
    # last two.
    attention = 0.0
    for stack in stacks(spec):
        if (mixer := stack.spec.delta or stack.spec.mamba) is not None:
            with_memory = 3 if stack.spec.delta else 2
            attention += 2.0 * with_memory * tokens * math.prod(mixer.memory) * len(stack.layers)
        if not stack.spec.attends:
            continue
        pairs = sum(_pairs(stack.spec, length))
        widths = stack.spec.head_dim + stack.spec.value_dim
        attention += 2.0 * rows * pairs * stack.spec.num_attention_heads * widths
    forward = 2.0 * tokens * sum(weights.values())
    alone = sum(size for path, size in weights.items() if not path.startswith("lora/"))
    beside = 2.0 * tokens * alone + attention if reference else 0.0
    return Flops(forward, forward, 2.0 * tokens * trained, attention, 2 * attention, beside)


def of_step(program: Program) -> Flops:
    """Of a step of `program` over all chips, every document as long as it may be."""
    accumulate, rows, _ = program.batch["tokens"].shape
    documents, length = _documents(program)
    method, rows = program.method, accumulate * rows * documents
    its = program.model.spec, program.variables, program.is_trained
    found = count(*its, rows, length, method.reference, method.generates)
    if program.teacher is not None:
        theirs = program.teacher.spec, {"params": program.frozen[TEACHER]["params"]}, lambda path: False
        its = count(*theirs, rows, length)
        found = replace(found, reference=found.reference + its.forward + its.attention)
    if MISMATCHED.keys() <= program.batch.keys():  # as many tokens again, forward through policy and reference
        found = replace(found, reference=2 * found.reference + found.forward + found.attention)
    return found


def reaches(program: Program) -> list[float]:
    """Keys that a query of each layer with attention sees, on average over a document."""
    _, length = _documents(program)
    attending = [stack.spec for stack in stacks(program.model.spec) if stack.spec.attends]
    return [pairs / length for spec in attending for pairs in _pairs(spec, length)]


def seconds_per_token(program: Program) -> float | None:
    """What all devices together need for the FLOPs of one token at their peak; None for devices of unknown peak."""
    kind = program.mesh.devices.flat[0].device_kind
    peaks = [chip.flops for chip in CHIPS.values() if chip.devices == kind]
    if not peaks:
        return None
    return of_step(program).total / program.tokens / (peaks[0] * program.mesh.size)


def _documents(program: Program) -> tuple[int, int]:
    """How many documents a row holds at least, and the tokens of each."""
    documents = ROW_KINDS[program.method.rows].documents
    return documents, program.row_length // documents


def products(spec: DecoderSpec, variables: Tree) -> dict[str, int]:
    """{path: elements} of the matrices that every token is multiplied by; of a stack of experts, all of them."""
    found = {}
    for path, leaf in tree.flatten(variables).items():
        name = path.rpartition("/")[2]
        if path.startswith("quant/"):
            kernel = f"{path.rpartition('/')[0]}/kernel"
            unpacked = math.prod(leaf.shape) * (2 if leaf.dtype == "uint8" else 1)  # 4-bit codes are two to a byte
            found[kernel] = max(found.get(kernel, 0), unpacked)
        elif name in ("kernel", "lora_a", "lora_b") or (
            path == "params/embed_tokens/embedding" and spec.tie_word_embeddings
        ):
            found[path] = math.prod(leaf.shape)
    return found


def _pairs(spec: DecoderSpec, length: int) -> list[float]:
    """`visible_pairs` of each layer."""
    chunks = spec.layer_chunks or (None,) * spec.num_hidden_layers
    return [visible_pairs(length, window, chunk) for window, chunk in zip(spec.layer_windows, chunks, strict=True)]


def visible_pairs(length: int, window: int | None, chunk: int | None = None) -> float:
    """Queries and keys that see each other in a causal row of `length` tokens, the last `window` of them if given.

    chunk: a query sees nothing before the last multiple of so many positions.
    """
    if chunk is not None and chunk < length:
        return length // chunk * visible_pairs(chunk, window) + visible_pairs(length % chunk, window)
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) / 2 + (length - reach) * reach


def _share(path: str, spec: DecoderSpec) -> float:
    """Of a stack of experts each token is multiplied by a few."""
    stack = stack_of(spec, path.partition("/")[2])
    experts = stack.spec.experts if stack and "/experts/" in path else None
    return experts.per_token / experts.count if experts else 1.0
