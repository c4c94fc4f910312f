"""Which commit is recorded beside figures."""

import re
import subprocess

from ds_quant.base import commit as module


def test_only_a_checkout_that_knows_the_package_counts(tmp_path, monkeypatch):
    """An environment that lies in somebody's repository, ignored by it, is not of that repository's commit."""
    installed = tmp_path / "commit.py"
    installed.touch()
    monkeypatch.setattr(module, "__file__", str(installed))
    assert module.commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "other").touch()
    subprocess.run([*git, "add", "other"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=x"], check=True)
    assert module.commit() is None
    subprocess.run([*git, "add", "commit.py"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=y"], check=True)
    found = module.commit()
    assert found is not None
    assert re.fullmatch("[0-9a-f]{40}", found)
    installed.write_text("changed")
    assert module.commit() == f"{found}-dirty"
