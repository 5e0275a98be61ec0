"""What writing a round of completions needs: its bytes against the engine's own arrays; what compiling for an absent
TPU tells is in test_compiled.py, so here the engine's loop is compiled for the CPU."""

import jax
import numpy as np
import pytest
from support.tiny import numpy_params, one_device, spec

from ftjax import choices
from ftjax import config as configs
from ftjax.planning import compiled, table, topology, writing
from ftjax.sampling.engine import Engine, Request

SLICE = topology.parse("v5e:1x1")


@pytest.fixture(scope="module")
def planned():
    return plan()


def plan(**changes):
    """(the plan of writing with GRPO, its program)"""

    def compile_text(mesh, trace):
        found = trace().lower().compile()
        return found.as_text(), found.memory_analysis()

    config = configs.changed(configs.defaults(), {"objective.name": "grpo", "model.source": "none"})
    sizes = {"data.max_length": 192, "rollouts.max_new_tokens": 64, "rollouts.batch_size": 6, "data.batch_size": 16}
    config = configs.changed(config, sizes | changes)
    model = spec(max_position_embeddings=512)
    config = choices.without_data(config, model, one_device(), SLICE.chip.usable)
    program = compiled.describe(config, model, jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "compile_text", compile_text)
        return writing.plan(config, program, SLICE), program


def test_the_bytes_are_those_of_the_engines_arrays(planned):
    found, program = planned
    variables = {"params": numpy_params(program.model)}
    engine = Engine(program.model, variables, found.slots)
    for _ in range(found.slots):
        engine.add(Request(np.arange(1, 129, dtype=np.int32) % 61, 64))
    while engine.busy:
        engine.step()
    cache = engine._slots.cache
    assert found.capacity == engine._slots.capacity == 256
    assert found.cache == sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))
    assert found.temporaries >= found.cache / 2  # slots of 128 tokens become such of 256
    frozen, trained = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (program.frozen, program.state))
    assert 4 * (frozen + trained) - 64 < found.training <= 4 * (frozen + trained)  # counters are smaller


def test_the_time_is_of_full_slots_one_token_after_the_other(planned):
    found, program = planned
    assert (found.prompts, found.completions, found.slots) == (2, 16, 6)
    assert found.tokens == 3 * 64  # sixteen completions pass through six slots in three turns
    weights = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(program.variables))
    # Of a token at least every weight but the embedding's is read once, and the cache of all slots.
    kernels = weights - np.prod(program.variables["params"]["embed_tokens"]["embedding"].shape)
    assert found.token.memory * SLICE.chip.hbm_bandwidth > 4 * kernels
    its = program.model.spec
    attention = 4 * 2 * (128 * 129 / 2) * its.num_attention_heads * its.head_dim * its.num_hidden_layers
    assert found.prefill * SLICE.chip.flops == pytest.approx(2 * 2 * 128 * kernels + attention, rel=0.02)
    report = table.writing(found, 0.5)
    seconds = report["seconds"]
    assert seconds["round"] == pytest.approx(0.5 + found.prefill + 192 * found.token.step)
    rows = table.writing_rows(report, SLICE.chip.usable)
    assert rows["round"] == "16 completions of 2 prompts, for 1 step(s)"
    assert "round at least" in rows


def test_every_turn_of_an_episode_is_the_first_again_and_read_by_each(planned):
    turns, one = plan(**{"rollouts.turns": 3, "rollouts.environment": "game:Guess"})[0], planned[0]
    assert turns.tokens == 3 * one.tokens
    assert turns.prefill == pytest.approx(one.prefill * (1 + 2 * 16 / 2))
    assert (turns.cache, turns.capacity) == (one.cache, one.capacity)


def test_a_method_that_writes_nothing_has_no_such_plan(planned):
    assert writing.plan(configs.defaults(), planned[1], SLICE) is None
