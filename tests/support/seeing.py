"""Models that see, as transformers' processors have them: small tokenizers, templates, pictures, and the processors."""

import base64
import functools
from io import BytesIO
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from ftjax.data.images.rules import rules_of

# As the templates of the released models write it: images where they stand, Gemma's text without white space around it.
QWEN = """\
{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GEMMA = """\
{{ bos_token }}{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}\
{{ '<start_of_turn>' + role }}
{% if message.content is string %}{{ message.content | trim }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}\
{% endfor %}{% endif %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
QWEN_IMAGES = {"patch_size": 4, "merge_size": 2, "min_pixels": 256, "max_pixels": 2048}
GEMMA_IMAGES = {"size": {"height": 32, "width": 32}}


def _tokenizer(template, **special):
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(_ALPHABET)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@functools.cache
def qwen_tokenizer():
    names = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return _tokenizer(QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=names)


@functools.cache
def gemma_tokenizer():
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turns = ["<start_of_turn>"]
    special = {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>"}
    return _tokenizer(GEMMA, extra_special_tokens=named, additional_special_tokens=turns, **special)


def qwen_config():
    return {
        "model_type": "qwen2_5_vl",
        "image_token_id": qwen_tokenizer().convert_tokens_to_ids("<|image_pad|>"),
        "vision_config": {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
    }


def gemma_config():
    return {
        "model_type": "gemma3",
        "image_token_index": gemma_tokenizer().convert_tokens_to_ids("<image_soft_token>"),
        "mm_tokens_per_image": 4,
        "vision_config": {"image_size": 32, "patch_size": 4},
    }


def qwen_rules(**more):
    return rules_of("qwen2_5_vl", qwen_config(), QWEN_IMAGES, **more)


def gemma_rules():
    return rules_of("gemma3", gemma_config(), GEMMA_IMAGES)


class _QwenImages(Qwen2_5_VLProcessor):
    """Without its processor of videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer, chat_template):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        ids = map(tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token))
        self.image_token_id, self.video_token_id = ids
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen_processor():
    return _QwenImages(Qwen2VLImageProcessorPil(**QWEN_IMAGES), qwen_tokenizer(), QWEN)


def gemma_processor():
    images = Gemma3ImageProcessorPil(**GEMMA_IMAGES)
    return Gemma3Processor(images, gemma_tokenizer(), chat_template=GEMMA, image_seq_length=4)


FAMILIES = {
    "gemma3": SimpleNamespace(tokenizer=gemma_tokenizer, rules=gemma_rules, processor=gemma_processor),
    "qwen2_5_vl": SimpleNamespace(tokenizer=qwen_tokenizer, rules=qwen_rules, processor=qwen_processor),
}


def picture(width, height, seed=0):
    """A picture with shapes and noise in RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / (2 + seed + c)) * np.cos(y / (3 + c)) for c in range(3)], axis=-1)
    return Image.fromarray(np.clip(128 + 90 * waves + rng.normal(0, 20, waves.shape), 0, 255).astype(np.uint8))


def as_bytes(image, format="PNG", **options):
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def as_data(image):
    return f"data:image/png;base64,{base64.b64encode(as_bytes(image)).decode()}"
