"""What a round of completions needs, of a method whose model writes what it learns from: bytes, and its least time.

The engine's own loop is compiled for the slice, as the training step is: what it moves for a token of every slot is
then read from the program, the gathering of split weights included.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax import sharding
from ftjax.assemble import Program
from ftjax.memory import bytes_on_device
from ftjax.method import method_of, samples
from ftjax.planning import compiled, flops, hlo, traffic
from ftjax.planning.roofline import Roofline, roofline
from ftjax.planning.topology import Topology
from ftjax.sampling import engine, sizes, slots


@dataclass(frozen=True)
class Writing:
    """One round: the completions of `config.rollouts.iterations` steps. Bytes are on a chip, seconds the least.

    Attributes:
      slots: completions written together; capacity: tokens that each has room for at its end.
      training: bytes of what the step keeps, the weights that write among them.
      cache: of all slots at their full length.
      temporaries: of the engine's loop, by the compiler, or if that is more the cache of half the length, which lies
        beside while slots grow; None where the loop did not fit.
      prefill: seconds to read the prompts, each once, and what further turns answer, at the peak of the chip.
      token: of one token of every slot, with the cache as full as it is on average.
      tokens: that every slot chooses in a round, one after the other.
    """

    slots: int
    capacity: int
    prompts: int
    completions: int
    steps: int
    training: float
    cache: float
    temporaries: float | None
    lacking: float
    prefill: float
    token: Roofline | None
    tokens: int

    @property
    def total(self) -> float:
        return self.training + self.cache + (self.temporaries or 0.0)

    @property
    def fits(self) -> bool:
        return self.temporaries is not None and self.lacking <= 0

    @property
    def decode(self) -> float:
        """Seconds."""
        return self.tokens * self.token.step

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


def plan(config: ConfigDict, program: Program, topology: Topology) -> Writing | None:
    """Compiles the engine's loop for the weights and the slots of `config`; None for one whose model writes nothing.

    Prompts are as long as they may be, and every completion has config.rollouts.max_new_tokens; all fill the slots
    equally often. Of an episode every turn is so long and stands at the end of a full row, which each completion reads
    for itself from the second turn on: more than any round does.
    """
    method = method_of(config)
    if not method.rollouts or (method.distills and not config.objective.student_share):
        return None
    model, mesh, new = program.model, program.mesh, config.rollouts.max_new_tokens
    prompts = config.data.batch_size // samples(config)
    each = config.rollouts.samples if "samples" in method.rollout_settings else 1
    completions, longest = prompts * each, config.data.max_length
    rows = sizes.rounded(min(config.rollouts.batch_size, completions), mesh)
    prompt, capacity = longest - new, sizes.capacity(longest, model)
    there = slots.abstract(model, rows, capacity, engine.STOPS, 0, mesh)
    growing = sum(map(bytes_on_device, jax.tree.leaves((there.cache.keys, there.cache.values))))
    cache = growing + sum(map(bytes_on_device, jax.tree.leaves(there.cache.states)))
    state = [*jax.tree.leaves(program.state), *jax.tree.leaves(program.frozen)]
    training = sum(map(bytes_on_device, state))
    weights = {name: part for name, part in program.variables.items() if name in ("params", "lora", "quant")}
    known = {"slots": rows, "capacity": capacity, "prompts": prompts, "completions": completions}
    known |= {"steps": config.rollouts.iterations, "training": training, "cache": cache}
    needed = flops.count(model.spec, weights, lambda path: False, prompts, prompt, generates=False)
    operations = needed.forward + needed.attention
    if config.rollouts.turns > 1:
        again = flops.count(model.spec, weights, lambda path: False, completions, prompt, generates=False)
        operations += (config.rollouts.turns - 1) * (again.forward + again.attention)
    known |= {"prefill": operations / topology.chips / topology.chip.flops}
    known |= {"tokens": math.ceil(completions / rows) * new * config.rollouts.turns}

    def trace() -> object:
        def whole(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))

        numbers = whole((rows,), jnp.bool_), whole((), jnp.int32), whole((), jnp.int32)
        return slots.decode.trace(model, engine.DISPATCH, weights, there, *numbers)

    try:
        text, analysis = compiled.compile_text(mesh, trace)
    except jax.errors.JaxRuntimeError as error:
        lacking = compiled.exceeded(str(error))
        if lacking is None:
            raise
        return Writing(**known, temporaries=None, lacking=lacking, token=None)
    module = hlo.parse(text)  # the loop over tokens ends when rows do: its body counts once, as one token
    # Slots grow with their rows: a program of fewer places wrote the first tokens.
    read = sum(sizes.capacity(prompt + i, model) for i in range(1, new + 1)) / new / capacity
    moved = traffic.memory_bytes(module) - growing * (1 - read)
    token = roofline(topology, traffic.matrix_flops(module), moved, list(traffic.collectives(module, mesh)))
    grows = sizes.capacity(prompt, model) < capacity
    temporaries = max(analysis.temp_size_in_bytes, growing / 2 if grows else 0)
    lacking = training + cache + temporaries - topology.chip.usable
    return Writing(**known, temporaries=temporaries, lacking=lacking, token=token)
