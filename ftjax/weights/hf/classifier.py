"""Models whose head gives numbers instead of tokens, as transformers stores them: reward models and classifiers.

A ...ForSequenceClassification gives `num_labels` numbers for a text, read at the last token that is not padding, a
...ForTokenClassification for every token. Neither has an output head for tokens.
"""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ftjax.errors import UserError
from ftjax.models.families import FAMILIES
from ftjax.weights.hf.keys import FLOATS, finite_cast
from ftjax.weights.hf.quantized import Unpacked

FACTS = "ftjax_reward"  # our own key of a config.json, see `Head.facts`
TEXTS, TOKENS = "ForSequenceClassification", "ForTokenClassification"
MODULES = ("score", "classifier")  # the names that a head has, which peft always saves whole
_STEMS = {
    "gemma3_text": "Gemma3Text",
    "qwen3_5_text": "Qwen3_5Text",
}  # where other classes of the family are called otherwise
# In transformers 5.24.
_WITHOUT = {TEXTS: {"granite", "ernie4_5", "cohere2", "apertus", "lfm2", "qwen3_5_moe_text"}}
_WITHOUT[TEXTS] |= {"glm4_moe", "glm4_moe_lite", "gemma3n_text", "gemma4_text", "granitemoehybrid", "falcon_h1"}
_WITHOUT[TEXTS] |= {"nemotron_h", "granitemoe", "llama4_text", "ernie4_5_moe", "minimax_m2"}
_WITHOUT[TOKENS] = {"granite", "ernie4_5", "cohere2", "gemma3_text", "hunyuan_v1_dense", "olmo", "olmo2", "olmo3"}
_WITHOUT[TOKENS] |= {"lfm2", "qwen3_5_moe_text", "qwen3_5_text", "deepseek_v2", "glm4_moe", "glm4_moe_lite"}
_WITHOUT[TOKENS] |= {"gemma3n_text", "gemma4_text", "granitemoehybrid", "falcon_h1", "nemotron_h"}
_WITHOUT[TOKENS] |= {"granitemoe", "llama4_text", "ernie4_5_moe", "minimax_m2", "phimoe", "hunyuan_v1_moe"}
# Multimodal ones, which an adapter needs.
_MULTIMODAL = {"gemma3n", "gemma4", "llama4", "mistral3", "qwen2_5_vl", "qwen3_5_moe"}
_WITHOUT[TEXTS] |= _MULTIMODAL
_WITHOUT[TOKENS] |= _MULTIMODAL | {"gemma3"}
_LM_HEAD = "lm_head.weight"


class Head(NamedTuple):
    """A head of numbers to write.

    Attributes:
      kernel: float32 [D, K].
      labels: the name of each of the K numbers.
      of_tokens: whether it is for every token, and not for a text.
      pad: the token that pads, with which no text may end; None where there is no such token.
      facts: what scores are made of besides, such as their mean and standard deviation; transformers does not use it.
    """

    kernel: Any
    labels: tuple[str, ...]
    of_tokens: bool = False
    pad: int | None = None
    facts: Mapping[str, Any] = types.MappingProxyType({})

    @property
    def kind(self) -> str:
        return TOKENS if self.of_tokens else TEXTS

    @property
    def shape(self) -> tuple[int, int]:
        """[K, D], as in files."""
        return self.kernel.shape[::-1]


def is_there(family: str, kind: str) -> bool:
    """Whether transformers has a class for a family and TEXTS or TOKENS."""
    return family not in _WITHOUT[kind]


def architecture(family: str, kind: str) -> str:
    """transformers' class for a family (a `model_type`) and TEXTS or TOKENS; UserError where it has none."""
    if not is_there(family, kind):
        raise UserError(
            f"transformers has no {kind} of the family {family!r}, so that this run's head has no place in its "
            "formats; use the run itself (--workdir), whose checkpoints hold it"
        )
    stem = FAMILIES[family].architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return _STEMS.get(family, stem) + kind


def module(family: str, kind: str) -> str:
    """transformers' name of the head, a linear layer; one of MODULES."""
    return "classifier" if (family, kind) == ("gpt2", TOKENS) else "score"


def classifier_config(config: dict[str, Any], head: Head) -> dict[str, Any]:
    """The config.json of a model of `config` with the head instead of one for tokens."""
    labels = dict(enumerate(head.labels))
    return config | {
        "architectures": [architecture(config["model_type"], head.kind)],
        "id2label": {str(i): label for i, label in labels.items()},
        "label2id": {label: i for i, label in labels.items()},
        "problem_type": "regression" if "mean" in head.facts else "single_label_classification",
        "pad_token_id": head.pad,
        FACTS: dict(head.facts),
    }


def kind_of(config: dict[str, Any]) -> str | None:
    """TEXTS or TOKENS, of the config of a model with such a head; None of any other."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else ""
    return next((kind for kind in (TEXTS, TOKENS) if isinstance(name, str) and name.endswith(kind)), None)


class ClassifierReader:
    """A reader of the decoder of a ...ForSequenceClassification or ...ForTokenClassification, and of its head.

    Its config is that of the same model with the embedding as output head, since files without one describe no other.
    """

    def __init__(self, reader: Unpacked):
        self.path: Path = reader.path
        self.config: dict[str, Any] = reader.config | {"tie_word_embeddings": True}
        self.kind = kind_of(reader.config)
        self._reader, self._head = reader, f"{module(reader.config.get('model_type'), self.kind)}.weight"

    def names(self) -> set[str]:
        own = (self._head, self._head.removesuffix("weight") + "bias", _LM_HEAD)
        return {name for name in self._reader.names() if name not in own}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._reader.dtype(name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part of a tensor that `index` selects."""
        return self._reader.read(name, index)

    def width(self) -> int:
        """How many numbers the head gives; UserError where the files do not hold one."""
        if self._head not in self._reader.names():
            raise UserError(f"{self.path}: missing: {self._head}, the head of a {self.kind}; get the weights again")
        return self._reader.shape(self._head)[0]

    def head(self) -> np.ndarray:
        """float32 [D, K]; UserError for one with a bias, which heads here have not."""
        self.width()
        return read_head(self._reader, self._head)


def read_head(reader: Any, name: str) -> np.ndarray:
    """float32 [D, K] of the head [K, D] called `name`, in a file or a directory; UserError where it has a bias."""
    bias = name.removesuffix("weight") + "bias"
    if bias in reader.names() and np.any(reader.read(bias).astype(np.float32)):
        raise UserError(f"{reader.path}: {bias} is not zero, and heads have no bias here; train a head without one")
    shape, dtype = reader.shape(name), reader.dtype(name).name
    if len(shape) != 2 or dtype not in FLOATS:
        raise UserError(f"{reader.path}: {name} is {dtype} {list(shape)}, not the matrix of a head")
    values = finite_cast(reader.read(name), np.dtype(np.float32), f"{reader.path}: {name}")
    return np.ascontiguousarray(values.T)
