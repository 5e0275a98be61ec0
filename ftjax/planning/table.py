"""A plan as a person reads it, and as JSON."""

import dataclasses
from collections import defaultdict
from typing import Any

from ml_collections import ConfigDict

from ftjax.assemble import Program
from ftjax.planning.advice import Tried
from ftjax.planning.chips import GIB
from ftjax.planning.compiled import Plan
from ftjax.planning.roofline import ASSUMPTIONS
from ftjax.planning.topology import Topology
from ftjax.planning.writing import Writing


def as_json(config: ConfigDict, topology: Topology, program: Program, plan: Plan) -> dict[str, Any]:
    """Bytes on a chip, FLOPs and bytes of a step on a chip, seconds; `model_flops` is of the whole step."""
    chip = topology.chip
    out: dict[str, Any] = {
        "topology": str(topology),
        "chips": topology.chips,
        "mesh": dict(program.mesh.shape.items()),
        "remat": config.model.remat,
        "accumulate": config.accumulate,
        "rows": config.data.batch_size,
        "length": program.row_length,
        "fits": plan.fits,
        "hbm_usable": chip.usable,
        "lacking": max(plan.lacking, 0.0),
        "model_flops": plan.flops.total,
    }
    if plan.memory is None:
        return out
    memory, limits = plan.memory, plan.roofline
    tokens = program.tokens
    out |= {
        "memory": dataclasses.asdict(memory) | {"total": memory.total},
        "flops": plan.executed,
        "hbm_bytes": plan.moved,
        "collectives": collective_bytes(plan),
        "seconds": limits.terms | {"step": limits.step},
        "bound": limits.bound,
        "tokens_per_second_per_chip": tokens / topology.chips / limits.step,
        "mfu_at_most": plan.flops.total / topology.chips / chip.flops / limits.step,
        "unknown_loops": list(plan.unknown_loops),
        "assumptions": list(ASSUMPTIONS),
    }
    return out


def writing(found: Writing, step: float | None) -> dict[str, Any]:
    """Of a round, as `as_json`. step: seconds of a training step, where it fits."""
    out = {name: getattr(found, name) for name in ("slots", "capacity", "prompts", "completions", "tokens", "steps")}
    out |= {"fits": found.fits, "lacking": max(found.lacking, 0.0)}
    out["memory"] = {"training": found.training, "cache": found.cache}
    if found.token is None:
        return out
    out["memory"] |= {"temporaries": found.temporaries, "total": found.total}
    out["seconds"] = {"prefill": found.prefill, "decode": found.decode, "writing": found.seconds}
    out["seconds_per_token"] = found.token.terms | {"token": found.token.step}
    out["bound"] = found.token.bound
    if step is not None:
        out["seconds"] |= {"steps": found.steps * step, "round": found.seconds + found.steps * step}
    return out


def writing_rows(report: dict[str, Any], usable: float) -> dict[str, str]:
    """The lines of its table, from `writing`."""
    out = {
        "round": f"{report['completions']} completions of {report['prompts']} prompts, for {report['steps']} step(s)",
        "slots": f"{report['slots']} of {report['capacity']} tokens, each of which writes {report['tokens']}",
    }
    for name, size in report["memory"].items():
        if name != "total":
            out[f"  {name}"] = f"{size / GIB:8.3f} GiB"
    lacking = f"does not fit, by {report['lacking'] / GIB:.2f} GiB"
    if "seconds" not in report:
        return out | {"memory of a chip": lacking}
    total, seconds, token = report["memory"]["total"], report["seconds"], report["seconds_per_token"]
    verdict = "fits" if report["fits"] else lacking
    out["memory of a chip"] = f"{total / GIB:8.3f} GiB of {usable / GIB:.2f} usable: {verdict}"
    terms = ", ".join(f"{name} {1000 * s:,.2f} ms" for name, s in token.items() if name != "token")
    out["a token of every slot"] = f"{1000 * token['token']:,.2f} ms at least, bound by {report['bound']} ({terms})"
    out["writing at least"] = f"{seconds['writing']:,.1f} s, of them {seconds['prefill']:,.1f} s to read the prompts"
    if "round" in seconds:
        share = seconds["writing"] / seconds["round"]
        out["round at least"] = f"{seconds['round']:,.1f} s, {share:.0%} of it writing"
    return out


def collective_bytes(plan: Plan) -> list[dict[str, Any]]:
    """For each kind over each mesh axis: how many, and the bytes that they bring to a chip."""
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for collective in plan.collectives:
        entry = sums[collective.kind, collective.axes]
        entry[0] += collective.times
        entry[1] += collective.ici
        entry[2] += collective.dcn
    rows = sorted(sums.items(), key=lambda item: -sum(item[1][1:]))
    return [
        {"kind": kind, "axes": list(axes), "times": times, "ici": ici, "dcn": dcn}
        for (kind, axes), (times, ici, dcn) in rows
    ]


def rows(report: dict[str, Any], topology: Topology) -> dict[str, str]:
    """The lines of the table: {name: text}, from `as_json`."""
    chip, usable = topology.chip, report["hbm_usable"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    out = {
        "chips": f"{report['chips']} of {chip.hbm / GIB:.0f} GiB and {chip.flops / 1e12:.0f} TFLOP/s, {topology}",
        "mesh": mesh,
    }
    if beside := report.get("reward_models"):
        out["reward models"] = f"{beside / GIB:8.3f} GiB, which leave {usable / GIB:.2f} usable"
    out["step"] = (
        f"{report['rows']} rows of {report['length']} tokens, {report['accumulate']} micro-batch(es), "
        f"remat {report['remat']}"
    )
    if "memory" not in report:
        return out | {
            "memory": f"does not fit: {report['lacking'] / GIB:.2f} GiB more than the {usable / GIB:.2f} usable"
        }
    for name, size in report["memory"].items():
        if name not in ("total", "host") and (size or name != "teacher"):
            out[f"  {name}"] = f"{size / GIB:8.3f} GiB"
    total = report["memory"]["total"]
    verdict = "fits" if report["fits"] else f"does not fit, by {report['lacking'] / GIB:.2f} GiB"
    out["memory of a chip"] = f"{total / GIB:8.3f} GiB of {usable / GIB:.2f} usable: {verdict}"
    if host := report["memory"]["host"]:
        out["memory of its host"] = f"{host / GIB:8.3f} GiB for each chip"
    out["FLOPs of a chip"] = (
        f"{report['flops'] / 1e12:,.1f} TFLOP, of them {report['model_flops'] / report['chips'] / 1e12:,.1f} needed"
    )
    out["HBM traffic"] = f"{report['hbm_bytes'] / GIB:,.1f} GiB"
    for collective in report["collectives"]:
        if collective["ici"] + collective["dcn"] > 2**20:
            over = " x ".join(collective["axes"])
            sizes = {name.upper(): collective[name] for name in ("ici", "dcn")}
            parts = [f"{size / GIB:,.3f} GiB over {name}" for name, size in sizes.items() if size]
            out[f"  {collective['kind']} {over}"] = ", ".join(parts)
    out["least time"] = ", ".join(
        f"{name} {1000 * s:,.0f} ms" for name, s in report["seconds"].items() if name != "step"
    )
    out["step at least"] = f"{1000 * report['seconds']['step']:,.0f} ms, bound by {report['bound']}"
    out["tokens/s and chip"] = f"{report['tokens_per_second_per_chip']:,.0f} at most"
    out["MFU"] = f"{100 * report['mfu_at_most']:.0f}% at most"
    if topology.slices > 1 and not any(collective["dcn"] for collective in report["collectives"]):
        out["DCN"] = "no transfer between slices was found in the program, so none is counted"
    if report["unknown_loops"]:
        out["loops counted once"] = ", ".join(report["unknown_loops"])
    return out


def tried(attempts: list[Tried]) -> list[dict[str, Any]]:
    """Each setting that was tried with its outcome; those that fit come first, the fastest of them first."""
    out = []
    for attempt in attempts:
        entry: dict[str, Any] = {"changes": list(attempt.candidate.changes), "fits": False}
        if attempt.plan is None:
            entry["reason"] = attempt.reason
        else:
            entry |= {"fits": attempt.plan.fits, "lacking": max(attempt.plan.lacking, 0.0)}
            if attempt.plan.roofline is not None:
                entry["total"] = attempt.plan.memory.total
                entry["seconds"] = attempt.plan.roofline.step
                entry["bound"] = attempt.plan.roofline.bound
        out.append(entry)
    return sorted(out, key=lambda entry: (not entry["fits"], entry.get("seconds", 0.0)))


def tried_rows(entries: list[dict[str, Any]]) -> dict[str, str]:
    """{changes as flags: outcome as text}, from `tried`."""
    out = {}
    for entry in entries:
        if "reason" in entry:
            text = entry["reason"]
        elif entry["fits"]:
            step = f"step at least {1000 * entry['seconds']:,.0f} ms, bound by {entry['bound']}"
            text = f"fits: {entry['total'] / GIB:.2f} GiB, {step}"
        else:
            text = f"does not fit, by {entry['lacking'] / GIB:.2f} GiB"
        out[" ".join(f"--config.{change}" for change in entry["changes"])] = text
    return out
