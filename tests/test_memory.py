"""What is chosen so that a step fits, and what is said when it does not."""

import jax
import jax.numpy as jnp
import pytest
from support.runs import write_model, write_rows
from support.tiny import one_device, spec

from ftjax import assemble, choices, memory
from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.memory import GIB
from ftjax.models.decoder import Decoder
from ftjax.plan import model_spec
from ftjax.train import train


def config_of(**changes):
    given = {"data.batch_size": 16, "mesh.fsdp": 1, "model.dtype": "bfloat16", "model.param_dtype": "bfloat16"}
    return configs.changed(configs.defaults(), given | changes)


def program_of(model_spec):
    with jax.set_mesh(one_device()):
        config = configs.changed(config_of(), {"accumulate": 1})
        return assemble.program(config, Decoder(model_spec, jnp.bfloat16, jnp.bfloat16), one_device(), 1)


@pytest.fixture(scope="module")
def tiny():
    return program_of(spec())


@pytest.mark.parametrize(
    ("room", "given", "chosen"),
    [
        (100, {}, ("none", 1)),
        (60, {}, ("none", 2)),
        (9, {}, ("none", 16)),
        (3, {}, ("full", 2)),
        (0.1, {}, ("full", 16)),  # nothing fits: what needs least
        (None, {}, ("none", 1)),
        (3, {"accumulate": 4}, ("full", 4)),
        (3, {"accumulate": 4, "model.remat": "none"}, ("none", 4)),
        (60, {"data.batch_size": 3}, ("none", 3)),  # rows divide
    ],
)
def test_the_cheapest_that_fits_is_chosen(tiny, monkeypatch, room, given, chosen):
    """Where a step needs 90 of what there is to use, a half as much in two micro-batches, and less with remat."""
    config = config_of(**given)
    share = {"none": 1.0, "full": 0.05}
    monkeypatch.setattr(memory, "needed", lambda program, remat, count: 90 * share[remat] / count)
    monkeypatch.setattr(memory, "_USED", {"cpu": 1.0})
    assert memory.choose(config, tiny, room) == chosen


QWEN = "Qwen/Qwen2.5-0.5B-Instruct"


def on_a_tpu(monkeypatch):
    """Without its scores of attention, which no accelerator keeps."""
    monkeypatch.setattr(memory, "_scores", lambda program, tokens: (0.0, 0.0))
    monkeypatch.setattr(memory.sharding, "platform", lambda mesh: "tpu")


def test_a_small_qwen_fits_16_gib_without_computing_anything_twice(monkeypatch):
    """XLA allocates 10.1 GiB for 16 rows of 1,024 tokens in two micro-batches and 5.7 in four."""
    on_a_tpu(monkeypatch)
    program = program_of(model_spec(QWEN))
    assert memory.choose(config_of(), program, 16 * GIB) == ("none", 2)
    assert memory.needed(program, "none", 2) == pytest.approx(10.12 * GIB, rel=0.1)
    assert memory.needed(program, "none", 4) == pytest.approx(5.74 * GIB, rel=0.1)


def test_out_of_memory_names_settings_and_values_and_ends_with_status_2(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 40)
    files = {"model.source": str(tmp_path / "model"), "data.train": (str(tmp_path / "rows.jsonl"),)}
    small = {"data.max_length": 96, "data.batch_size": 8, "data.checks": "off", "adapter.rank": 4, "mesh.fsdp": 1}
    said = "RESOURCE_EXHAUSTED: Out of memory allocating 34359738368 bytes."

    def full(*arguments):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(assemble, "make_step", lambda *arguments: full)
    with pytest.raises(UserError) as error:
        train(configs.changed(configs.defaults(), files | small), tmp_path / "run")
    for words in (
        "out of memory while training",
        "--config.accumulate=2",
        "--config.model.remat=full",
        "--config.quantize.base=int8 in another --workdir",
        "--config.data.max_length=48",
        said,
    ):
        assert words in str(error.value)


def test_the_hints_are_of_what_is_left_to_change():
    used_up = config_of(**{"model.remat": "full", "accumulate": 16, "quantize.base": "nf4"})
    assert [hint.split()[0] for hint in memory.smaller(used_up, one_device())] == ["--config.data.max_length=512"]
    whole = config_of(**{"model.remat": "none", "accumulate": 3, "data.batch_size": 12, "adapter.kind": "none"})
    assert [hint.split()[0] for hint in memory.smaller(whole, one_device())] == [
        "--config.accumulate=6",
        "--config.model.remat=full",
        "--config.adapter.kind=lora",
        "--config.data.max_length=512",
    ]
    dpo = configs.changed(whole, {"objective.name": "dpo"})
    assert memory.smaller(dpo, one_device())[1].startswith("--config.objective.cache_reference=True in another")
    for changes in ({"objective.cache_reference": True}, {"objective.reference_every": 8}, {"optimizer.l2_sp": 0.1}):
        assert not any(
            "cache_reference" in hint for hint in memory.smaller(configs.changed(dpo, changes), one_device())
        )


def test_another_error_of_the_devices_passes():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.exhausted("training", []):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")


def test_a_real_allocation_that_fails_is_told():
    with pytest.raises(UserError, match="out of memory while trying"), memory.exhausted("trying", ["less"]):
        jax.block_until_ready(jnp.zeros((2**46,), jnp.uint8))


def test_cpus_share_the_memory_of_their_machine():
    whole = memory.of_device(one_device()) * jax.local_device_count()
    assert GIB / 2 < whole < 2**50


def test_what_is_chosen_by_memory_is_settled():
    chosen = choices.by_memory(config_of(), Decoder(spec()), one_device(), 24 * GIB)
    assert (chosen.model.remat, chosen.accumulate) == ("none", 1)
    given = config_of(**{"model.remat": "full", "accumulate": 4})
    assert choices.by_memory(given, Decoder(spec()), one_device(), 24 * GIB) is given
