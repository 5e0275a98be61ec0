"""Quantized checkpoints: MXFP4 and blocks of FP8 are read as bfloat16, every other kind is refused."""

from typing import Any

from ftjax.errors import UserError
from ftjax.weights.hf.fp8 import FP8Reader
from ftjax.weights.hf.mxfp4 import MXFP4Reader
from ftjax.weights.hf.safetensors import SafetensorsReader

Unpacked = SafetensorsReader | MXFP4Reader | FP8Reader


def unpacked(reader: SafetensorsReader) -> Unpacked:
    """`reader`, or one that reads its quantized tensors as bfloat16. UserError, by name, for kinds that are not."""
    for config in (reader.config, reader.config.get("text_config")):
        quantization = config.get("quantization_config") if isinstance(config, dict) else None
        if quantization:
            return _unpacked(reader, quantization)
    return reader


def _unpacked(reader: SafetensorsReader, quantization: Any) -> Unpacked:
    is_dict = isinstance(quantization, dict)
    method = quantization.get("quant_method", "of a kind that it does not name") if is_dict else quantization
    if method == "mxfp4":
        return MXFP4Reader(reader)
    if method == "fp8":
        block = quantization.get("weight_block_size") if is_dict else None
        if isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block):
            return FP8Reader(reader, (block[0], block[1]))
        method = f"fp8 in blocks of {str(block)[:40]}"
    raise UserError(
        f"{reader.path}: the weights are quantized ({method}, by quantization_config in config.json), which is "
        "not supported; use the unquantized checkpoint of this model"
    )
