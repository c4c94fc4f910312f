"""Ranks of a run whose main threads do what the test says: `lifeline_ranks.py OUTPUT_DIR GRACE_SECONDS DOING...`.

One DOING for each rank: `sleep` for ever, as in a collective that never notices the loss of a peer; `end` well, each
rank two seconds after the one before it, since some have more to do; or `fail` of an error of its own when told to by a
file of that name.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from survival import lifeline
from survival.control import Control
from survival.ending import ending, take_folder
from survival.errors import RunEnded

output_dir, grace, *doings = sys.argv[1:]
# What starts ranks asks the others to end if one has failed. A rank that waits inside a library runs no handler.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
dist.init_process_group("gloo")
control = Control(60)
doing = doings[control.rank]
lifeline.GRACE_SECONDS = float(grace)
lease = take_folder(Path(output_dir), control)
try:
    with ending(lease, control):
        control.step = 7
        print(f"rank {control.rank} is ready", flush=True)
        if doing == "sleep":
            time.sleep(600)
        while doing == "fail":
            if (Path(output_dir) / "fail").exists():
                raise ValueError("an error of its own")
            time.sleep(0.05)
except RunEnded as end:
    sys.exit(end.exit_status)
time.sleep(2 * control.rank)
print(f"rank {control.rank} has ended well", flush=True)
