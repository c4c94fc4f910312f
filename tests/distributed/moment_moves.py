"""What moments.py has saved, loaded elsewhere: by other numbers of ranks, stages and optimizers; and broken.

deepspeed moment_moves.py OUTPUT FOLDER universal|scaled|switched|broken ...
"""

import gc
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

import deepspeed
import torch
from deepspeed import comm as dist
from moment_jobs import (
    EXCLUDED,
    MORE,
    TRAINED,
    Job,
    each,
    finish,
    gathered,
    observe,
    refusal,
    safe_get,
    train,
    write_json,
)

UNIVERSAL = {
    "1 fp32 to 1": ("1 fp32", Job(1, universal=True)),
    "2 fp32 to 2": ("2 fp32", Job(2, universal=True)),
    "3 fp32 to 3": ("3 fp32", Job(3, universal=True)),
    "1 fp32 to 2": ("1 fp32", Job(2, universal=True)),
    "2 fp32 to 1": ("2 fp32", Job(1, universal=True)),
    "2 fp32 to 1 exclude": ("2 fp32", Job(1, exclude=EXCLUDED, universal=True)),
    "3 fp32 to 3 exclude": ("3 fp32", Job(3, exclude=EXCLUDED, universal=True)),
    "1 plain to 1": ("1 plain", Job(1, recipe="plain", universal=True)),
    "3 plain to 3": ("3 plain", Job(3, recipe="plain", universal=True)),
    "1 plain to 2": ("1 plain", Job(2, recipe="plain", universal=True)),
    "1 plain to 2 quantized": ("1 plain", Job(2, universal=True)),
    "3 plain to 3 quantized": ("3 plain", Job(3, recipe="m4v8", universal=True)),
    "1 fp32 to 1 plain": ("1 fp32", Job(1, recipe="plain", universal=True)),
    "1 plain to 3": ("1 plain", Job(3, recipe="plain", universal=True)),
    "3 plain to 1": ("3 plain", Job(1, recipe="plain", universal=True)),
    "1 fp32 to 3": ("1 fp32", Job(3, universal=True)),
    "3 fp32 to 1": ("3 fp32", Job(1, universal=True)),
    "1 fp32 to 0": ("1 fp32", Job(0, universal=True)),
}
SCALED = {name: UNIVERSAL[name] for name in ("1 fp32 to 1", "1 fp32 to 2", "3 fp32 to 3", "1 plain to 1")}
"""For other numbers of ranks."""
SWITCHED = {
    **{f"{stage} plain to quantized": (f"{stage} plain", Job(stage, recipe="m4v8")) for stage in (0, 1, 3)},
    **{f"{stage} quantized to plain": (f"{stage} fp32", Job(stage, recipe="plain")) for stage in (0, 1, 3)},
    "1 fp32 to 4-bit": ("1 fp32", Job(1, recipe="adam4")),
    "1 fp32 to 2": ("1 fp32", Job(2)),
    "1 plain to 2": ("1 plain", Job(2, recipe="plain")),
}


def plain_bytes():
    """Bytes of all tensors that are alive, codes and scales among them."""
    found = [item for item in gc.get_objects() if type(item) is torch.Tensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def load(folder, moves):
    def run(name, move):
        source, job = move
        engine = job.start()
        gc.collect()
        before = plain_bytes()
        try:
            engine.load_checkpoint(f"{folder}/{source}")
            gc.collect()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        report = observe(engine) | {"grown": plain_bytes() - before}
        report["lr"] = [group["lr"] for group in engine.basic_optimizer.param_groups]
        report["decay"] = [group["weight_decay"] for group in engine.basic_optimizer.param_groups]
        if job.recipe != "plain" and job.stage > 0:
            report["safe_get"] = safe_get(engine)
        report["more"] = train(engine, TRAINED, TRAINED + MORE)
        report["steps after"] = observe(engine)["steps"]
        engine.destroy()
        return report

    return each(moves, run)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


TAG = f"global_step{TRAINED}"
RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
BROKEN = {
    "truncated": ("1 fp32", RANK_1, truncate),
    "truncated at 3": ("3 fp32", RANK_1, truncate),
    "missing": ("1 fp32", RANK_1, Path.unlink),
    "of another step": ("1 fp32", RANK_1, "1 fp32/later"),
    "of another step at 3": ("3 fp32", RANK_1, "3 fp32/later"),
    "of another model": ("1 fp32", RANK_1, "1 wider"),
    "of another model at 3": ("3 fp32", RANK_1, "3 wider"),
    "of other groups": ("1 fp32", RANK_1, "1 fp32 adam4 exclude"),
    "of another stage": ("1 fp32", RANK_1, "3 fp32"),
    "no state": ("1 fp32", RANK_1, lambda path: torch.save({"optimizer_state_dict": {}}, path)),
    "no file of torch": ("1 fp32", RANK_1, lambda path: ZipFile(path, "w").close()),
    "truncated at 0": ("0 fp32", "mp_rank_00_model_states.pt", truncate),
    "truncated universal": ("1 fp32", "zero/inner.weight/exp_avg.pt", truncate),
    "truncated universal at 3": ("3 fp32", "zero/inner.weight/exp_avg.pt", truncate),
    "missing universal": ("1 fp32", "zero/inner.weight/exp_avg_sq.pt", Path.unlink),
    "another step in universal": ("1 fp32", "zero/inner.weight/step.pt", lambda path: torch.save(7.0, path)),
    "another size in universal": (
        "3 fp32",
        "zero/inner.weight/exp_avg.pt",
        lambda path: torch.save({"param": torch.zeros(9)}, path),
    ),
}


def broken(folder):
    def run(name, damage):
        source, file, how = damage
        universal = file.startswith("zero/")
        tag = "universal" if universal else TAG
        if dist.get_rank() == 0:
            shutil.rmtree(f"{folder}/broken", ignore_errors=True)
            shutil.copytree(f"{folder}/{source}/{tag}", f"{folder}/broken/{tag}")
            target = Path(f"{folder}/broken/{tag}/{file}")
            if isinstance(how, str):
                origin = how if "/" in how else f"{how}/{TAG}"
                shutil.copy(f"{folder}/{origin}/{file}", target)
            else:
                how(target)
        dist.barrier()
        engine = Job(int(source[0]), universal=universal).start()
        said = refusal(lambda: engine.load_checkpoint(f"{folder}/broken", tag=tag))
        engine.destroy()
        return {"file": file, "errors": gathered(said)}

    return each(BROKEN, run)


if __name__ == "__main__":
    output, folder, *verbs = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    deepspeed.init_distributed()
    report = {}
    for verb in verbs:
        if verb == "broken":
            report[verb] = broken(folder)
        else:
            moves = {"universal": UNIVERSAL, "switched": SWITCHED, "scaled": SCALED}[verb]
            report[verb] = load(folder, moves)
    write_json(output, report)
    finish()
