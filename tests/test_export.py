"""What a run leaves goes into peft, transformers and ftjax.generate, and says the same everywhere."""

import functools
import json
import resource
import runpy
import shutil
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from support.chat_templates import CHATML, make_tokenizer
from support.model_dirs import files, parity_of
from support.reports import NAME, evaluation, write_workdir
from support.runs import command, finish, write_run
from support.tiny import batch_of, logits, one_device
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftjax import assemble, export, generate, parity
from ftjax import config as configs
from ftjax.errors import TransientError, UserError
from ftjax.train import train

GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)  # one that a GGUF has a name for


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run in run/, exported to adapter/ and merged/."""
    path = tmp_path_factory.mktemp("export")
    file = write_run(path)
    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.pre_tokenizer = GPT2_SPLIT
    tokenizer.save_pretrained(path / "model")
    config = runpy.run_path(str(file))["get_config"]()
    config.steps, config.data.eval = 12, ()
    assert train(config, path / "run") == 0
    for format, out in (("peft", "adapter"), ("merged", "merged")):
        run, target = f"--workdir={path / 'run'}", f"--out={path / out}"
        assert str(path / out) in finish(command("ftjax.export", run, target, f"--format={format}"))
    return path


@pytest.fixture(scope="module")
def ours(root):
    """Tokens of a conversation, and the logits of the run for them."""
    _, base, variables, step = assemble.load_run(root / "run")
    assert step == 12
    text = "<|im_start|>user\nThe red lamp is broken<|im_end|>\n<|im_start|>assistant\nsend red<|im_end|>"
    tokens = np.asarray(base.tokenizer.encode(text), np.int32)
    batch = batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens))
    adapted = logits(base.model, variables, batch)[0]
    plain = logits(base.model, {"params": variables["params"]}, batch)[0]
    assert np.abs(adapted - plain).max() > 1  # so that a lost adapter shows
    return tokens, adapted


def assert_same_logits(model, ours, record_figure):
    tokens, expected = ours
    with torch.no_grad():
        found = model(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()
    record_figure("largest logit difference", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_peft_loads_the_adapter(root, ours, record_figure):
    base = AutoModelForCausalLM.from_pretrained(root / "model", attn_implementation="eager")
    assert_same_logits(peft.PeftModel.from_pretrained(base, root / "adapter"), ours, record_figure)


def test_transformers_loads_the_merged_model(root, ours, record_figure):
    model = AutoModelForCausalLM.from_pretrained(root / "merged", attn_implementation="eager")
    assert_same_logits(model, ours, record_figure)
    tokenizer = AutoTokenizer.from_pretrained(root / "merged")
    conversation = [{"role": "user", "content": "The red lamp"}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("user\nThe red lamp<|im_end|>\n<|im_start|>assistant\n")


def test_generate_says_the_same_from_run_adapter_and_merged_model(root):
    sources = (
        [f"--workdir={root / 'run'}"],
        [f"--model={root / 'model'}", f"--adapter={root / 'adapter'}"],
        [f"--model={root / 'merged'}"],
    )
    options = ["--prompt=The red lamp is broken", "--max_new_tokens=8"]
    plain, *said = [
        command("ftjax.generate", *source, *options).communicate(timeout=300)[0]
        for source in ([f"--model={root / 'model'}"], *sources)
    ]
    assert said[0] == said[1] == said[2]
    assert said[0].strip()
    assert plain != said[0]


@pytest.mark.slow
def test_sampling_is_reproduced_by_its_seed(root):
    options = [f"--workdir={root / 'run'}", "--prompt=The lamp", "--max_new_tokens=8", "--temperature=1.5"]
    first, again, other = (finish(command("ftjax.generate", *options, f"--seed={seed}")) for seed in (1, 1, 2))
    assert first == again != other


def test_chat_answers_line_by_line(root):
    process = command("ftjax.generate", f"--workdir={root / 'run'}", "--chat", "--max_new_tokens=4", talks=True)
    out, err = process.communicate("The red lamp\nThe blue lamp\n\n", timeout=120)
    assert process.returncode == 0, err
    assert out.count("> ") == 3


def test_a_merged_export_says_how_near_to_the_run_it_is(root, ours, record_figure):
    """The figures against transformers' logits of the same prompts."""
    said = parity_of(root / "merged/parity.json")
    record_figure("largest logit difference", said["max_abs_logit_difference"])
    assert said["max_abs_logit_difference"] < 1e-4
    assert said["mean_kl"] < 1e-9
    assert (said["top1_agreement"], said["stored_as"], said["step"]) == (1.0, "float32", 12)
    assert {"ftjax", "jax", "numpy", "safetensors", "transformers"} < said["versions"].keys()
    assert str(root) not in (root / "merged/parity.json").read_text() + (root / "merged/README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(root / "merged")
    adapted, plain = (AutoModelForCausalLM.from_pretrained(root / name) for name in ("merged", "model"))
    largest = 0.0
    for prompt in said["prompts"]:
        turns = [{"role": "user", "content": prompt["text"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert tokenizer.encode(text, add_special_tokens=False)[: len(prompt["tokens"])] == prompt["tokens"]
        with torch.no_grad():
            first, second = (model(torch.tensor([prompt["tokens"]])).logits for model in (adapted, plain))
        largest = max(largest, (first - second).abs().max().item())
    assert said["base_without_adapter"]["max_abs_logit_difference"] == pytest.approx(largest, rel=1e-4)


def test_the_cards_are_read_by_the_hub(root):
    for name, library in (("adapter", "peft"), ("merged", "transformers")):
        card = ModelCard.load(root / name / "README.md")
        assert card.data.library_name == library
        assert "| steps | 12 |" in card.text
    adapter = {"adapter_config.json", "adapter_model.safetensors", "ftjax_adapter.json"}
    assert files(root / "adapter") == {"README.md"} | adapter


def test_the_card_says_what_the_evaluation_of_its_step_said(tmp_path):
    workdir = write_workdir(tmp_path / "run")
    assert export.results(workdir, 40)[0] == f"Training helped: {NAME} 0 % before, 50 % at step 40."
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(step=80)))
    assert export.results(workdir, 40)[0].startswith("Training helped: ")
    assert export.results(workdir, 80)[0] == "Tuning wins: tuning wins"
    for name in ("metrics.jsonl", "evaluation.json"):
        (workdir / name).unlink()
    assert export.results(workdir, 80) == []


def test_a_narrower_type_is_written_where_it_is_asked_for(root, tmp_path, capsys):
    assert export.export_model(root / "run", None, "hf", tmp_path / "out", "bfloat16", "f16") == 12
    assert "logits differ by" in capsys.readouterr().out
    said = parity_of(tmp_path / "out/parity.json")
    assert said["stored_as"] == "bfloat16"
    assert 1e-3 < said["relative_difference"] < 0.05
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_gguf_says_what_the_run_says(root, ours, tmp_path, record_figure):
    out = tmp_path / "model.gguf"
    assert export.export_model(root / "run", 12, "gguf", out, None, "f16") == 12
    assert files(tmp_path) == {"model.gguf", "model.gguf.parity.json"}
    said = parity_of(tmp_path / "model.gguf.parity.json")
    assert (said["stored_as"], said["format"]) == ("float16", "gguf")
    assert 0 < said["relative_difference"] < 5e-3
    tokens, expected = ours
    model, variables = parity.reload(out, one_device())
    found = logits(model, variables, batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens)))[0]
    record_figure("largest logit difference", np.abs(found - expected).max())
    assert np.abs(found - expected).max() < 0.2


@pytest.mark.parametrize("format", ["merged", "gguf"])
def test_an_export_that_says_something_else_is_not_written(root, tmp_path, monkeypatch, format):
    """As if a kernel had been lost on the way."""
    right = parity.reload

    def wrong(path, mesh, vision):
        model, variables = right(path, mesh, vision)
        kernel = variables["params"]["layers"]["mlp"]["down_proj"]["kernel"]
        variables["params"]["layers"]["mlp"]["down_proj"]["kernel"] = kernel.at[1].set(0)
        return model, variables

    monkeypatch.setattr(parity, "reload", wrong)
    with pytest.raises(UserError, match="the export does not say what the run says"):
        export.export_model(root / "run", None, format, tmp_path / "out.gguf", None, "q8_0")
    assert not files(tmp_path)


def test_a_full_disk_is_told_with_path_and_need_and_nothing_is_left(root, tmp_path, monkeypatch):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(TransientError, match=rf"^{tmp_path / 'peft'}: .*File too large.*It needs 0.0 MB, and"):
            export.export_peft(root / "run", None, tmp_path / "peft")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    merged = load_file(root / "merged" / "model.safetensors")
    for format, of_value in (("merged", 4), ("gguf", 2)):
        needed = sum(values.size for values in merged.values()) * of_value / 1e6
        message = rf"^{tmp_path / format}: there is no room for it. It needs {needed:.1f} MB"
        with pytest.raises(TransientError, match=message):
            export.export_model(root / "run", None, format, tmp_path / format, "float32", "f16")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def full(root):
    """A bfloat16 model trained whole, its master weights in float32, for two steps."""
    config = runpy.run_path(str(root / "run.py"))["get_config"]()
    config.model.source = str(root / "half")
    config.model.param_dtype, config.adapter.kind, config.adapter.rank = "bfloat16", "none", 16
    config.steps, config.data.eval = 2, ()
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.bfloat16)
    model.save_pretrained(root / "half")
    AutoTokenizer.from_pretrained(root / "model").save_pretrained(root / "half")
    (root / "half/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert train(config, root / "full") == 0
    return root / "full"


def test_a_model_trained_whole_is_stored_as_its_base_or_to_the_last_bit(full, tmp_path):
    _, base, variables, _ = assemble.load_run(full)
    trained = np.asarray(variables["params"]["embed_tokens"]["embedding"])
    assert trained.dtype == np.float32
    assert export.stored_dtype(base.reader, "float32") == "bfloat16"
    for dtype in (None, "float32"):
        out = tmp_path / str(dtype)
        export.export_model(full, None, "hf", out, dtype, "f16")
        stored = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
        assert np.array_equal(stored, trained.astype(stored.dtype))
        assert stored.dtype.name == (dtype or "bfloat16")
        said = parity_of(out / "parity.json")
        assert said["base_without_adapter"] is None
        assert said["relative_difference"] < (1e-6 if dtype else 0.05)
        card = ModelCard.load(out / "README.md")
        assert card.data.license == "apache-2.0"
        assert "SFT of all parameters" in card.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_interpolated_export_is_on_the_line_from_the_base_to_the_run(root, ours, tmp_path, record_figure):
    """Against the line between two of transformers' models."""
    export.export_peft(root / "run", None, tmp_path / "adapter", share=0.3)
    export.export_model(root / "run", None, "hf", tmp_path / "model", None, "f16", share=0.3)
    between, merged = (AutoModelForCausalLM.from_pretrained(root / name) for name in ("model", "merged"))
    tuned = merged.state_dict()
    between.load_state_dict({name: value.lerp(tuned[name], 0.3) for name, value in between.state_dict().items()})
    with torch.no_grad():
        expected = between(torch.tensor(ours[0][None], dtype=torch.long)).logits[0].numpy()
    assert np.abs(expected - ours[1]).max() > 0.5
    base, whole = (AutoModelForCausalLM.from_pretrained(path) for path in (root / "model", tmp_path / "model"))
    for model in (peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), whole):
        assert_same_logits(model, (ours[0], expected), record_figure)
    said = parity_of(tmp_path / "model/parity.json")
    assert (said["interpolate"], said["relative_difference"] < 1e-5) == (0.3, True)
    for card in (tmp_path / "adapter/README.md", tmp_path / "model/README.md"):
        assert "0.3 of the way from the base" in card.read_text()


def test_a_run_without_an_adapter_has_none_to_merge_or_write(full, tmp_path):
    with pytest.raises(UserError, match=r"no adapter to merge .* use --format hf"):
        export.export_model(full, None, "merged", tmp_path / "out", None, "f16")
    with pytest.raises(UserError, match=r"no adapter .* use --format hf"):
        export.export_peft(full, None, tmp_path / "out")
    assert not files(tmp_path)


def short_run(root, workdir, quantized="none", steps=2, **adapter):
    """A run of a few steps on the model of `root`, with these settings of its adapter."""
    config = runpy.run_path(str(root / "run.py"))["get_config"]()
    config.adapter.rank = 16 if "source" in adapter else 4
    config.adapter.update(adapter)
    config.quantize.base, config.steps, config.data.eval = quantized, steps, ()
    assert train(config, workdir) == 0
    return config


def of_run(workdir, tokens):
    """float32 [tokens, vocab]"""
    _, base, variables, _ = assemble.load_run(workdir)
    batch = batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens))
    return logits(base.model, variables, batch)[0]


@pytest.fixture(scope="module")
def packed(root):
    """A run beside an int8 base with the tied embedding adapted and the last norm trained whole."""
    short_run(root, root / "packed", "int8", targets="embed_tokens,q_proj,down_proj", modules_to_save=("norm",))
    return root / "packed"


def test_a_tied_embedding_is_untied_and_a_quantized_base_said(root, packed, ours, tmp_path, capsys, record_figure):
    export.export_model(packed, None, "merged", tmp_path / "out", None, "f16")
    printed, card = capsys.readouterr().out, (tmp_path / "out/README.md").read_text()
    notes = parity_of(tmp_path / "out/parity.json")["notes"]
    for note, words in zip(notes, ("merged into that base, dequantized", "tie_word_embeddings is false"), strict=True):
        assert words in note
        assert note in printed
        assert note in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert not model.config.tie_word_embeddings
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    original = load_file(root / "model/model.safetensors")["model.embed_tokens.weight"]
    assert np.array_equal(head.detach().numpy(), original)
    assert not torch.equal(head, embedding)
    assert_same_logits(model, (ours[0], of_run(packed, ours[0])), record_figure)


def test_a_gguf_of_it_is_untied_too(packed, ours, tmp_path):
    export.export_model(packed, None, "gguf", tmp_path / "model.gguf", None, "f16")
    model, variables = parity.reload(tmp_path / "model.gguf", one_device())
    assert not model.spec.tie_word_embeddings
    tokens = ours[0]
    found = logits(model, variables, batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens)))[0]
    assert np.abs(found - of_run(packed, tokens)).max() < 0.2


def test_an_adapter_of_a_quantized_base_says_so(packed, tmp_path, capsys):
    export.export_peft(packed, None, tmp_path / "out")
    assert "stored as int8" in capsys.readouterr().out
    assert "beside the base stored as int8" in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/ftjax_adapter.json").read_text())["base_quantized"] == "int8"
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]


@pytest.fixture(scope="module")
def further(root):
    """first/, a DoRA run, exported to first-adapter/, and further/, a run that goes on from that."""
    settings = {"kind": "dora", "rslora": True, "rank_pattern": (("mlp", 2),), "modules_to_save": ("norm",)}
    short_run(root, root / "first", targets="q_proj,up_proj", **settings)
    export.export_peft(root / "first", None, root / "first-adapter")
    short_run(root, root / "further", source=str(root / "first-adapter"), steps=4)
    return root / "further"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_run_goes_on_from_an_adapter_and_back_to_peft(root, further, ours, tmp_path, record_figure):
    tokens, _ = ours
    first, last = of_run(root / "first", tokens), of_run(further, tokens)
    assert np.abs(first - last).max() > 0.1
    config = configs.read(further / "config.json")
    base = assemble.open_base(config.model)
    abstract, _ = assemble.abstract_variables(config, base.model, one_device())
    start = assemble.load_variables(config, base, abstract)
    batch = batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens))
    assert np.abs(logits(base.model, start, batch)[0] - first).max() < 1e-5
    export.export_peft(further, None, tmp_path / "out")
    said = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (said["use_dora"], said["use_rslora"], said["rank_pattern"]) == (True, True, {"up_proj": 2})
    assert "DoRA (rank 4" in (tmp_path / "out/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(root / "model", attn_implementation="eager")
    assert_same_logits(peft.PeftModel.from_pretrained(model, tmp_path / "out"), (tokens, last), record_figure)


def test_dora_and_whole_modules_are_in_a_gguf(further, ours, tmp_path):
    export.export_model(further, None, "gguf", tmp_path / "model.gguf", None, "f16")
    assert parity_of(tmp_path / "model.gguf.parity.json")["relative_difference"] < 5e-3


def test_a_run_is_not_resumed_from_another_adapter_than_it_began_with(root, further, tmp_path):
    config = configs.read(further / "config.json")
    assert train(config, further) == 0  # as it is: finished, nothing to do
    file = root / "first-adapter/adapter_config.json"
    before = file.read_text()
    file.write_text(before.replace('"lora_alpha": 32', '"lora_alpha": 16'))
    try:
        with pytest.raises(UserError, match="first-adapter: this adapter has changed since the run in"):
            train(config, further)
        with pytest.raises(UserError, match="has changed since the run in"):
            assemble.load_run(further)
    finally:
        file.write_text(before)


def test_several_adapters_are_over_one_base(root, further, ours):
    adapters = {"plain": str(root / "adapter"), "dora": str(root / "first-adapter")}
    base, variables = generate.load_model(str(root / "model"), adapters, "float32")
    tokens, expected = ours
    batch = batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens))
    found = {name: logits(base.model, one, batch)[0] for name, one in variables.items()}
    assert list(found) == ["none", "plain", "dora"]
    assert np.abs(found["plain"] - expected).max() < 1e-5
    assert np.abs(found["dora"] - of_run(root / "first", tokens)).max() < 1e-5
    assert np.abs(found["none"] - expected).max() > 1
    kernels = {id(one["params"]["layers"]["mlp"]["up_proj"]["kernel"]) for one in variables.values()}
    assert len(kernels) == 1


def test_a_conversation_goes_from_adapter_to_adapter(root, further):
    names = f"--adapter=plain={root / 'adapter'},dora={root / 'first-adapter'}"
    arguments = [f"--model={root / 'model'}", names, "--use=plain", "--chat", "--max_new_tokens=6"]
    process = command("ftjax.generate", *arguments, talks=True)
    out, err = process.communicate("The red lamp\n/adapter none\nThe red lamp\n/adapter x\n\n", timeout=120)
    assert process.returncode == 0, err
    assert "[none]" in out
    assert "[there is no 'x'; there are none, plain, dora]" in out


@pytest.mark.parametrize(
    ("text", "names"),
    [("a/dir", {"adapter": "a/dir"}), ("a=x,b-2=y=z", {"a": "x", "b-2": "y=z"}), ("/x/a=b", {"adapter": "/x/a=b"})],
)
def test_adapters_are_named(text, names):
    assert generate.parse_adapters(text) == names


@pytest.mark.parametrize(
    ("text", "words"), [("a=x,y", "'y' is not NAME="), ("a=x,a=y", "'a' is there twice"), ("none=x", "the base's own")]
)
def test_names_that_cannot_be_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        generate.parse_adapters(text)


def test_of_several_adapters_one_is_chosen_by_name():
    assert generate.initial_adapter(None, ["none"]) == "none"
    assert generate.initial_adapter(None, ["none", "a"]) == "a"
    assert generate.initial_adapter("none", ["none", "a"]) == "none"
    with pytest.raises(UserError, match="say which of none, a, b"):
        generate.initial_adapter(None, ["none", "a", "b"])
    with pytest.raises(UserError, match="no adapter 'c'; there are none, a"):
        generate.initial_adapter("c", ["none", "a"])


@pytest.mark.parametrize(
    ("format", "name", "dtype", "gguf_type", "words"),
    [
        ("peft", "adapter", None, None, "exists"),
        ("hf", "run.py", None, None, "exists"),
        ("gguf", "model", None, None, r"ends in \.gguf"),
        ("gguf", "new.gguf", "bfloat16", None, "a GGUF has --gguf_type"),
        ("peft", "new", "bfloat16", None, "an adapter is float32"),
        ("merged", "new", None, "q8_0", "goes with --format gguf"),
    ],
)
def test_what_does_not_go_together_is_refused_before_loading(root, format, name, dtype, gguf_type, words):
    with pytest.raises(UserError, match=words):
        export.check(format, root / name, dtype, gguf_type)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ftjax.export", "--format=pfet", "--out=x"], "pfet"),
        (["ftjax.generate", "--use=x", "--prompt=x"], "--use goes with --model alone"),
        pytest.param(["ftjax.generate", "--prompt=x", "--step=3"], "no step 3", marks=pytest.mark.slow),
        pytest.param(["ftjax.export", "--format=merged", f"--out={__file__}"], "exists", marks=pytest.mark.slow),
        pytest.param(["ftjax.generate", "--prompt=x", "--top_p=2"], "top_p", marks=pytest.mark.slow),
    ],
)
def test_mistakes_are_told(root, arguments, words):
    printed = finish(command(*arguments, f"--workdir={root / 'run'}"), 2)
    assert words in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("format", export.FORMATS)
def test_no_format_drops_a_head(root, tmp_path, monkeypatch, format):
    load = assemble.load_run

    def with_head(workdir, step, moved, check, share):
        return load(workdir, step, moved, lambda config, base, variables: check(config, base, variables | heads))

    heads = {"heads": {"score": np.zeros(8, np.float32)}}
    monkeypatch.setattr(assemble, "load_run", with_head)
    out = tmp_path / "out.gguf"
    write = export.export_peft if format == "peft" else functools.partial(export.export_model, format=format)
    options = {} if format == "peft" else {"dtype": None, "gguf_type": "f16"}
    with pytest.raises(UserError, match=rf"has a head \(heads/score\), which --format {format} cannot hold"):
        write(root / "run", None, out=out, **options)
    assert not list(tmp_path.iterdir())
