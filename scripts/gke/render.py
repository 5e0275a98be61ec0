"""Prints the JobSet of a run on TPU slices of GKE: python scripts/gke/render.py OPTIONS -- ARGUMENTS OF ftjax.train

    python scripts/gke/render.py --name support --image REGION-docker.pkg.dev/PROJECT/ftjax/ftjax:1 --claim ftjax \\
        --type v5e --topology 4x4 -- --config configs/llama3_1_8b_lora.py --workdir /mnt/ftjax/support \\
        | kubectl apply -f -

It needs nothing but Python. See docs/gke.md.
"""

import argparse
import itertools
import json
import math
import re
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple

TEMPLATE = Path(__file__).with_name("jobset.yaml")


class TpuType(NamedTuple):
    """A TPU generation in GKE."""

    accelerator: str  # the value of the node label cloud.google.com/gke-tpu-accelerator
    axes: int  # of its topologies
    one_host: tuple[str, ...]  # topologies that are a single host


TPU_TYPES = {
    "v4": TpuType("tpu-v4-podslice", 3, ("2x2x1",)),
    "v5e": TpuType("tpu-v5-lite-podslice", 2, ("1x1", "2x2", "2x4")),
    "v5p": TpuType("tpu-v5p-slice", 3, ("2x2x1",)),
    "v6e": TpuType("tpu-v6e-slice", 2, ("1x1", "2x2", "2x4")),
}
CHIPS_PER_HOST = 4  # of every slice of several hosts


def slice_shape(tpu_type: str, topology: str, chips_per_host: int | None) -> tuple[int, int]:
    """(hosts in a slice, chips on each). Raises ValueError for a topology that this type of TPU does not have."""
    sizes = [int(size) for size in topology.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", topology) else []
    axes = TPU_TYPES[tpu_type].axes
    if len(sizes) != axes:
        raise ValueError(f"--topology {topology}: {tpu_type} has {axes} axes, as in {'4x4' if axes == 2 else '2x2x4'}")
    chips = math.prod(sizes)
    on_each = chips_per_host or (chips if topology in TPU_TYPES[tpu_type].one_host else CHIPS_PER_HOST)
    if on_each not in (1, 4, 8) or chips % on_each:
        raise ValueError(f"--topology {topology} has {chips} chips, not hosts of {on_each}; see --chips-per-host")
    return chips // on_each, on_each


def render(options: argparse.Namespace, arguments: list[str]) -> str:
    """The manifest. Raises ValueError, with the option's name, for mistakes that would only show on the cluster."""
    hosts, chips = slice_shape(options.type, options.topology, options.chips_per_host)
    # Kubernetes does not shorten names, and NAME-slice-0-0 must be a valid host name.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise ValueError(f"--name {options.name}: small letters, digits and -, a letter first, 40 at most")
    if options.slices < 1 or options.grace < 0 or options.max_restarts < 0:
        raise ValueError("--slices must be 1 or more, --grace and --max-restarts 0 or more")
    if options.slices > 1 and hosts == 1:
        raise ValueError(f"--slices {options.slices}: GKE joins slices of several hosts only, not {options.topology}")
    _check_workdir(arguments, PurePosixPath(options.mount))
    values = {
        "NAME": options.name,
        "NAMESPACE": options.namespace,
        "LABELS": {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {},
        "MAX_RESTARTS": options.max_restarts,
        "SLICES": options.slices,
        "HOSTS": hosts,
        "CHIPS": chips,
        "GRACE": options.grace,
        "HOST_NETWORK": options.slices > 1,
        "DNS_POLICY": "ClusterFirstWithHostNet" if options.slices > 1 else "ClusterFirst",
        "NODE_SELECTOR": {
            "cloud.google.com/gke-tpu-accelerator": TPU_TYPES[options.type].accelerator,
            "cloud.google.com/gke-tpu-topology": options.topology,
        }
        | ({"cloud.google.com/gke-spot": "true"} if options.spot else {}),
        "TOLERATIONS": [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}]
        if options.spot
        else [],
        "IMAGE": options.image,
        # Kubernetes replaces $(NAME) by a variable, and $$ by a $.
        "ARGUMENTS": [argument.replace("$", "$$") for argument in arguments],
        "ENVIRONMENT": _environment(options),
        "MOUNT": options.mount,
        "CLAIM": options.claim,
    }
    return re.sub(r"\$\{([A-Z_]+)\}", lambda match: _yaml(values[match[1]]), TEMPLATE.read_text())


def _yaml(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        raise ValueError(f"{text}: has a character that YAML cannot hold")
    return text


def _check_workdir(arguments: list[str], mount: PurePosixPath) -> None:
    workdirs = [word.partition("=")[2] for word in arguments if word.startswith("--workdir=")]
    workdirs += [after for word, after in itertools.pairwise(arguments) if word == "--workdir"]
    if not workdirs:
        raise ValueError(f"give --workdir {mount}/... after --: a pod's own disk is deleted with the pod")
    if mount not in PurePosixPath(workdirs[-1]).parents:
        raise ValueError(f"--workdir {workdirs[-1]} does not lie below {mount}, where the volume is (--mount)")


def _environment(options: argparse.Namespace) -> list[dict]:
    variables = [{"name": "HF_HOME", "value": f"{options.mount}/huggingface"}]
    for setting in options.env:
        name, equals, value = setting.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"--env {setting}: not KEY=VALUE")
        variables = [variable for variable in variables if variable["name"] != name]
        variables.append({"name": name, "value": value.replace("$", "$$")})
    if options.token_secret:
        reference = {"secretKeyRef": {"name": options.token_secret, "key": "token"}}
        variables.append({"name": "HF_TOKEN", "valueFrom": reference})
    return variables


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--name", required=True, help="the name of the JobSet")
    out.add_argument("--image", required=True, help="a container image with ftjax and jax[tpu]; see docs/gke.md")
    out.add_argument("--claim", required=True, help="a ReadWriteMany volume claim, on which the workdir lies")
    out.add_argument("--type", required=True, choices=TPU_TYPES, help="the TPU generation")
    out.add_argument("--topology", required=True, help="of one slice, such as 4x4 (v5e, v6e) or 2x2x4 (v4, v5p)")
    out.add_argument("--slices", type=int, default=1, help="node pools of that topology to train on together")
    out.add_argument("--chips-per-host", type=int, help="if the node pool's machines are of another size: 1, 4 or 8")
    out.add_argument("--spot", action="store_true", help="on spot machines")
    out.add_argument("--mount", default="/mnt/ftjax", help="where the claim is mounted (%(default)s)")
    out.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    out.add_argument("--token-secret", metavar="SECRET", help="a secret whose key `token` becomes HF_TOKEN")
    out.add_argument("--namespace", default="default")
    out.add_argument("--queue", help="Kueue's local queue")
    out.add_argument("--grace", type=int, default=600, help="seconds for the last save (%(default)s)")
    out.add_argument("--max-restarts", type=int, default=10, help="after failures that are no preemption (%(default)s)")
    return out


def main(words: list[str]) -> int:
    split = words.index("--") if "--" in words else len(words)
    options = parser().parse_args(words[:split])
    try:
        print(render(options, words[split + 1 :]), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
