"""`ds_quant COMMAND`, as it is installed: which commands there are, that each is reached and answers at once."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib

import pytest

from ds_quant.cli import report
from ds_quant.cli.command import COMMANDS, main
from ds_quant.cli.shared import tables, terminal, text_files
from ds_quant.cli.shared.errors import CommandError


def leaves(arguments):
    """The exit code of a command that argparse ends."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_every_program_of_the_project_is_there(root):
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {"ds_quant", "ds_quant_export", "ds_quant_report"}
    for place in scripts.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


HELP = """
import contextlib, io, json, sys
from ds_quant.cli.command import main
found = {}
for arguments in json.loads(sys.argv[1]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    found[" ".join(arguments)] = text.getvalue()
print(json.dumps([found, [name for name in ("torch", "transformers", "datasets", "deepspeed") if name in sys.modules]]))
"""


def test_help_names_every_command_and_loads_nothing_heavy(tmp_path):
    quick = [[], *([name] for name in COMMANDS if name != "export")]
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(quick)], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found, loaded = json.loads(done.stdout)
    assert loaded == []
    for name, (_, text) in COMMANDS.items():
        assert f"    {name} " in found[""]
        assert text.split()[0] in found[""]
    for name in (name for name in COMMANDS if name != "export"):
        assert found[name].startswith(f"usage: ds_quant {name} ")


def test_a_command_is_called_by_its_name(capsys):
    assert leaves(["export"]) == 2
    assert capsys.readouterr().err.startswith("usage: ds_quant export ")
    assert leaves(["plan"]) == 2
    assert capsys.readouterr().err.startswith("usage: ds_quant plan ")
    assert main(["report", "nowhere.json", "--for", "native"]) == 1
    assert "nowhere.json: got no such file" in capsys.readouterr().err
    assert main(["evaluate", "nowhere", "--dataset", "python-source"]) == 2
    assert 'nowhere: got "no such folder"' in capsys.readouterr().err
    assert main(["diagnose", "report", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith('ds_quant diagnose report: nowhere: got "nothing there"')


def test_the_older_programs_are_called_by_theirs(capsys):
    with pytest.raises(SystemExit):
        report.main(["plan"])
    assert capsys.readouterr().err.startswith("usage: ds_quant_report plan ")


def test_the_schema_has_a_command(capsys):
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert set(json.loads(printed)["properties"]) >= {"enabled", "linear", "optimizer", "communication"}
    assert report.main(["--schema"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["repport"], "ds_quant: got 'repport'; allowed: report, plan, .*; fix: did you mean \"report\"?"),
        (["train.py"], "fix: run a script by python -m ds_quant train.py"),
        (["x"], "fix: see ds_quant --help"),
    ],
)
def test_a_word_that_is_no_command(arguments, said, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    head, _, tail = said.partition(".*")
    assert head in printed
    assert tail in printed


@pytest.mark.parametrize(("package", "need"), [("rich", tables.need_rich), ("datasets", text_files.need_datasets)])
def test_a_package_that_is_missing_is_named_with_its_extra(package, need, monkeypatch, root):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CommandError, match=r"pip install 'ds_quant\[launch\]'"):
        need()
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith(package) for line in extras["launch"])


def test_ranks_are_quiet_without_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("RANK", "1")
    terminal.quiet(verbose=False)


NOT_INSTALLED = re.compile(r"\b(launchers|benchmarks|slurm|tests|docs|ds_configs)/|\b[A-Z]{4,}\.md\b(?<!FILE\.md)")


def printed_strings(tree):
    """The strings of a module, with their lines: docstrings only if the module prints its own (`__doc__`)."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    if any(isinstance(node, ast.Name) and node.id == "__doc__" for node in ast.walk(tree)):
        bare.discard(id(tree.body[0].value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


def test_printed_strings_are_found():
    tree = ast.parse('"""docs/a.md"""\nprint(__doc__, f"see docs/{x}.md")\ndef f():\n    """docs/c.md"""\n')
    assert [(line, bool(NOT_INSTALLED.search(text))) for line, text in printed_strings(tree)][:2] == [
        (1, True),
        (2, True),
    ]
    unprinted = ast.parse('"""docs/a.md"""\n"README.md"\n')
    assert list(printed_strings(unprinted)) == []
    assert NOT_INSTALLED.search("see README.md")
    assert not NOT_INSTALLED.search("FILE.json, FILE.md, or both, or results.md")


def test_nothing_that_is_printed_names_a_file_of_the_checkout(root):
    """`pip install` brings the package alone."""
    found = []
    for path in sorted((root / "ds_quant").rglob("*.py")):
        for line, text in printed_strings(ast.parse(path.read_text(encoding="utf-8"))):
            if NOT_INSTALLED.search(text):
                found.append(f"{path.relative_to(root)}:{line}")
    found += [str(path) for path in (root / "ds_quant").rglob("*.jinja") if NOT_INSTALLED.search(path.read_text())]
    assert found == []
