"""Free ports: reserved for those that they were given to."""

import random
import re
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from ds_quant.base import process_group
from ds_quant.base.process_group import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reserving is for Linux alone")


@pytest.fixture
def of_two(monkeypatch):
    """Only two ports to choose from, in this order."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("", 0))
        second.bind(("", 0))
        ports = [first.getsockname()[1], second.getsockname()[1]]
    monkeypatch.setattr(random.SystemRandom, "sample", lambda self, values, count: ports)
    return ports


def test_a_port_is_not_given_twice(of_two):
    assert [free_port(), free_port()] == of_two
    with pytest.raises(OSError, match="no free port"):
        free_port()


def test_no_port_of_a_job_of_slurm(monkeypatch):
    """A job of one rank and one of Slurm on the same machine: both have to listen."""
    asked = []
    monkeypatch.setattr(random.SystemRandom, "sample", lambda self, values, count: asked.append(values) or [])
    with pytest.raises(OSError, match="no free port"):
        free_port()
    first = int(re.search(r"port=\$\(\((\d+) \+", (ROOT / "slurm" / "pretrain.sbatch").read_text())[1])
    assert max(asked[0]) < first


def test_torch_listens_on_a_reserved_port():
    port = free_port()
    store = (
        "from torch.distributed import TCPStore\n"
        "for libuv in (True, False):\n"
        f"    print(TCPStore('127.0.0.1', {port}, 1, True, use_libuv=libuv).port)"
    )
    ended = subprocess.run([sys.executable, "-c", store], capture_output=True, text=True, timeout=400)
    assert ended.stdout.split() == [str(port)] * 2, ended.stderr


def test_the_oldest_ports_are_let_go():
    held = process_group._HELD_PORTS
    ports = [free_port() for _ in range(held.maxlen + 8)]
    assert [each.getsockname()[1] for each in held] == ports[8:]
    with socket.socket() as other:
        other.bind(("", ports[0]))
