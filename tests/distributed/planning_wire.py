"""Traffic of one real step as the planner counts it, as DeepSpeed's comms logger does, and as ds_quant's statistics do.

Run as `torchrun planning_wire.py OUTPUT CONFIG STAGE`.
"""

import sys
from collections import Counter

import deepspeed
from common import leave, tiny_llama_config, write_report

from ds_quant.planning.configs import job_config
from ds_quant.planning.job import Job, make_engine
from ds_quant.planning.ledger import Ledger
from ds_quant.planning.training_step import record_step, token_batch


def main():
    output, path, stage = sys.argv[1:4]
    deepspeed.init_distributed()
    world_size = deepspeed.comm.get_world_size()
    config = job_config(path, world_size=world_size, rows=2, accumulation=2, stage=int(stage))
    model = tiny_llama_config().to_dict()
    job = Job(config, model, 2, 16, world_size, deepspeed.comm.get_rank())
    ledger = Ledger()
    with ledger:
        engine = make_engine(job)
        for _ in range(2):
            record_step(engine, lambda: token_batch(96, 2, 16), ledger)
        ledger.collectives.clear()
        deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False)
        record_step(engine, lambda: token_batch(96, 2, 16), ledger)
        deepspeed.comm.configure(enabled=False)
    logged = Counter()
    for name, sizes in deepspeed.comm.comms_logger.comms_dict.items():
        for size, records in sizes.items():
            logged[f"{name.split(' ')[0]} {size}"] += records[0]
    gradients = getattr(engine, "ds_quant_gradients", None)
    write_report(
        output,
        {
            "collectives": [one._asdict() for one in ledger.collectives],
            "logged": logged,
            "statistics": gradients.last_step.sent_bytes if gradients else None,
        },
    )
    leave()


if __name__ == "__main__":
    main()
