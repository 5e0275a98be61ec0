"""Which family an unknown model resembles most, by the keys of its config that each family reads."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import shorten

# Of training, generation and files: they say nothing of the function that a model computes.
_NEUTRAL = ("dropout", "_pdrop", "_token_id", "_token_ids", "initializer", "init_", "_version", "_loss", "_coef")
_NEUTRAL_KEYS = {
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "chunk_size_feed_forward", "dtype",
    "gradient_checkpointing", "id2label", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "output_router_logits", "problem_type", "return_dict", "text_config", "torch_dtype", "transformers_version",
    "use_cache", "use_return_dict", "vision_config",
}  # fmt: skip
_MOST = 12  # keys in a message


class _Noting(dict):
    """A config that notes which of its keys are asked for, also once it is merged with others."""

    def __init__(self, content: Mapping[str, Any], asked: set[str]):
        super().__init__(content)
        self.asked = asked

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __or__(self, other):
        return _Noting({**self, **other}, self.asked)

    def __ror__(self, other):
        return _Noting({**other, **self}, self.asked)


def likeness(config: Mapping[str, Any], families: Mapping[str, Callable[[dict[str, Any]], Any]]) -> str:
    """The part of a message about an unknown `config`: the family that leaves the fewest of its settings unread.

    families: {model_type: from a config to a spec}. Of families that leave equally many, one that refuses none of the
    others comes first, then one whose name is like the config's. "" where the config has none of
    the sizes of a decoder with attention.
    """
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    settings = {key: value for key, value in inner.items() if _counts(key, value)}
    if not settings.keys() >= {"hidden_size", "num_attention_heads"}:
        return ""
    found = {name: _compared(settings, name, spec) for name, spec in families.items()}
    name = min(found, key=lambda name: (len(found[name][0]), found[name][1] != "", -_alike(inner, name)))
    unread, refusal = found[name]
    shown = [f"{key}={shorten(settings[key])}" for key in unread[:_MOST]]
    more = f" and {len(unread) - _MOST} more" if len(unread) > _MOST else ""
    what = "Its config" if inner is config else "Its text_config"
    words = f". {what} resembles that of a {name!r} model most, "
    words += (
        f"which has no {', '.join(shown)}{more}" if shown else "which reads all of it, though its program may differ"
    )
    return words + (f"; as such a one it would be refused ({refusal})" if refusal else "")


def _counts(key: str, value: Any) -> bool:
    """Whether it is a setting of the model that is switched on."""
    if key in _NEUTRAL_KEYS or any(part in key for part in _NEUTRAL):
        return False
    return value not in (None, False, 0, "", [], {})


def _compared(settings: Mapping[str, Any], name: str, spec: Callable[[dict[str, Any]], Any]) -> tuple[list[str], str]:
    """The settings that the family `name` never asks for, and why it would refuse them ("" if it would not)."""
    asked, refusals, rest = set(), [], dict(settings)
    while True:
        try:
            spec(_Noting(rest, asked) | {"model_type": name})
        except UserError as error:
            refusals.append(str(error).removeprefix("config.json: "))
            blamed = [key for key, value in rest.items() if _named(key, value, refusals[-1])]
            rest = {key: value for key, value in rest.items() if key not in blamed}
            if blamed and len(refusals) < _MOST:
                continue  # without what was refused, for what it reads after that
        return sorted(settings.keys() - asked), "; ".join(refusals)


def _named(key: str, value: Any, message: str) -> bool:
    return any(name in message for name in (key, *(value if isinstance(value, dict) else ())))


def _alike(config: Mapping[str, Any], name: str) -> float:
    return difflib.SequenceMatcher(None, str(config.get("model_type")), name).ratio()
