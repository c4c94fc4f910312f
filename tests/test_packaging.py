"""What an installed package holds, away from the checkout."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ds_quant.cli import diagnose
from ds_quant.cli.command import COMMANDS
from ds_quant.engine import seams

MARK = "-" * 40
# The report, then the help of every command without any package that only an extra brings.
PROGRAM = f"""
import contextlib, sys
import ds_quant
from ds_quant.cli import command, diagnose, report
print(ds_quant.__file__)
report.main([])
for name in ("compressed_tensors", "datasets", "jinja2", "lm_eval", "matplotlib", "rich", "sentencepiece", "wandb"):
    sys.modules[name] = None
for words in [[name] for name in command.COMMANDS] + [["diagnose", name] for name in diagnose.COMMANDS]:
    print("{MARK}")
    with contextlib.suppress(SystemExit):
        command.main([*words, "--help"])
"""


def files_of(folder):
    """The files of the package in a folder, by relative path, but what Python writes itself."""
    found = (path for path in (folder / "ds_quant").rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)) for path in found}


def test_installed_package_runs_outside_the_checkout(root, tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    # A clone of what is committed: setuptools leaves its build folder beside the sources.
    copy = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", root, copy], check=True, timeout=200)
    done = subprocess.run([*command, "--target", site, copy], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (site / "ds_quant" / "py.typed").is_file()
    assert files_of(site) == files_of(copy)
    assert not (site / "tests").exists()
    assert {"ds_quant", "ds_quant_export", "ds_quant_report"} <= {path.name for path in (site / "bin").iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    report, *helps = done.stdout.split(MARK)
    assert "MISSING" not in report
    assert len(helps) == len(COMMANDS) + len(diagnose.COMMANDS)
    for text, name in zip(helps, [*COMMANDS, *(f"diagnose {name}" for name in diagnose.COMMANDS)], strict=True):
        assert text.strip().startswith(f"usage: ds_quant {name} ")


def test_python_keeps_the_bytecode_of_imports_under_make(root):
    """Also where the environment, as that of many containers, says otherwise."""
    show = f"show: ; @{sys.executable} -c 'import sys; print(sys.dont_write_bytecode)'"
    command = ["make", "--no-print-directory", f"--eval={show}", "show"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "False\n"


def pinned(file):
    lines = file.read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pins.items()}


def test_constraints_satisfy_the_ranges(root):
    """Every requirement of every extra that is pinned lies in its range, and every core one is pinned."""
    pins = pinned(root / "constraints.txt")
    for line in requires("ds_quant"):
        requirement = Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        if name in pins:
            assert pins[name] in requirement.specifier, line
        else:
            assert 'extra == "eval"' in line, f"{line} has no pin"


def test_ranges_begin_where_the_oldest_stack_does(root):
    """A range that begins lower promises what nobody ran."""
    pins = pinned(root / "tests" / "stacks" / "oldest.txt")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    triton = [line for line in extras["dev"] if line.startswith("triton")]
    for line in project["dependencies"] + extras["export"] + extras["launch"] + triton:
        requirement = Requirement(line)
        begins = [Version(bound.version) for bound in requirement.specifier if bound.operator == ">="]
        assert begins == [Version(pins[requirement.name])] or not requirement.specifier, line
    deepspeed = next(Requirement(line) for line in project["dependencies"] if line.startswith("deepspeed"))
    assert deepspeed.specifier == SpecifierSet(">={},<{}".format(*seams.SUPPORTED))


def test_version_is_said_once(root):
    import ds_quant

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["version"] == ds_quant.__version__
    assert f"## {ds_quant.__version__}" in (root / "CHANGELOG.md").read_text()
