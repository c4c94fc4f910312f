"""What the distributed programs share: a tiny model, fixed data, and a report as JSON."""

import gc
import hashlib
import json
import os
import shutil
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

VOCABULARY = 96
LENGTH = 16


def tiny_llama_config(**overrides):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": VOCABULARY, **overrides})


def batch(index, rows):
    """int64 [rows, LENGTH], the same on every machine."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)


def digest(tensors):
    """A hash of the values of tensors, in fp32."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def forward(engine, index, rows):
    """The loss of this rank's `rows` of the batch with the number `index`."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = batch(index, rows * world_size)[rank::world_size]
    return engine(input_ids=data, labels=data).loss


def to_universal(folder, step, stage):
    """What `python -m deepspeed.checkpoint.ds_to_universal` does, within this process."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = {"input_folder": f"{folder}/global_step{step}", "output_folder": f"{folder}/universal"}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    options = {"keep_temp_folder": False, "strict": True, "inject_missing_state": stage < 3}
    ds_to_universal.main(Namespace(**arguments, **workers, **options))


def write_report(path, report):
    """One file, from rank 0, complete or not there at all."""
    if int(os.environ.get("RANK", "0")) == 0:
        target = Path(path)
        part = target.with_suffix(".part")
        part.write_text(json.dumps(report))
        part.replace(target)


def say(*what):
    sys.stderr.write(" ".join(map(str, what)) + "\n")  # in one piece: other ranks write there too
    sys.stderr.flush()


def run_cases(run, arguments):
    """Call run(config, stage, dtype) for each STAGE:DTYPE of `OUTPUT CONFIG STAGE:DTYPE ...`; report what it returns.

    All in one process, to import everything once; the state that accelerate keeps is reset in between.
    """
    from accelerate.state import AcceleratorState

    output, path, *cases = (argument for argument in arguments if not argument.startswith("--local_rank"))
    report = {}
    for case in cases:
        stage, dtype = case.split(":")
        say(f"rank {os.environ['RANK']}: {case}")
        report[case] = run(path, int(stage), dtype)
        AcceleratorState._reset_state(reset_partial_state=False)
        gc.collect()
    write_report(output, report)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def shared_folder():
    """A new folder, the same on all ranks."""
    folders = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(folders)
    return folders[0]


def remove(folder):
    """Remove it once all ranks are done with it."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder)


def write_reports(path, report):
    """One file with the reports of all ranks, in their order."""
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, report)
    write_report(path, found)


def leave():
    """End a job that is done, past the interpreter's own teardown: there, gloo's threads abort one in a hundred."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
