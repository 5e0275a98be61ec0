"""What the families with a vision tower have in common."""

from collections.abc import Mapping


def of_layers(prefix: str, modules: Mapping[str, str]) -> dict[str, str]:
    """{our path: Hugging Face name, with {} for the layer} of what a tower's layers may have.

    prefix: of the names of a layer; modules: {ours: theirs}, linear layers and norms.
    """
    names = {}
    for ours, theirs in modules.items():
        leaf = "scale" if ours.startswith("norm") else "kernel"
        names |= {f"vision/layers/{ours}/{leaf}": f"{prefix}.{theirs}.weight"}
        names |= {f"vision/layers/{ours}/bias": f"{prefix}.{theirs}.bias"}
    return names
