"""`ftjax` and `python -m ftjax`: the list of the commands, and each of them under its name; what a wheel holds."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from support import ROOT
from test_imports import COMMAND_LINES

from ftjax import __main__ as program


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["ftjax", *words])
    return program.main()


@pytest.mark.parametrize("words", [[], ["--help"], ["help"]])
def test_every_command_is_listed_with_what_it_does(monkeypatch, capsys, words):
    assert run(monkeypatch, *words) == 0
    printed = capsys.readouterr().out
    assert program.COMMANDS.keys() == {name.removesuffix(".__main__") for name in COMMAND_LINES} - {"__main__"}
    for name, text in program.COMMANDS.items():
        assert f"  {name} " in printed
        assert text in printed


def test_a_command_is_run_as_python_m_runs_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ftjax.curate", raising=False)  # runpy warns of a module that is there already
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "help", "curate")
    assert ended.value.code == 0
    assert "dedup" in capsys.readouterr().out


def test_an_unknown_command_names_the_near_one(monkeypatch, capsys):
    assert run(monkeypatch, "trian") == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wheel_holds_the_configs_and_the_command(tmp_path):
    for name in ("ftjax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [*(ROOT / "configs").glob("*.py"), *(ROOT / "ftjax").rglob("*.py")]:
        name = str(path.relative_to(ROOT))
        assert f"ftjax/{name}" in names if path.parent.name == "configs" else name in names
    data = [path for path in (ROOT / "ftjax").rglob("*.*") if path.suffix not in (".py", ".pyc")]
    assert {str(path.relative_to(ROOT)) for path in data} - names == set()
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    (entry,) = installed.glob("*.dist-info/entry_points.txt")
    assert "ftjax = ftjax.__main__:main" in entry.read_text()
    code = "from ftjax import config_files as c; print(c.find('dpo')[0], c.load('dpo').objective.name)"
    found = subprocess.check_output(
        [sys.executable, "-c", code], cwd=tmp_path / "dist", text=True, env={"PYTHONPATH": str(installed)}
    )
    assert found.split() == [str(installed / "ftjax/configs/dpo.py"), "dpo"]
