"""The images of batches: every patch is where its token is, in any packing and on any host."""

import json

import numpy as np
import pytest
from support import seeing

from ftjax.data import pipeline
from ftjax.data.batch import patches as batch_patches
from ftjax.data.batch.packing import BATCH
from ftjax.data.images.patches import patches, places, rope_positions
from ftjax.data.tokens import chat as chat_tokens
from ftjax.data.tokens import pictured
from ftjax.data.tokens.examples import join
from ftjax.data.tokens.kinds import Settings
from ftjax.errors import SourceError, UserError

SIZES = [(50, 30), (31, 90), (9, 8), (40, 40)]


@pytest.fixture(params=seeing.FAMILIES)
def family(request):
    return seeing.FAMILIES[request.param]


def chat(*names, answer="A cat."):
    content = [{"type": "image", "path": name} for name in names] + [{"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write(folder, rows, name="rows.jsonl"):
    for i, size in enumerate(SIZES):
        if not (folder / f"{i}.png").exists():
            seeing.picture(*size, i).save(folder / f"{i}.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"source": str(folder / name)}]


ROWS = [
    chat("0.png"),
    chat("1.png", "2.png", answer="Two."),
    chat(answer="None."),
    chat("3.png", answer="Four."),
    chat("2.png", "2.png", "0.png", answer="Three."),
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    chat("3.png", "3.png", answer="Twice."),
]


def spec_of(family, kind="conversation", packing=True, batch_size=2, length=200, **more):
    settings = Settings(images=family.rules())
    return pipeline.DataSpec(
        kind, length, batch_size, packing, "assistant", len(family.tokenizer()), settings=settings, **more
    )


def loader_of(folder, family, rows=ROWS, **more):
    loader, _ = pipeline.load(write(folder, rows), family.tokenizer(), spec_of(family, **more))
    return loader


def check(batch, rules, folder):
    """Each token of an image has the patches that its own image has there. Returns how many images there are."""
    pictures = {patches(seeing.picture(*size, i), rules).tobytes(): rules.grid(*size) for i, size in enumerate(SIZES)}
    m2, count = rules.merge**2, 0
    for b in range(len(batch["tokens"])):
        tokens, numbers = np.count_nonzero(batch["tokens"][b] == rules.token_id), batch["patch_images"][b]
        assert np.count_nonzero(numbers) == tokens * m2
        assert (numbers[tokens * m2 :] == 0).all()
        grids = []
        for number in range(1, numbers.max() + 1):
            its = numbers == number
            grid = pictures[batch["patches"][b, its].tobytes()]
            np.testing.assert_array_equal(batch["patch_places"][b, its], places(grid, rules))
            grids.append(grid)
        count += len(grids)
        if rules.mrope:
            for segment in range(1, batch["segment_ids"][b].max() + 1):
                its = batch["segment_ids"][b] == segment
                own, seen = batch["tokens"][b, its], 0
                here = []
                while seen < np.count_nonzero(own == rules.token_id):
                    here.append(grids.pop(0))
                    seen += here[-1][0] * here[-1][1] // m2
                np.testing.assert_array_equal(batch["rope_positions"][b, its], rope_positions(own, here, rules))
            assert not grids
    return count


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_of_an_image_has_its_patches(tmp_path, family, packing):
    loader, rules = loader_of(tmp_path, family, packing=packing, batch_size=3), family.rules()
    images = [check(loader.batch(i), rules, tmp_path) for i in range(4)]
    assert sum(images) > 9
    assert sum(check(batch, rules, tmp_path) for batch in loader.eval_batches()) == 9


def test_arrays_have_the_shapes_and_types_that_models_read(tmp_path, family):
    batch, rules = loader_of(tmp_path, family).batch(0), family.rules()
    shapes = {name: (array.shape, array.dtype) for name, array in batch.items() if name not in BATCH}
    P = batch["patches"].shape[1]
    wanted = {
        "patches": ((2, P, 48), np.uint8),
        "patch_places": ((2, P, 2), np.int32),
        "patch_images": ((2, P), np.int32),
    }
    assert shapes == wanted | ({"rope_positions": ((2, 200, 3), np.int32)} if rules.mrope else {})
    assert P in {rules.room(tokens) for tokens in range(200)}


def test_a_pair_has_its_images_twice(tmp_path, family):
    asked = chat("0.png", "1.png")["messages"][:1]
    row = {"prompt": asked, **{side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}}
    batch = loader_of(tmp_path, family, [row], kind="pair", batch_size=1).batch(0)
    assert check(batch, family.rules(), tmp_path) == 4


def test_a_prompt_has_the_arrays_of_a_row(tmp_path, family):
    """What a model is given to answer is laid out like what it is trained on."""
    loader, rules = loader_of(tmp_path, family, [ROWS[4]], batch_size=1), family.rules()
    row = loader.examples.row(0)
    prompt, its = pictured.prompt(row.fields["messages"][:1], rules, row.origin)
    tokens = chat_tokens.render_prompt(prompt, family.tokenizer())
    P, n = rules.room(sum(its.tokens)), len(tokens)
    made = batch_patches.lay([[batch_patches.Seen(tokens, its.references, row.origin)]], n, P, rules)
    trained = loader.batch(0)
    assert trained["tokens"][0, :n].tolist() == tokens.tolist()
    for name, array in made.items():
        np.testing.assert_array_equal(array, trained[name][:, : array.shape[1]])


def test_hosts_that_fill_other_rows_agree(tmp_path, family):
    loader = loader_of(tmp_path, family, batch_size=4)
    whole = loader.batch(1)
    for b in range(4):
        part = loader.batch(1, [b])
        for name, array in whole.items():
            assert part[name].shape == array.shape
            np.testing.assert_array_equal(part[name][b], array[b])
            assert not np.delete(part[name], b, axis=0).any()


def test_a_batch_without_images_has_the_arrays_too(tmp_path, family):
    batch = loader_of(tmp_path, family, [ROWS[5]], batch_size=1).batch(0)
    assert not batch["patches"].any()
    assert not batch["patch_images"].any()
    if family.rules().mrope:
        np.testing.assert_array_equal(batch["rope_positions"], np.repeat(batch["positions"][..., None], 3, -1))


def test_a_run_without_vision_has_none_of_them(tmp_path, family):
    spec = spec_of(family)
    plain = pipeline.DataSpec("conversation", 200, 1, True, "assistant", spec.vocab_size)
    loader, _ = pipeline.load(write(tmp_path, [ROWS[5]]), family.tokenizer(), plain)
    assert loader.batch(0).keys() == BATCH.keys()


def test_an_image_that_changed_since_is_refused_by_its_row(tmp_path):
    family = seeing.FAMILIES["qwen2_5_vl"]
    loader = loader_of(tmp_path, family, [chat("0.png")], batch_size=1)
    seeing.picture(60, 30).save(tmp_path / "0.png")
    with pytest.raises(SourceError, match=r"rows.jsonl:1: its images are others than when this run began"):
        loader.batch(0)
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match=r"rows.jsonl:1: message 0: there is no image .*0.png"):
        loader.batch(0)


def test_a_resumed_run_notices_other_images(tmp_path, family):
    first = loader_of(tmp_path, family, [chat("0.png")]).fingerprint()
    assert loader_of(tmp_path, family, [chat("0.png")]).fingerprint() == first
    seeing.picture(*SIZES[0], seed=5).save(tmp_path / "0.png")
    assert loader_of(tmp_path, family, [chat("0.png")]).fingerprint() != first


def test_sets_are_joined_with_their_images(tmp_path, family):
    spec, tokenizer = spec_of(family), family.tokenizer()
    sets = [
        pipeline.read(write(tmp_path, rows, name), tokenizer, spec)
        for name, rows in (("a.jsonl", ROWS[:3]), ("b.jsonl", ROWS[3:]))
    ]
    examples = join(sets)
    every = [np.arange(len(examples))[i : i + 1] for i in range(len(examples))]
    assert len(examples.pictures) == len(ROWS)
    P = batch_patches.room(examples, every)
    for batch in (pipeline.training_loader(examples, spec).batch(0), batch_patches.fill(examples, every, 200, P)):
        assert batch["patch_images"].any()


def test_rows_of_a_table_hold_their_images(tmp_path, family):
    import pyarrow
    import pyarrow.parquet

    images = [[{"bytes": seeing.as_bytes(seeing.picture(*SIZES[0])), "path": None}]]
    messages = [chat(None)["messages"]]
    messages[0][0]["content"] = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    messages[0][1]["content"] = [{"type": "text", "text": "A cat."}]
    table = pyarrow.table({"messages": messages, "images": images})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    loader, _ = pipeline.load([{"source": str(tmp_path / "rows.parquet")}], family.tokenizer(), spec_of(family))
    batch = loader.batch(0)
    np.testing.assert_array_equal(
        batch["patches"][0, batch["patch_images"][0] == 1], patches(seeing.picture(*SIZES[0]), family.rules())
    )


def test_rows_are_held_out_by_their_images(tmp_path, family):
    """The same question about other images is another prompt; about the same ones it is the same."""
    rows = [chat(f"{i % 16}.png", answer=f"{i}.") for i in range(64)]
    entries = write(tmp_path, rows)
    spec = spec_of(family, holdout=0.5)
    train = pipeline.training_rows(entries, spec)
    (held,) = pipeline.read_heldout([], entries, spec)
    sides = [{row.fields["messages"][0]["images"][0] for row in side} for side in (train, held)]
    assert sides[0] & sides[1] == set()
    assert len(sides[0] | sides[1]) == 16
