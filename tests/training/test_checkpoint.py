"""Checkpoints: what is saved comes back exactly, or not at all with a message that says what to do."""

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax.errors import UserError
from ftjax.training import digest
from ftjax.training.checkpoint import Checkpoints

META = {"config": {"steps": 20, "lr": 1e-3, "name": "é"}, "data": {"index": 96}, "metrics": {"eval_loss": 0.1}}


def make_state(seed: int = 0, width: int = 8):
    """A state as training has it: nested dicts, bfloat16, int32, scalars, and optax's tuples with empty nodes."""
    a, b = jax.random.split(jax.random.key(seed))
    lora = {
        "layers": {
            "q_proj": {"lora_a": jax.random.normal(a, (2, width, 4)), "lora_b": jnp.zeros((2, 4, width))},
            "v_proj": {"lora_a": jax.random.normal(b, (2, width, 4), jnp.bfloat16)},
        }
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    return {"lora": lora, "opt": optimizer.init(lora), "step": jnp.int32(seed), "scale": jnp.float32(0.1), "no": None}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(directory, *steps, meta=META, **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), meta)


def restore(directory, step=None):
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.restore(abstract(make_state()), step)


def restore_same(checkpoints, like, step):
    """Restore `step`, check its state, and return its meta."""
    _, state, meta = checkpoints.restore(like, step)
    assert_same(state, make_state(step))
    return meta


# What goes in comes out


def test_round_trip(tmp_path):
    save(tmp_path, 7)
    step, state, meta = restore(tmp_path)
    assert (step, meta) == (7, META)
    assert_same(state, make_state(7))


def test_an_empty_directory_has_no_steps(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoints.restore(abstract(make_state()))


def test_values_are_those_at_the_call_although_the_state_is_donated_at_once(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + x + 1, state), donate_argnums=0)
    state = {"big": jnp.arange(1_000_000, dtype=jnp.float32), "step": jnp.int32(1)}
    before = jax.tree.map(lambda x: np.array(x, copy=True), state)
    like, meta = abstract(state), {"data": {"index": 1}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, meta)
        meta["data"]["index"] = 2
        donated = []
        for _ in range(10):
            old, state = state, advance(state)
            donated.append(old["big"].is_deleted())
        jax.block_until_ready(state)
        _, restored, saved_meta = checkpoints.restore(like)
    assert_same(restored, before)
    assert saved_meta == {"data": {"index": 1}}
    assert np.asarray(state["step"]) == 2**11 - 1  # the state did move on
    assert any(donated)  # in buffers that were used again


_MESH_SCRIPT = """
import os, sys
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ftjax.training.checkpoint import Checkpoints
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
specs = {"w": P("fsdp", "tensor"), "v": P(None, "fsdp"), "step": P()}
def like(state, specs):
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[k])) for k, x in state.items()}
want = {"w": np.arange(4096, dtype=np.float32).reshape(64, 64), "v": np.arange(64).reshape(8, 8).astype(jnp.bfloat16),
        "step": np.int32(5)}
with Checkpoints(sys.argv[1]) as checkpoints:
    _, state, _ = checkpoints.restore(like(want, specs))  # saved on one device
    assert state["w"].sharding.spec == specs["w"] and len(state["w"].addressable_shards) == 8
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints.save(6, state, {})
    for _ in range(5):
        state = advance(state)  # donated while step 6 is being written
    other = {"w": P(("tensor", "fsdp")), "v": P("tensor"), "step": P()}
    for target in (specs, other):
        _, again, _ = checkpoints.restore(like(want, target), 6)
        for name, value in want.items():
            assert np.asarray(again[name]).tobytes() == value.tobytes(), name
print("resharded")
"""


def test_another_mesh(tmp_path):
    state = {"w": jnp.arange(4096.0).reshape(64, 64), "v": jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)}
    state["step"] = jnp.int32(5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
    run = subprocess.run([sys.executable, "-c", _MESH_SCRIPT, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.stdout == "resharded\n", run.stderr
    with Checkpoints(tmp_path) as checkpoints:  # and back: saved on 8 devices, restored on one
        step, back, _ = checkpoints.restore(abstract(state))
    assert step == 6
    assert_same(back, state)


# What does not fit is rejected (cases 22, 25)


def test_a_part_of_a_state_is_read_alone_and_held_to_its_digests(tmp_path):
    state = make_state(1)
    save(tmp_path, 1)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        asked = {"lora": abstract(state)["lora"]}
        _, loaded, _ = checkpoints.restore(asked, partial=True)
        assert loaded.keys() == {"lora"}
        assert_same(loaded, {"lora": state["lora"]})
        with pytest.raises(UserError, match="not in this run"):  # the whole is asked for, and this is not all of it
            checkpoints.restore(asked)
        with pytest.raises(UserError, match="not in the checkpoint"):
            checkpoints.restore({"others": asked["lora"]}, partial=True)


def test_all_differences_in_one_message(tmp_path):
    save(tmp_path, 1)
    wanted = abstract(make_state())
    layers = wanted["lora"]["layers"]
    del layers["q_proj"]["lora_b"]
    layers["k_proj"] = {"lora_a": jax.ShapeDtypeStruct((2, 8, 4), jnp.float32)}
    layers["q_proj"]["lora_a"] = jax.ShapeDtypeStruct((2, 8, 16), jnp.float32)
    layers["v_proj"]["lora_a"] = jax.ShapeDtypeStruct((2, 8, 4), jnp.float32)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="does not fit") as caught:
        checkpoints.restore(wanted)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "lora/layers/k_proj/lora_a: float32[2, 8, 4] in this run, not in the checkpoint",
        "lora/layers/q_proj/lora_a: saved as float32[2, 8, 4], float32[2, 8, 16] in this run",
        "lora/layers/q_proj/lora_b: saved as float32[2, 4, 8], not in this run",
        "lora/layers/v_proj/lora_a: saved as bfloat16[2, 8, 4], float32[2, 8, 4] in this run",
    ]


@pytest.mark.parametrize("meta", [{"a": (1, 2)}, {1: "a"}, {"a": {2}}, {"a": np.float32(1)}])
def test_meta_that_json_would_change_is_rejected(tmp_path, meta):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError):
        checkpoints.save(1, make_state(), meta)


def test_nan_is_never_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        scores = {}
        for step, loss in enumerate([float("nan"), 7.0, float("nan"), 8.0], start=1):
            checkpoints.save(step, make_state(step), META)
            scores[step] = loss
            checkpoints.rate(scores)
        assert checkpoints.steps() == [2, 4]


def test_steps_only_go_up_unless_rewound(tmp_path):
    save(tmp_path, 10, 20, 30)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="step 20 is not newer than step 30"):
            checkpoints.save(20, make_state(20), META)
        for _ in range(2):  # the second time over what the first has set aside
            checkpoints.rewind(10)
            assert checkpoints.steps() == [10]
            checkpoints.save(20, make_state(21), META)
        assert_same(checkpoints.restore(abstract(make_state()))[1], make_state(21))
    assert {path.name for path in tmp_path.iterdir()} == {"10", "20", "20.set-aside", "30.set-aside"}


# Damage is found (cases 14, 15, 16)


def _damages(content: bytes, flips: int):
    """(what, damaged content or None for a deletion) for one file; flips are spread over the whole file."""
    yield "deleted", None
    if content:
        yield "emptied", b""
        yield "truncated", content[: len(content) // 2]
        yield "short by one byte", content[:-1]
        for bit in np.linspace(0, 8 * len(content) - 1, flips).astype(int):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << (bit % 8)
            yield f"bit {bit} flipped", bytes(flipped)


@pytest.mark.parametrize("flips", [4, pytest.param(1000, marks=pytest.mark.slow)])
def test_damage_to_any_file_is_rejected(tmp_path, flips):
    save(tmp_path, 1, 2)
    files = sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file())
    like, tried = abstract(make_state()), 0
    with Checkpoints(tmp_path) as checkpoints:
        for path in files:
            original = path.read_bytes()
            for what, damaged in _damages(original, flips):
                path.unlink()
                if damaged is not None:
                    path.write_bytes(damaged)
                # Not a byte of a step may change: the message names the file, the step and the fix.
                with pytest.raises(UserError) as caught:
                    checkpoints.restore(like)
                name = path.relative_to(tmp_path / "2").as_posix()
                message = str(caught.value)
                assert message.startswith(f"checkpoint step 2 in {tmp_path} "), (name, what)
                assert name in message, (name, what)
                assert "another step (one of [1]): --config.checkpoint.resume_step=N" in message, (name, what)
                path.write_bytes(original)
                tried += 1
        print(f"{tried} damages to {len(files)} files")
        assert len(files) >= 10
        assert tried >= flips * len(files) // 2  # one or two files are empty
        assert restore_same(checkpoints, like, 1) == META  # the older step, when asked for
        assert restore_same(checkpoints, like, 2) == META  # all damage was undone


def test_array_data_damaged_behind_the_files_digests_names_the_leaf(tmp_path):
    """The leaves' own digests stand alone: here the files' digests are made to agree with the damage."""
    state = {"a": {"noise": jax.random.normal(jax.random.key(0), (64, 64))}, "step": jnp.int32(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, META)
        checkpoints.wait()
        data = max((tmp_path / "3" / "state").rglob("*"), key=lambda path: path.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        with pytest.raises(UserError, match=f"damaged files: {data.relative_to(tmp_path / '3')}"):
            checkpoints.restore(abstract(state))
        leaves = digest.read(tmp_path / "3")["leaves"]
        (tmp_path / "3" / digest.FILE).unlink()
        files = {name: digest.of_file(tmp_path / "3" / name) for name in digest.files_of(tmp_path / "3")}
        digest.write(tmp_path / "3", 3, leaves, files)
        with pytest.raises(UserError, match=r"step 3 in .* digests of 1 arrays do not match: a/noise"):
            checkpoints.restore(abstract(state))


def test_when_every_step_is_damaged_nothing_starts_from_zero(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / str(step) / digest.FILE).unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []
        for ask in (checkpoints.latest, lambda: checkpoints.restore(abstract(make_state()))):
            with pytest.raises(UserError, match=r"step 2 .* incomplete.* no other complete step"):
                ask()
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}  # nothing was tidied away


def test_a_step_under_another_number_is_rejected(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "1").rename(tmp_path / "100")
    with pytest.raises(UserError, match=r"step 100 .* was saved as step 1"):
        restore(tmp_path)


def test_a_step_that_is_not_there(tmp_path):
    save(tmp_path, 1, 2)
    with pytest.raises(UserError, match=r"holds no step 5. Complete steps: \[1, 2\]"):
        restore(tmp_path, 5)


# Retention (case 3)


@pytest.mark.parametrize(("mode", "best", "left"), [("min", 2, [2, 4, 5]), ("max", 3, [3, 4, 5])])
def test_the_newest_and_the_best_are_kept(tmp_path, mode, best, left):
    with Checkpoints(tmp_path, keep=2, best_mode=mode) as checkpoints:
        scores = {}
        for step, loss in enumerate([0.5, 0.1, 0.9, 0.3, 0.3], start=1):
            checkpoints.save(step, make_state(step), META)
            scores[step] = loss
            checkpoints.rate(scores)
        assert checkpoints.steps() == left
        assert_same(checkpoints.restore(abstract(make_state()), best)[1], make_state(best))


def test_of_one_to_keep_the_newest_and_the_best_are_left_and_never_step_0(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, loss in {0: 0.0, 4: 0.2, 8: 0.1, 12: 0.3, 16: 0.4}.items():  # older runs saved step 0
            checkpoints.save(step, make_state(step), META)
            checkpoints.rate({0: 0.0, 4: 0.2, 8: 0.1} if step < 12 else {0: 0.0, 8: 0.1, step: loss})
        assert checkpoints.steps() == [8, 16]
        checkpoints.rate({})  # another evaluation set: what was best is no more
        checkpoints.save(20, make_state(20), META)
        assert checkpoints.steps() == [20]


def test_what_an_interrupted_save_or_removal_left_is_not_listed_and_goes(tmp_path):
    save(tmp_path, 4)
    shutil.copytree(tmp_path / "4", tmp_path / "writing-5.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "4", tmp_path / "writing-6")
    shutil.copytree(tmp_path / "4", tmp_path / "trash-3")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [4]
    assert len(list(tmp_path.iterdir())) == 4  # a reader removes nothing: the writer may be at work
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [4]
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


# Failures in the background (cases 10, 12)


@pytest.fixture
def small_file_limit():
    """The kernel refuses to write beyond 256 kB of any file, as a full disk or quota would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("where", ["close", "next save", "check"])
def test_a_failed_write_is_raised_and_older_steps_stay(tmp_path, small_file_limit, where):
    save(tmp_path, 1)
    big = {"big": jax.random.normal(jax.random.key(0), (1_000_000,))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, big, META)
    message = r"saving step 2.*failed: File too large. A step takes about 4.0 MB .* are free.*resumes from step 1 "

    def check():  # which does not wait
        for _ in range(1000):
            checkpoints.check()
            time.sleep(0.01)

    calls = {"close": checkpoints.close, "next save": lambda: checkpoints.save(3, make_state(), META), "check": check}
    with pytest.raises(UserError, match=message):
        calls[where]()
    checkpoints.close()  # raised once
    assert [path.name for path in tmp_path.iterdir()] == ["1"]  # the space is free again
    assert restore(tmp_path)[0] == 1


def test_an_error_in_the_loop_is_not_hidden_by_the_failed_save(tmp_path, small_file_limit):
    def loop():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(2, {"big": jax.random.normal(jax.random.key(0), (1_000_000,))}, META)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        loop()
    assert "saving step 2" in caught.value.__notes__[0]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_meta_is_plain_json_on_disk(tmp_path):
    """Other tools read it."""
    save(tmp_path, 1)
    assert json.loads((Path(tmp_path) / "1" / "meta" / "data.json").read_text()) == META
