"""Fifteen kills of a run of two ranks, at points drawn from a seed; `make test-kills` makes two hundred."""

from __future__ import annotations

import re
import sys

import pytest
from conftest import ROOT
from helpers.launching import launch


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_run_survives_kills_at_any_point() -> None:
    command = [sys.executable, ROOT / "tests/launchers/kill_points.py", "--kills", 15, "--seed", 7]
    _, printed = launch(command, timeout=560)
    assert "15 kills of 2 ranks" in printed
    kinds = {what: int(number) for number, what in re.findall(r"^ +(\d+) (while \w+|between saves)$", printed, re.M)}
    assert sum(kinds.values()) == 15
    # A third of the touches of the folder are those of saving: none among fifteen would be one seed in four hundred.
    assert kinds["while saving"] >= 1, printed
