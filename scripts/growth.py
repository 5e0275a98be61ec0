"""How cost grows, measured on this machine: python scripts/growth.py

What should be linear or flat is drawn over what it should not depend on: seconds of a step over tokens, the compiler's
memory for a step over the vocabulary and over the length of rows, seconds of compilation over depth, seconds a row of
reading over rows, memory to load weights over their size. The models are small and random. Minutes on two CPU cores.
--write puts table and plots into docs/performance.md.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from bench_step import arrays
from pages import DOCS, write_measured

from ftjax import choices, sharding, tree
from ftjax import config as configs
from ftjax.atomic import write_rows
from ftjax.data.read.sources import read_sources
from ftjax.memory import of_device
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.planning import compiled
from ftjax.reporting.charts import figure, ticks
from ftjax.weights.hf.write import write_model
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

SIZES = {  # of the small model, in Hugging Face's words
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
WIDE = SIZES | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}


class Growth(NamedTuple):
    """One measured dependence."""

    what: str
    over: str
    expected: str  # linear, flat, or by what it grows
    points: list[tuple[float, float]]

    @property
    def factor(self) -> str:
        """How the last of it is to the first, beside what it is over."""
        (first, low), (last, high) = self.points[0], self.points[-1]
        return f"{last / first:.4g} times as many: {high / low:.2f} times"


def program(rows: int, length: int, **sizes: int):
    """A step of LoRA on the small model with these sizes instead, on this machine's devices."""
    spec = spec_from_config(SIZES | sizes)
    config = configs.changed(
        configs.defaults(),
        {
            "model.source": "small",
            "model.dtype": "float32",
            "model.param_dtype": "float32",
            "model.remat": "none",
            "data.train": ("none",),
            "data.batch_size": rows,
            "data.max_length": length,
            "accumulate": 1,
        },
    )
    mesh = sharding.make_mesh(dict(config.mesh))
    return compiled.describe(choices.without_data(config, spec, mesh, of_device(mesh)), spec, jax.devices())


def compile_step(its):
    with jax.set_mesh(its.mesh):
        given = arrays(its, 0.0)
        return its.step.lower(*given).compile(), given


def step_time(tokens: int, rounds: int = 5) -> float:
    """Seconds, the median."""
    its = program(tokens // 256, 256)
    step, (state, frozen, batch) = compile_step(its)
    seconds = []
    with jax.set_mesh(its.mesh):
        for _ in range(rounds + 1):
            began = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def step_memory(rows: int, length: int, **sizes: int) -> float:
    """MB beside parameters and batch, as the compiler has it."""
    return compile_step(program(rows, length, **sizes))[0].memory_analysis().temp_size_in_bytes / 1e6


def compile_time(depth: int) -> float:
    its = program(1, 256, num_hidden_layers=depth)
    with jax.set_mesh(its.mesh):
        lowered = its.step.lower(*arrays(its, 0.0))
        began = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - began


def reading_time(rows: int) -> float:
    """Microseconds a row: indexed, then each read in an order of its own, as in training."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.jsonl"
        write_rows(file, ({"prompt": f"Question {i}?", "completion": f"Answer {i}. " * 8} for i in range(rows)))
        began = time.perf_counter()
        found = read_sources([{"source": str(file)}])
        for number in np.random.default_rng(0).permutation(len(found)):
            found[int(number)]
        return (time.perf_counter() - began) / rows * 1e6


def load_memory(layers: int) -> float:
    """MB at the peak beside the weights, of a process that loads them."""
    model = Decoder(spec_from_config(WIDE | {"num_hidden_layers": layers}))
    with tempfile.TemporaryDirectory() as place:
        mesh = sharding.make_mesh({"fsdp": -1})
        leaves = tree.flatten(abstract_params(model, mesh))
        params = tree.unflatten({path: np.full(leaf.shape, 0.01, np.float32) for path, leaf in leaves.items()})
        write_model(Path(place), params, model.spec, WIDE | {"num_hidden_layers": layers}, max_shard_bytes=50_000_000)
        # A process of its own, and one that begins anew: a fork would begin with this one's peak.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peak_beside, Path(place)).result()


def peak_beside(place: Path) -> float:
    """MB that this process has at most while it loads the model of a directory, beside the weights themselves; 0 where
    they take what it had before."""
    reader = open_source(place)
    model, mesh = Decoder(spec_from_config(reader.config)), sharding.make_mesh({"fsdp": -1})
    before = resident("VmRSS")
    params = load_params(reader, model.spec, abstract_params(model, mesh))
    return max(0.0, resident("VmHWM") - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6)


def resident(which: str) -> float:
    """MB of this process, by Linux: VmRSS now, VmHWM at its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0]) / 1e3


GROWTH = {
    "step": ("seconds of a step", "tokens", "linear", step_time, (256, 512, 1024, 2048, 4096)),
    "vocabulary": (
        "MB of a step, 2,048 tokens",
        "vocabulary",
        "by the logits of a block of tokens",
        lambda size: step_memory(8, 256, vocab_size=size),
        (8192, 16384, 32768, 65536, 131072),
    ),
    "length": (
        "MB of a step, 8,192 tokens",
        "tokens of a row",
        "flat",
        lambda length: step_memory(8192 // length, length),
        (256, 512, 1024, 2048, 4096, 8192),
    ),
    "depth": ("seconds of compilation", "layers", "flat", compile_time, (8, 16, 32, 48, 64, 80)),
    "load": ("MB to load weights, beside them", "layers of 17 MB", "flat", load_memory, (4, 8, 16, 32, 64)),
    "rows": ("microseconds to read a row", "rows", "flat", reading_time, (1000, 4000, 16000, 64000, 256000)),
}


def measure(names: Sequence[str]) -> list[Growth]:
    found = []
    for name in names:
        what, over, expected, of, sizes = GROWTH[name]
        points = []
        for size in sizes:
            points.append((size, of(size)))
            print(f"{over} {size:,}: {figure(points[-1][1])} {what}", file=sys.stderr, flush=True)
        found.append(Growth(what, over, expected, points))
    return found


def table(found: Sequence[Growth]) -> str:
    lines = ["| | over | measured | expected |", "| --- | --- | --- | --- |"]
    for its in found:
        values = ", ".join(f"{figure(value)} at {size:,.0f}" for size, value in its.points)
        lines.append(f"| {its.what} | {its.over} | {values}; {its.factor} | {its.expected} |")
    return "\n".join(lines) + "\n"


PANEL, HEIGHT, LEFT, BOTTOM, TOP = 300, 200, 60, 40, 24


def plot(found: Sequence[Growth]) -> str:
    """SVG: a panel for each, its axis from 0, so that what is flat looks flat and what is linear goes through the
    corner."""
    across = min(len(found), 3)
    size = PANEL * across, HEIGHT * -(-len(found) // across)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" '
        'font-size="11" role="img" aria-label="How cost grows">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
    ]
    for number, its in enumerate(found):
        left, top = PANEL * (number % across) + LEFT, HEIGHT * (number // across) + TOP
        width, height = PANEL - LEFT - 20, HEIGHT - TOP - BOTTOM
        most, highest = its.points[-1][0], 1.15 * max(value for _, value in its.points)
        place = [(left + width * size / most, top + height * (1 - value / highest)) for size, value in its.points]
        out.append(f'<text x="{left}" y="{top - 8}" font-weight="bold">{its.what}</text>')
        out.append(f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#888"/>')
        for value in ticks(0, highest, 4):
            y = top + height * (1 - value / highest)
            out.append(f'<path d="M{left} {y:.1f}H{left + width}" stroke="#eee"/>')
            out.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{figure(value)}</text>')
        for value in ticks(0, most, 3)[1:]:
            x = left + width * value / most
            out.append(f'<text x="{x:.1f}" y="{top + height + 15}" text-anchor="middle">{value:,.0f}</text>')
        out.append(f'<text x="{left + width / 2}" y="{top + height + 30}" text-anchor="middle">{its.over}</text>')
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
        out.append(f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#06c"/>' for x, y in place]
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(GROWTH), help="these alone, may be repeated")
    parser.add_argument("--json", action="store_true", help="print the points instead of the table")
    parser.add_argument("--write", action="store_true", help="also write docs/growth.svg and the page's table")
    args = parser.parse_args()
    found = measure(args.only or list(GROWTH))
    print(json.dumps([its._asdict() for its in found], indent=2) if args.json else table(found))
    if args.write:
        (DOCS / "growth.svg").write_text(plot(found))
        write_measured("performance.md", f"{table(found)}\n![How cost grows](growth.svg)\n", "growth")


if __name__ == "__main__":
    main()
