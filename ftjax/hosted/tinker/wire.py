"""The messages in which Tinker's client sends batches and takes results: protocol buffers, and these their fields.

Arrays are the bytes of their values, little endian. The classes are made here, in a pool of their own, so that the
client may be imported beside them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from ftjax.hosted.refusals import Refused

PROTOBUF = "application/x-protobuf"

_DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<i8"), 3: np.dtype("<i4")}
_FLOAT, _INT = 1, 2
_STOP, _LENGTH = 0, 1
NOTHING = -99999.0  # the logp where the client is told nothing of the likeliest tokens

# {message: {field: (number, type)}}. A type is a scalar's, or another message's name; [type] is repeated, {type} a map
# from strings to it.
_FIELDS: dict[str, dict[str, tuple[int, Any]]] = {
    "SparseCsr": {"values": (1, "bytes"), "crow_indices": (2, "bytes"), "col_indices": (3, "bytes")},
    "Tensor": {"dense": (1, "bytes"), "sparse_csr": (2, "SparseCsr"), "dtype": (3, "int32"), "shape": (4, ["int64"])},
    "EncodedTextChunk": {"tokens": (1, "bytes")},
    "Other": {},
    "Chunk": {"encoded_text": (1, "EncodedTextChunk"), "image": (2, "Other"), "dmel": (3, "Other")},
    "LossConfigValue": {"number": (1, "double"), "text": (2, "string")},
    "Datum": {"model_input": (1, ["Chunk"]), "loss_fn_inputs": (2, {"Tensor"})},
    "ForwardBackwardRequest": {
        "model_id": (1, "string"),
        "seq_id": (2, "int32"),
        "data": (3, ["Datum"]),
        "loss_fn": (4, "string"),
        "forward_only": (6, "bool"),
        "loss_fn_config_v2": (7, {"LossConfigValue"}),
    },
    "BatchedTensor": {"data": (1, "bytes"), "offsets": (2, "bytes"), "dtype": (3, "int32")},
    "ArrayRecord": {"type_tag": (1, "string"), "fields": (2, {"BatchedTensor"}), "num_datums": (3, "int64")},
    "ForwardBackwardOutput": {
        "loss_fn_output_type": (1, "string"),
        "loss_fn_outputs": (2, ["ArrayRecord"]),
        "metrics": (3, {"double"}),
    },
    "TopkLogprobs": {"token_ids": (1, "bytes"), "logprobs": (2, "bytes"), "k": (3, "uint32"), "length": (4, "uint32")},
    "SampledSequence": {
        "stop_reason": (1, "int32"),
        "tokens": (2, "bytes"),
        "logprobs": (3, "bytes"),
        "topk_sampled_logprobs": (4, "TopkLogprobs"),
    },
    "SampleResponse": {
        "sequences": (1, ["SampledSequence"]),
        "prompt_logprobs": (2, "bytes"),
        "topk_prompt_logprobs": (3, "TopkLogprobs"),
    },
}


class Datum(NamedTuple):
    """tokens: int32 [n], what the model reads; inputs: {name: float32 or int64 [n]}, what its loss does."""

    tokens: np.ndarray
    inputs: dict[str, np.ndarray]


class Sampled(NamedTuple):
    """tokens int32 [n] with the one that ended it, their logps float32 [n]; likeliest: see `Topk`."""

    tokens: np.ndarray
    logps: np.ndarray
    stopped: bool
    likeliest: "Topk | None" = None


class Topk(NamedTuple):
    """The likeliest tokens at each place, int32 [n, k], and their logps, float32 [n, k]."""

    tokens: np.ndarray
    logps: np.ndarray


def read_request(body: bytes) -> Any:
    """A ForwardBackwardRequest; Refused where the bytes are none.

    What is wrong in it is raised by `settings_of` and `datum_of`: it has a place in a sequence already.
    """
    message = _MESSAGES["ForwardBackwardRequest"]()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise Refused(f"the body is no ForwardBackwardRequest of Tinker's client: {error}") from error
    return message


def settings_of(message: Any) -> dict[str, float]:
    """The numbers of `loss_fn_config`; Refused for a text, which no loss here reads."""
    settings = {}
    for name, value in message.loss_fn_config_v2.items():
        if value.HasField("text"):
            raise Refused(f"loss_fn_config[{name!r}] is a text; a number is wanted", param="loss_fn_config")
        settings[name] = value.number
    return settings


def datum_of(message: Any, where: str) -> Datum:
    """One Datum; Refused, with `where`, for images, sounds, and arrays that are not one number for each token."""
    parts = []
    for chunk in message.model_input:
        if not chunk.HasField("encoded_text"):
            raise Refused(f"{where}.model_input has a part that is no text; models here read tokens", param=where)
        parts.append(_array(chunk.encoded_text.tokens, _DTYPES[3], f"{where}.model_input"))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    inputs = {name: _tensor(tensor, f"{where}.{name}") for name, tensor in message.loss_fn_inputs.items()}
    return Datum(tokens, inputs)


def forward_output(outputs: Sequence[Mapping[str, np.ndarray]], metrics: Mapping[str, float]) -> bytes:
    """A ForwardBackwardOutput: of each datum the same fields, float32 [n]."""
    message = _MESSAGES["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord")
    for name, value in metrics.items():
        message.metrics[name] = value
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(outputs))
    for name in outputs[0]:
        raw = [np.ascontiguousarray(output[name], "<f4").tobytes() for output in outputs]
        ends = np.cumsum([0, *map(len, raw)]).astype("<i8")
        field = record.fields[name]
        field.data, field.offsets, field.dtype = b"".join(raw), ends.tobytes(), _FLOAT
    return message.SerializeToString()


def sample_output(
    sequences: Sequence[Sampled], prompt_logps: np.ndarray | None = None, prompt_likeliest: Topk | None = None
) -> bytes:
    """A SampleResponse. prompt_logps: float32 [n], NaN where a token has none."""
    message = _MESSAGES["SampleResponse"]()
    for sampled in sequences:
        sequence = message.sequences.add(stop_reason=_STOP if sampled.stopped else _LENGTH)
        sequence.tokens = sampled.tokens.astype("<i4").tobytes()
        sequence.logprobs = sampled.logps.astype("<f4").tobytes()
        if sampled.likeliest is not None:
            _write_topk(sequence.topk_sampled_logprobs, sampled.likeliest)
    if prompt_logps is not None:
        message.prompt_logprobs = prompt_logps.astype("<f4").tobytes()
    if prompt_likeliest is not None:
        _write_topk(message.topk_prompt_logprobs, prompt_likeliest)
    return message.SerializeToString()


def _write_topk(message: Any, topk: Topk) -> None:
    message.length, message.k = topk.tokens.shape
    message.token_ids, message.logprobs = topk.tokens.astype("<i4").tobytes(), topk.logps.astype("<f4").tobytes()


def _array(raw: bytes, dtype: np.dtype, where: str) -> np.ndarray:
    if len(raw) % dtype.itemsize:
        raise Refused(f"{where} has {len(raw)} bytes, which are no whole number of {dtype.name} values", param=where)
    return np.frombuffer(raw, dtype)


def _tensor(message: Any, where: str) -> np.ndarray:
    if message.dtype not in (_FLOAT, _INT):
        raise Refused(f"{where} is neither float32 nor int64", param=where)
    if message.HasField("sparse_csr") or len(message.shape) > 1:
        raise Refused(f"{where} has the shape {list(message.shape)}; one number for each token is wanted", param=where)
    values = _array(message.dense, _DTYPES[message.dtype], where)
    if message.shape and list(message.shape) != [len(values)]:
        raise Refused(f"{where} says its shape is {list(message.shape)} and has {len(values)} values", param=where)
    return values


def _messages() -> dict[str, Any]:
    """{name: the class of a message} of _FIELDS."""
    file = descriptor_pb2.FileDescriptorProto(name="ftjax_tinker.proto", package="ftjax", syntax="proto3")
    for name, fields in _FIELDS.items():
        described = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            if isinstance(kind, set):
                entry = described.nested_type.add(name=f"{field.title().replace('_', '')}Entry")
                entry.options.map_entry = True
                _add(entry, "key", 1, "string", False)
                _add(entry, "value", 2, next(iter(kind)), False)
                _add(described, field, number, f"{name}.{entry.name}", True)
            else:
                _add(described, field, number, kind[0] if isinstance(kind, list) else kind, isinstance(kind, list))
    # Of a chunk, and of a value, there is one of several.
    for message in file.message_type:
        if message.name in ("Chunk", "LossConfigValue"):
            message.oneof_decl.add(name="one")
            for field in message.field:
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ftjax.{name}")) for name in _FIELDS}


def _add(message: Any, name: str, number: int, kind: str, repeated: bool) -> None:
    field = message.field.add(name=name, number=number)
    field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
    if kind[0].isupper():
        field.type, field.type_name = field.TYPE_MESSAGE, f".ftjax.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")


_MESSAGES = _messages()
