"""One rank of `benchmark.py comm`: `python -m benchmarks.comm_worker SPEC.json`, with a launcher's variables set.

Writes rank-R.json beside the specification: seconds of each call, bytes sent, errors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import comm_contenders, timing
from benchmarks.comm_contenders import Contender, Run


@dataclass
class Spec:
    """What a rank is to measure."""

    names: list[str]
    numel: int
    rounds: int
    warm_up: int
    threads: int
    interface: str | None
    """Whose count of sent bytes is read; None where others use it too."""
    timeout: float
    """Seconds for one collective."""
    device: str = "cpu"
    """Or cuda: each rank has the GPU of its local number, over NCCL."""

    def write(self, folder: Path) -> Path:
        path = folder / "spec.json"
        path.write_text(json.dumps(dataclasses.asdict(self)))
        return path


@dataclass
class Measured:
    """What a rank has measured, by contender."""

    seconds: dict[str, list[float]]
    sent: dict[str, int | None]
    errors: dict[str, float]
    """Relative to the exact sum, in the Euclidean norm."""
    failed: dict[str, str]

    @staticmethod
    def path(folder: Path, rank: int) -> Path:
        return folder / f"rank-{rank}.json"

    @classmethod
    def read(cls, folder: Path, rank: int) -> Measured:
        return cls(**json.loads(cls.path(folder, rank).read_text()))


def main(spec_file: Path) -> None:
    """Measure what the specification says; all ranks together."""
    spec = Spec(**json.loads(spec_file.read_text()))
    torch.set_num_threads(spec.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    _join(spec)
    try:
        measured = _measure(spec)
        rank = dist.get_rank()
        # No rank ends while another one still needs it.
        dist.barrier()
    finally:
        dist.destroy_process_group()
    Measured.path(spec_file.parent, rank).write_text(json.dumps(dataclasses.asdict(measured)))


def _device(spec: Spec) -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if spec.device == "cuda" else torch.device("cpu")


def _join(spec: Spec) -> None:
    timeout, device = timedelta(seconds=spec.timeout), _device(spec)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def _measure(spec: Spec) -> Measured:
    generator = torch.Generator().manual_seed(dist.get_rank())
    device = _device(spec)
    gradients = (torch.randn(spec.numel, generator=generator) * 1e-2).to(device)
    exact = gradients.clone()
    dist.all_reduce(exact)

    runs: dict[str, Run] = {}
    measured = Measured({}, {}, {}, {})
    for contender in comm_contenders.ALL:
        if contender.name not in spec.names:
            continue
        run, problem = _prepare(contender, gradients)
        # A competitor that cannot run here must not keep the others from it; what one rank leaves out, all do.
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        if any(problems):
            measured.failed[contender.name] = next(filter(None, problems))
        elif run is not None:
            runs[contender.name] = run

    def before(name: str) -> None:
        runs[name].before()
        dist.barrier()

    for name, run in runs.items():
        before(name)
        sent = _sent(spec.interface)
        run.call()
        dist.barrier()
        measured.sent[name] = None if sent is None else (_sent(spec.interface) or 0) - sent
        measured.errors[name] = _error(run.result(), exact)
    del exact
    measured.seconds = timing.take_turns(
        {name: run.call for name, run in runs.items()},
        rounds=spec.rounds,
        warm_up=spec.warm_up,
        device=device,
        before=before,
    )
    return measured


def _prepare(contender: Contender, gradients: torch.Tensor) -> tuple[Run | None, str | None]:
    try:
        run = contender.make(gradients)
        run.before()
        run.call()
    except Exception as error:
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return run, None


def _sent(interface: str | None) -> int | None:
    return None if interface is None else sent_bytes(interface)


def sent_bytes(interface: str) -> int:
    """Bytes that the interface has sent, packets' headers included."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    if got.numel() != exact.numel():  # of a reduce-scatter
        exact = exact.view(dist.get_world_size(), -1)[dist.get_rank()]
    return float((got.float() - exact).norm() / exact.norm())


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(Path(sys.argv[1]))
