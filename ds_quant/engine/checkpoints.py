"""Whether a checkpoint's moments are what this engine can load, asked before DeepSpeed loads anything.

DeepSpeed's own errors come half-way, on the rank that meets them, and name no file; the other ranks then wait in a
collective. Here every rank looks at its files first (tensors stay on the disk), and all learn of an error together.
"""

import os
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from ds_quant.base.checkpoint_files import check_files, read_checkpoint_file, universal_fix
from ds_quant.base.errors import fail
from ds_quant.comm.agreement import raise_together


def moment_files(engine: Any, load_dir: str, tag: str | None) -> list[str]:
    """The files that this rank reads its moments from; none where there is no checkpoint at all."""
    universal = engine.load_universal_checkpoint()
    if tag is None:
        latest = os.path.join(load_dir, "latest_universal" if universal else "latest")
        if not os.path.isfile(latest):
            return []  # DeepSpeed's own warning or error says so
        with open(latest) as file:
            tag = file.read().strip()
    if universal:
        folder = os.path.join(load_dir, str(tag), "zero")
        found = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
        return [path for path in sorted(found) if path.endswith(".pt")]
    if engine.zero_optimization():
        return [engine._get_zero_ckpt_name(load_dir, tag)]
    if engine.has_moe_layers:
        groups = deepspeed.utils.groups
        return [
            engine._get_optimizer_ckpt_name(
                load_dir, tag, groups._get_expert_parallel_rank(groups._get_max_expert_size_name())
            )
        ]
    return [engine._get_ckpt_name(load_dir, tag)]


def check_checkpoint(engine: Any, files: list[str]) -> None:
    """Raise ConfigError on all ranks where one cannot load the moments in `files`, naming the file."""
    raise_together(lambda: check_files(files), engine.device)
    if not files:
        return
    if engine.load_universal_checkpoint():
        raise_together(lambda: _check_universal(engine, files), engine.device)
        return
    steps: list[float] = []
    raise_together(lambda: steps.extend(_check_partition(engine, files[0])), engine.device)
    _check_same_step(engine, files[0], steps)


def stepped_tensors(engine: Any) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """(group, tensor) of all that the basic optimizer steps; stage 3 puts them into the groups for a step only."""
    optimizer, wrapper = engine.basic_optimizer, engine.optimizer
    partitions = getattr(wrapper, "fp32_partitioned_groups_flat", None)
    if partitions is not None:
        return [
            (optimizer.param_groups[wrapper.sub_group_to_group_id[number]], partition)
            for number, partition in enumerate(partitions)
        ]
    return [(group, param) for group in optimizer.param_groups for param in group["params"]]


def _read(path: str) -> Any:
    return read_checkpoint_file(path, mmap=True)


def _check_partition(engine: Any, path: str) -> list[float]:
    """The steps of the moments in a rank's own file."""
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    state = _read(path)
    state = state.get("optimizer_state_dict" if stage else "optimizer") or {}
    saved_stage = int(state.get("zero_stage", stage) or 0)
    if stage and (saved_stage == 3) != (stage == 3):
        raise fail(path, f"a checkpoint of ZeRO stage {saved_stage}", f"one of stage {stage}", universal_fix(path))
    ranks = state.get("partition_count")
    if stage and ranks is not None and _largest(ranks) != _largest(wrapper.partition_count):
        got = f"a checkpoint of {_largest(ranks)} ranks"
        raise fail(path, got, f"one of {_largest(wrapper.partition_count)} ranks", universal_fix(path))
    saved = state.get("base_optimizer_state", state.get("optimizer_state_dict", state))
    if isinstance(saved, list):
        raise fail(
            path, "an elastic checkpoint", "one without zero_optimization.elastic_checkpoint", universal_fix(path)
        )
    if "state" not in saved or "param_groups" not in saved:
        raise fail(path, "no state of an optimizer", "a checkpoint with the optimizer", "load another tag")
    params = [param for _, param in stepped_tensors(engine)]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    same_groups = len(saved["param_groups"]) == len(engine.basic_optimizer.param_groups)
    if not same_groups or len(numbers) != len(params):
        raise fail(
            path,
            f"an optimizer with {len(saved['param_groups'])} groups and {len(numbers)} tensors",
            f"{len(engine.basic_optimizer.param_groups)} groups and {len(params)} tensors, as this run has",
            "load a checkpoint of this model; where ds_quant.optimizer.exclude has changed, " + universal_fix(path),
        )
    steps = []
    optimizer = engine.basic_optimizer
    for number, param in zip(numbers, params, strict=True):
        moments = saved["state"].get(number) or {}
        for name in optimizer.STATES:
            size, moment = optimizer.state_numel(name, param), moments.get(name)
            if moment is not None and moment.numel() != size:
                raise fail(
                    path,
                    f"a moment of {moment.numel()} elements",
                    f"{size} elements, which this rank has of this model",
                    "load a checkpoint of this model",
                )
        if "step" in moments:
            steps.append(float(moments["step"]))
    return steps


def _largest(counts: Any) -> int:
    return max(counts) if isinstance(counts, list) else int(counts)


def _check_same_step(engine: Any, path: str, steps: list[float]) -> None:
    """Raise ConfigError on all ranks where they would load moments of different steps.

    Within a file steps may differ: parameters that were frozen for a while were stepped less often.
    """
    own = (min(steps), max(steps)) if steps else None
    nothing = [float("-inf")] * 4
    bounds = torch.tensor([own[0], -own[0], own[1], -own[1]] if own else nothing, device=engine.device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if bounds[0] > -bounds[1] or bounds[2] > -bounds[3]:
        everywhere: list[Any] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(everywhere, (path, own))
        one_of_each = sorted({found: path for path, found in everywhere if found}.items())
        shown = [f"{last:.0f}" if first == last else f"{first:.0f} to {last:.0f}" for (first, last), _ in one_of_each]
        raise fail(
            ", ".join(path for _, path in one_of_each),
            f"moments of the steps {', '.join(shown)}",
            "files of one checkpoint",
            "files of two checkpoints are mixed up: load another tag, or copy the folder again",
        )


def _check_universal(engine: Any, files: list[str]) -> None:
    """Shapes of this rank's share of the parameters, and the steps of all."""
    (folder,) = {path[: path.rindex(f"{os.sep}zero{os.sep}") + 6] for path in files}
    there, rank, world_size = set(files), dist.get_rank(), dist.get_world_size()
    common = os.path.join(folder, "optimizer_state.pt")
    if not engine.zero_optimization():
        fix = "set zero_optimization.stage to 1"
        raise fail(common, "a universal checkpoint at ZeRO stage 0", "stages 1 to 3: DeepSpeed cannot load it", fix)
    if common in there and ("optimizer_state_dict" in _read(common)) != (engine.zero_optimization_stage() == 3):
        got, allowed = ("stage 1 or 2", "stage 3") if engine.zero_optimization_stage() == 3 else ("stage 3", "1 or 2")
        fix = "train at the stage it was saved at (stages 1 and 2 can be exchanged)"
        raise fail(common, f"a universal checkpoint of ZeRO {got}", f"one of {allowed}: DeepSpeed's differ", fix)
    names = sorted(name for param, name in engine.param_names.items() if param.requires_grad)
    sizes = {name: getattr(p, "ds_numel", p.numel()) for p, name in engine.param_names.items()}
    for name in names[rank::world_size]:
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            path = os.path.join(folder, name, f"{key}.pt")
            if path not in there:
                raise fail(path, "no such file", "a file for every parameter of this model", "convert it again")
            saved = _read(path)
            numel = (saved["param"] if isinstance(saved, dict) else saved).numel()
            if numel != sizes[name]:
                raise fail(path, f"{numel} elements", f"{sizes[name]}, as in this model", "load another checkpoint")
    steps = {name: os.path.join(folder, name, "step.pt") for name in names}
    found = {path: float(_read(path)) for path in steps.values() if path in there}
    usual = sorted(found.values())[len(found) // 2] if found else 0.0
    for path, step in found.items():
        if step != usual:
            got = f"step {step:.0f} beside others of step {usual:.0f}"
            raise fail(path, got, "files of one checkpoint", "convert the checkpoint again")
