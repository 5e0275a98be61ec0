"""The layers of DESIGN.md, read from the source: imports go down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "ftjax").rglob("*.py"))

# From the bottom up: a module may import its own floor and those below. A wing of a package ("weights.hf") has a floor
# of its own; "weights" alone is what stands in none of its wings. `data` and `tasks` stay on the host.
FLOORS = [
    {"errors"},
    {"atomic", "cache", "cli", "config_checks", "foreign", "named", "relay", "strict_json", "tree"},
    {"config", "distributed"},
    {"config_changes", "config_files"},
    {"config_flag"},
    {"sharding", "quant"},
    {"models"},
    {"interpolation", "lora", "tasks"},
    {"weights.hf"},
    {"weights.gguf"},
    {"weights"},
    {"weights.peft"},
    {"data.images"},
    {"data.format"},
    {"data.read"},
    {"data.tokens"},
    {"data.batch"},
    {"data.audit"},
    {"data"},
    {"environments", "origin"},
    {"objectives", "sampling"},
    {"pictures", "returns", "training"},
    {"method"},
    {"assemble"},
    {"memory"},
    {"choices"},
    {"adapted", "prompts"},
    {"evals", "rewards"},
    {"episodes"},
    {"cached_reference", "describe", "exportable", "inspection", "parity", "preflight", "reporting", "resume"}
    | {"critic", "judging", "rewarding"},
    {"best_of", "constitutional", "distillation", "labeling", "planning", "rollouts", "selected"},
    {"sources"},
    {"hosted"},
    {"__main__", "train", "sweep", "pipeline", "evaluate", "generate", "report", "export", "harness", "score"}
    | {"plan", "inspect_data", "curate", "label", "constitution", "serve", "import_config", "models.__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
COMMAND_LINES = FLOORS[-1]
HOST_ONLY = {"data", "tasks"}
HOST_MAY_IMPORT = {
    "ftjax.atomic",
    "ftjax.cache",
    "ftjax.errors",
    "ftjax.strict_json",
    "ftjax.weights.gguf.header",
    "ftjax.weights.gguf.tokenizer",
    "ftjax.weights.hf.files",
}


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
    """The package, or the module at the root, that a module of ours belongs to: ftjax.models.decoder -> models."""
    return name.split(".")[1] if "." in name else None


def member(name):
    """The member of FLOORS that a module of ours belongs to: ftjax.data.read.rows -> data.read, ftjax.lora -> lora."""
    parts = name.split(".")[1:]
    wing = ".".join(parts[:2])
    return wing if wing in FLOOR else parts[0]


def test_the_reader_sees_imports():
    assert "ftjax.sharding" in imports(ROOT / "ftjax/training/step.py") | imports(ROOT / "ftjax/training/state.py")
    assert "ftjax.models.decoder" in imports(ROOT / "ftjax/objectives/sft.py")
    assert "jax" in imports(ROOT / "ftjax/training/step.py")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_only(path):
    if part(module_name(path)) is None:
        assert not {name for name in imports(path) if name.startswith("ftjax")}
        return
    mine, package = member(module_name(path)), part(module_name(path))
    assert mine in FLOOR, f"{path}: give ftjax.{mine} its place in FLOORS"
    ours = {name for name in imports(path) if name.split(".")[0] == "ftjax"}
    for name in ours - {"ftjax"}:
        other = member(name)
        assert other == mine or other not in COMMAND_LINES, f"{path} imports the command line {name}"
        assert FLOOR.get(other, 99) <= FLOOR[mine], f"{path} imports {name}, which is above it"
        # Members of one floor that must not know each other:
        assert {mine, other} not in ({"objectives", "sampling"}, {"lora", "tasks"})
    if package in HOST_ONLY:
        above = {name for name in ours if part(name) not in HOST_ONLY} - HOST_MAY_IMPORT
        assert not above, f"{path} is host only and imports {above}"
    if package in {"objectives", "sampling", "models", "lora"} or module_name(path) == "ftjax.training.step":
        assert not {name for name in ours if part(name) in HOST_ONLY}, f"{path} knows about data"


def test_no_circle_between_modules():
    graph = {module_name(path): imports(path) for path in FILES}
    done, entered = set(), []

    def visit(name):
        assert name not in entered, f"a circle of imports: {' -> '.join([*entered[entered.index(name) :], name])}"
        if name in done:
            return
        entered.append(name)
        for other in sorted(graph.get(name, ())):
            visit(other)
        done.add(entered.pop())

    for name in graph:
        visit(name)


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
