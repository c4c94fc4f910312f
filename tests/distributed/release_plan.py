"""A dry run of the job whose memory is measured, with parts as small as there: the peak of rank 0.

release_plan.py OUTPUT
"""

import sys
from pathlib import Path

from release import MEMORY_PART, memory_job

from ds_quant.kernels import native
from ds_quant.optim import master
from ds_quant.planning import worker

if __name__ == "__main__":
    master.PART_ELEMENTS = MEMORY_PART
    native.skip_arithmetic()
    outcome = worker.dry_run(memory_job(2, 0), 2)
    Path(sys.argv[1]).write_text(str(outcome.peak_bytes))
