"""What the config.json of released models say about their shape: `published.json`, {name of the model: config}.

So that a model can be planned for whose files are not here, or not to be had without a license. The keys are the files'
own, old spellings included. What changes no size is not whole: LongRoPE's factors, 48 numbers each or 64, are left at
one value; multipliers and ids of tokens are not there. Of most multimodal models it is the language model's config.
"""

import json
import re
from importlib import resources
from typing import Any

OWNERS = [
    "meta-llama",
    "HuggingFaceTB",
    "mistralai",
    "Qwen",
    "google",
    "microsoft",
    "allenai",
    "ibm-granite",
    "openai",
    "openai-community",
    "bigcode",
    "baidu",
    "ByteDance-Seed",
    "CohereLabs",
    "CohereForAI",
    "THUDM",
    "zai-org",
    "tiiuae",
    "nvidia",
    "deepseek-ai",
    "LiquidAI",
    "swiss-ai",
    "arcee-ai",
    "LGAI-EXAONE",
    "kyutai",
    "tencent",
    "MiniMaxAI",
    "stabilityai",
]


def configs() -> dict[str, dict[str, Any]]:
    return json.loads(resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8"))


def find(source: str) -> dict | None:
    """The config of a model by its Hugging Face id, the tuned variants of a size included; None if it is not here."""
    owner, _, name = source.rpartition("/")
    if owner not in OWNERS:
        return None
    return next((config for known, config in configs().items() if _size(known) == _size(name)), None)


def _size(name: str) -> str:
    """Without what tells the tuned variants of a size apart: "Llama-2-7b-chat-hf" is a "llama-2-7b"."""
    return re.sub(r"-(instruct|it|pt|chat|hf|base|pretrain)(?=-|$)", "", name.lower())
