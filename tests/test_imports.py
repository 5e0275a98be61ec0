"""The layers of DESIGN.md, read from the source: imports go down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "ftjax").rglob("*.py"))

# From the bottom up: a module may import its own layer and those below. `data` and `tasks` stay on the host.
LAYERS = [
    {"config", "tree", "metrics", "errors", "digest", "workdir", "cli", "display", "preemption", "distributed", "crc"},
    {"sharding", "quant"},
    {"models"},
    {"continued", "lora", "weights", "optim", "state"},
    {"data", "tasks"},
    {"objectives", "sampling"},
    {"step"},
    {"checkpoint"},
    {"assemble"},
    {"evals"},
    {"describe", "inspection", "loop", "parity", "planning"},
    {"train", "generate", "evaluate", "export", "plan", "inspect_data", "curate"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
COMMAND_LINES = LAYERS[-1]
HOST_ONLY = {"data", "tasks"}
HOST_MAY_IMPORT = {"ftjax.errors", "ftjax.weights.files", "ftjax.weights.source", "ftjax.weights.gguf_header"}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Dotted names that a file imports anywhere in it; ftjax.models.decoder for `from ftjax.models import decoder`."""
    modules = {module_name(file) for file in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else node.module)
    return found


def part(name):
    """The layer member that a module of ours belongs to: ftjax.models.decoder -> models."""
    return name.split(".")[1] if "." in name else None


def test_the_reader_sees_imports():
    assert "ftjax.sharding" in imports(ROOT / "ftjax/step.py") | imports(ROOT / "ftjax/state.py")
    assert "ftjax.models.decoder" in imports(ROOT / "ftjax/objectives/sft.py")
    assert "jax" in imports(ROOT / "ftjax/step.py")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_only(path):
    mine = part(module_name(path))
    if mine is None:
        assert not {name for name in imports(path) if name.startswith("ftjax")}
        return
    assert mine in LEVEL, f"{path}: give ftjax.{mine} its place in LAYERS"
    ours = {name for name in imports(path) if name.split(".")[0] == "ftjax"}
    for name in ours - {"ftjax"}:
        other = part(name)
        assert other == mine or other not in COMMAND_LINES, f"{path} imports the command line {name}"
        assert LEVEL.get(other, 99) <= LEVEL[mine], f"{path} imports {name}, which is above it"
        # Members of one layer that must not know each other:
        assert (mine, other) not in {("objectives", "sampling"), ("models", "data")}
    if mine in HOST_ONLY:
        above = {name for name in ours if part(name) not in HOST_ONLY} - HOST_MAY_IMPORT
        assert not above, f"{path} is host only and imports {above}"
    if mine in {"objectives", "sampling", "models", "lora", "step"}:
        assert not {name for name in ours if part(name) in HOST_ONLY}, f"{path} knows about data"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_torch_no_tensorflow_and_no_jax_in_host_code(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"torch", "tensorflow", "peft"}, path
    if part(module_name(path)) in HOST_ONLY:
        assert not roots & {"jax", "flax", "optax", "orbax"}, path


def test_no_file_is_longer_than_500_lines():
    files = [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]
    assert len(files) > 20
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > 500}
    assert not long
