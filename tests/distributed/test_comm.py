"""Quantized collectives and DDP on 1 to 8 real ranks over gloo, and on one rank of a thousand."""

import json

import pytest
from helpers.launching import PROGRAMS, run_ranks

pytestmark = pytest.mark.distributed

TIMEOUT = 200


def run(program, output, ranks, *arguments):
    """Reports of all ranks."""
    run_ranks(PROGRAMS / program, output, *arguments, ranks=ranks, timeout=TIMEOUT)
    return [json.loads(output.with_name(f"{output.name}.{rank}").read_text()) for rank in range(ranks)]


def check(reports, least):
    """Nothing is wrong, and the program did not leave out its checks."""
    for report in reports:
        assert report["wrong"] == []
        assert report["checked"] >= least


# Checks of each rank, less those that only the comparing one of the ranks makes.
@pytest.mark.parametrize(
    ("ranks", "least"), [(1, 300), (2, 280), (3, 250), (4, 450), pytest.param(8, 450, marks=pytest.mark.slow)]
)
def test_collectives(tmp_path, ranks, least):
    """Against their definition bit by bit, against torch's within bounds, and the bytes at the collective."""
    check(run("collectives.py", tmp_path / "report", ranks), least)


@pytest.mark.parametrize("rank", [0, 1023])
def test_collectives_of_a_thousand_ranks(tmp_path, rank):
    """Partitioning, padding, messages and their bytes; the other ranks are torch's fake process group."""
    output = tmp_path / "report"
    run_ranks(PROGRAMS / "collectives.py", output, rank, ranks=0, timeout=TIMEOUT)
    check([json.loads(output.with_name(f"report.{rank}").read_text())], 50)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ddp(tmp_path, ranks):
    check(run("ddp.py", tmp_path / "report", ranks), 600)


def test_accelerate(tmp_path):
    check(run("ddp.py", tmp_path / "report", 2, "accelerate"), 150)
