"""Continuing from a PEFT adapter directory, `config.adapter.source`: its settings."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import lora
from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.weights.peft.adapter import StoredAdapter, open_adapter
from ftjax.weights.peft.keys import EMBEDDING


def stored_adapter(config: ConfigDict, spec: DecoderSpec) -> StoredAdapter | None:
    """The adapter in the directory `config.adapter.source`; None if that is empty.

    Its ranks, alphas, kind, targets and modules_to_save are the run's. Raises UserError where a key of config.adapter
    is neither the default nor what the adapter has.
    """
    if not config.adapter.source:
        return None
    stored = open_adapter(Path(config.adapter.source), spec)
    stored_settings, defaults = _settings(stored), configs.defaults().adapter
    changed = {key: config.adapter[key] for key in defaults if key not in ("source", "dropout")}
    changed = {key: value for key, value in changed.items() if _plain(value) != _plain(defaults[key])}
    if wrong := {key: value for key, value in changed.items() if _plain(value) != _plain(stored_settings.get(key))}:
        instead = {key: f" (there it is {value!r})" for key, value in stored_settings.items()}
        lines = [f"adapter.{key}={value!r}{instead.get(key, '')}" for key, value in wrong.items()]
        raise UserError(
            f"config.adapter.source={config.adapter.source!r} already says what the run's adapter is; leave these "
            "keys at their defaults:\n  " + "\n  ".join(lines)
        )
    return stored


def effective(config: ConfigDict, spec: DecoderSpec) -> ConfigDict:
    """A copy of the config with the settings of the stored adapter in `adapter`, for descriptions of the run."""
    stored = stored_adapter(config, spec)
    out = ConfigDict(configs.as_json(config))
    if stored is not None:
        out.adapter.update(_settings(stored))
        out.adapter.targets = ",".join(sorted({path.rpartition("/")[2] for path in stored.modules}))
        out.adapter.modules_to_save = sorted({path.split("/")[-2] for path in stored.saved})
    return out


def path_of(module: str) -> str:
    """layers/mlp/up_proj -> layers/mlp/up_proj/kernel: the parameter that the module's adapter adapts."""
    return f"{module}/embedding" if module == EMBEDDING else f"{module}/kernel"


def _settings(stored: StoredAdapter) -> dict[str, Any]:
    settings = stored.settings
    return {
        "kind": "dora" if settings.dora else "lora",
        "rank": settings.rank,
        "alpha": float(settings.alpha),
        "rslora": settings.rslora,
        "layers": "" if stored.in_all_layers else lora.layers_as_text(stored.layer_numbers),
    }


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
