"""Scripts that know nothing of ds_quant run under it unmodified, and learn as in full precision."""

import importlib.util

import assets
import pytest
from clients import CLIENTS
from running import run_and_check

pytestmark = pytest.mark.distributed

QUICK = ("trainer-zero3", "native")  # accelerate: distributed/test_ways_in.py and test_front_ends.py


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return assets.make(tmp_path_factory.mktemp("assets"))


@pytest.mark.parametrize(
    "client", [client for client in CLIENTS if client.name in QUICK], ids=lambda client: client.name
)
def test_unmodified(client, made, tmp_path):
    run_and_check(client, made, tmp_path, beside_plain=False, phases=client.name == "native")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_beside_full_precision(client, made, tmp_path):
    """And what users do then: resume, evaluate, resume with another number of ranks."""
    if importlib.util.find_spec(client.package) is None:
        pytest.skip(f"needs {client.package}: pip install '.[clients]'")
    run_and_check(client, made, tmp_path)
