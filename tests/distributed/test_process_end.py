"""How a script under `python -m ds_quant` ends: without losing a rank on the last step to the interpreter's own end."""

import pytest
from helpers.launching import UNDER_DS_QUANT, run_ranks

pytestmark = pytest.mark.distributed

START = """
import atexit, sys, time
import torch, torch.distributed as dist

dist.init_process_group("gloo")
"""

# A thread of Gloo is left with the last reference to a gathered tensor, and cannot take the interpreter's lock before
# the script ends.
THREAD = """
dist.barrier()
gathered = [torch.zeros(8) for _ in range(2)]
sys.setswitchinterval(1000)
work = dist.all_gather(gathered, torch.ones(8), async_op=True)
del gathered, work
end = time.monotonic() + 0.5
while time.monotonic() < end:
    pass
"""

MEETING = """
def meet():
    dist.barrier()
    print("met at exit", flush=True)

atexit.register(meet)
"""


@pytest.fixture
def run(tmp_path):
    def run(text):
        script = tmp_path / "script.py"
        script.write_text(START + text)
        return run_ranks(UNDER_DS_QUANT, script, timeout=120, check=False)

    return run


@pytest.mark.parametrize("end", ["", "sys.exit(0)"], ids=["returns", "exits"])
def test_threads_of_gloo_do_not_abort_the_end(run, end):
    ended, output = run(THREAD + end)
    assert ended == 0, output


def test_what_a_script_leaves_for_the_end_still_meets_the_other_ranks(run):
    ended, output = run(MEETING)
    assert (ended, output.count("met at exit")) == (0, 2), output


def test_a_rank_that_fails_does_not_wait_for_the_others(run):
    """The others stay in a collective that it began, too."""
    ended, output = run("dist.barrier(async_op=True) if dist.get_rank() else None\nsys.exit(dist.get_rank() * 3)")
    assert ended == 3, output
