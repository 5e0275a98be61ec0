"""Released models: each config has as many parameters as transformers' torch model of it, and as its owners say."""

import copy
import math
from decimal import Decimal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftjax.models.decoder import Decoder
from ftjax.models.families import FAMILIES, spec_from_config, text_config
from ftjax.models.params import shapes
from ftjax.models.published import configs, find

PUBLISHED = configs()
# How many parameters their owners count, of multimodal ones in the language model. What is added is in the files, but
# no parameter in torch: corrections of routers, scales of layers, two constants of each xIELU.
COUNTS = {
    "Llama-2-7b": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B": 70_553_706_496,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "SmolLM3-3B": 3_075_098_624,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "gemma-3-27b": 27_009_346_304,
    "Phi-3-mini-128k": 3_821_079_552,
    "Phi-4-mini": 3_836_021_760,
    "OLMo-2-1124-7B": 7_298_617_344,
    "granite-3.1-2b": 2_533_531_648,
    "gpt2": 124_439_808,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "OLMo-7B": 6_888_095_744,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "phi-2": 2_779_683_840,
    "starcoder2-3b": 3_030_371_328,
    "glm-4-9b-chat": 9_399_951_360,
    "GLM-4-9B-0414": 9_400_279_040,
    "c4ai-command-r7b-12-2024": 8_028_033_024,
    "Seed-OSS-36B": 36_151_104_512,
    "ERNIE-4.5-0.3B": 360_748_032,
    "LFM2-1.2B": 1_170_340_608,
    "Qwen3-Next-80B-A3B": 79_674_391_296,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200,
    "GLM-4.5-Air": 106_852_251_264,
    "Falcon-H1-0.5B": 521_411_104,
    "granite-4.0-h-micro": 3_191_396_096,
    "granite-4.0-h-tiny": 6_939_037_248,
    "NVIDIA-Nemotron-Nano-9B-v2": 8_888_227_328,
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 31_577_937_344 + 2_944,
    "gemma-3-4b": 3_880_263_168,
    "Qwen2.5-VL-7B": 7_615_616_512,
    "Apertus-8B-2509": 8_053_338_176 + 64,
    "AFM-4.5B": 4_619_184_640,
    "ERNIE-4.5-21B-A3B": 21_825_437_888,
    "EXAONE-4.0-32B": 32_003_216_384,
    "gemma-3n-E2B": 4_435_182_688,
    "gemma-3n-E4B": 6_835_235_568,
    "gemma-4-E2B": 4_628_569_344 + 35,
    "gemma-4-E4B": 7_463_013_376 + 42,
    "gemma-4-31B": 30_697_345_280 + 60,
    "gemma-4-26B-A4B": 25_233_141_760 + 30,
    "GLM-4.7-Flash": 29_943_390_976 + 2_944,
    "granite-3.0-1b-a400m": 1_334_628_352,
    "granite-3.1-3b-a800m": 3_298_793_472,
    "helium-1-preview-2b": 2_172_643_840,
    "Hunyuan-7B": 7_504_568_320,
    "Hunyuan-A13B": 80_393_183_232,
    "Llama-4-Scout-17B-16E": 107_769_861_120,
    "Llama-4-Maverick-17B-128E": 400_711_848_960,
    "MiniMax-M2": 228_689_748_992 + 15_872,
    "Ministral-8B-Instruct-2410": 8_019_808_256,
    "Ministral-3-3B-Base-2512": 3_429_006_336,
    "Ministral-3-8B-Base-2512": 8_489_553_920,
    "Ministral-3-14B-Base-2512": 13_506_073_600,
    "Mistral-Small-3.1-24B-Base-2503": 23_572_403_200,
    "Minitron-8B": 8_271_699_968,
    "Olmo-3-1025-7B": 7_298_011_136,
    "Olmo-3-1125-32B": 32_233_522_176,
    "Phi-3.5-MoE": 41_873_153_344,
    "Qwen3.5-9B": 8_953_803_264,
    "Qwen3.5-27B": 26_895_998_464,
    "Qwen3.5-35B-A3B": 34_660_610_688,
    "Qwen3.5-397B-A17B": 396_346_350_336,
    "stablelm-3b-4e1t": 2_795_443_200,
}
# What their makers write, in billions, and how many billions of it are in towers, which COUNTS leaves out.
STATED = {
    "Apertus-8B-2509": ("8", 0.0),
    "AFM-4.5B": ("4.6", 0.0),  # as its page counts the files
    "ERNIE-4.5-21B-A3B": ("21", 0.0),
    "EXAONE-4.0-32B": ("32", 0.0),
    "gemma-3n-E2B": ("5", 0.98),
    "gemma-3n-E4B": ("8", 0.98),
    "gemma-4-E2B": ("5.1", 0.47),
    "gemma-4-E4B": ("8", 0.47),
    "gemma-4-31B": ("30.7", 0.0),
    "gemma-4-26B-A4B": ("25.2", 0.0),
    "GLM-4.7-Flash": ("30", 0.0),
    "granite-3.0-1b-a400m": ("1.3", 0.0),
    "granite-3.1-3b-a800m": ("3.3", 0.0),
    "helium-1-preview-2b": ("2", 0.0),
    "Hunyuan-7B": ("7", 0.0),
    "Hunyuan-A13B": ("80", 0.0),
    "Llama-4-Scout-17B-16E": ("109", 0.87),
    "Llama-4-Maverick-17B-128E": ("400", 0.87),
    "MiniMax-M2": ("230", 0.0),
    "Ministral-8B-Instruct-2410": ("8.019808256", 0.0),
    "Ministral-3-3B-Base-2512": ("3.4", 0.0),
    "Ministral-3-8B-Base-2512": ("8.4", 0.0),
    "Ministral-3-14B-Base-2512": ("13.5", 0.0),
    "Mistral-Small-3.1-24B-Base-2503": ("24", 0.44),
    "Minitron-8B": ("8", 0.0),
    "Olmo-3-1025-7B": ("7", 0.0),
    "Olmo-3-1125-32B": ("32", 0.0),
    "Phi-3.5-MoE": ("42", 0.0),
    "Qwen3.5-9B": ("9", 0.46),
    "Qwen3.5-27B": ("27", 0.46),
    "Qwen3.5-35B-A3B": ("35", 0.45),
    "Qwen3.5-397B-A17B": ("397", 0.46),
    "stablelm-3b-4e1t": ("2.7954432", 0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_models_have_the_parameters_that_their_owners_count(name):
    found = shapes(Decoder(spec_from_config(PUBLISHED[name])))
    assert sum(math.prod(shape) for shape in found.values()) == COUNTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_counts_as_many(name):
    """In its torch model of the config, without memory: its parameters, and what else it keeps in files."""
    # A copy: transformers writes into the dicts that it is given.
    config = copy.deepcopy(text_config(PUBLISHED[name]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    stored = [buffer for key, buffer in model.named_buffers() if key in model.state_dict()]
    assert sum(part.numel() for part in [*model.parameters(), *stored]) == COUNTS[name]


@pytest.mark.parametrize("name", STATED)
def test_sizes_are_what_their_makers_say_to_the_last_digit(name):
    """Some cut the digits that follow, others round."""
    figure, beside = STATED[name]
    unit = 10.0 ** Decimal(figure).normalize().as_tuple().exponent
    assert abs(COUNTS[name] / 1e9 + beside - float(figure)) < unit


def test_every_family_has_a_released_model():
    there = {config["model_type"] for config in PUBLISHED.values()}
    there |= {text_config(config)["model_type"] for config in PUBLISHED.values()}
    without = {name for name, family in FAMILIES.items() if not there & {name, *family.language_models}}
    assert not without


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B-v0.1"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "Mistral-7B-v0.1"),
        ("mistralai/Mistral-7B-Instruct-v0.3", None),  # which has more tokens
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", None),
        ("google/gemma-3n-E4B-it", "gemma-3n-E4B"),
        ("swiss-ai/Apertus-8B-Instruct-2509", "Apertus-8B-2509"),
        ("mistralai/Ministral-3-8B-Instruct-2512", "Ministral-3-8B-Base-2512"),
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "Mistral-Small-3.1-24B-Base-2503"),
        ("baidu/ERNIE-4.5-21B-A3B-PT", "ERNIE-4.5-21B-A3B"),
        ("tencent/Hunyuan-7B-Pretrain", "Hunyuan-7B"),
        ("deepseek-ai/DeepSeek-V3", "DeepSeek-V3"),
        ("LiquidAI/LFM2-1.2B", "LFM2-1.2B"),
        ("somebody/Llama-2-7b", None),
        ("Llama-2-7b", None),
    ],
)
def test_models_are_found_by_their_ids(source, name):
    assert find(source) == (PUBLISHED[name] if name else None)
