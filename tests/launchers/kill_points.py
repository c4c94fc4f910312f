"""Kill a training run again and again, at points drawn from a seed, and let it end: nothing may differ afterwards.

    python tests/launchers/kill_points.py --kills 200 [--seed 1] [--ranks 2]

One rank of the run is killed by SIGKILL at its n-th touch of the output folder, or up to 20 ms after it, n and the time
being drawn; the other must end by itself. Then every checkpoint must be whole, byte for byte, the newest must be as new
as any that was there, and the run is started again with `--resume_from_checkpoint auto`. In the end the weights and
metrics.csv must be those of a run that nobody disturbed. The output is one line a kill and a table.

The programs are loaded once and forked for each start, which leaves two seconds of the ten that a start takes.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ds_quant.base import trainer_checkpoints

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "launchers"), str(ROOT / "tests"), str(ROOT / "tests" / "launchers")]
STEPS = 40
FLAGS = [
    *("--config_overrides", "num_hidden_layers=1,hidden_size=32,intermediate_size=64"),
    *("--vocab_size", "320", "--context_length", "32", "--global_batch_size", "4", "--max_eval_sequences", "4"),
    *("--validation_fraction", "0.2", "--warmup_steps", "1", "--disable_tqdm", "true", "--max_steps", str(STEPS)),
    # Every save is followed by a prune, and most touches of the folder are those of saving.
    *("--logging_steps", "3", "--eval_steps", "10", "--save_steps", "2", "--save_total_limit", "2"),
    *("--ddp_timeout", "30", "--overwrite_output_dir", "false", "--resume_from_checkpoint", "auto"),
]
_TOUCHES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
LONGEST_SECONDS = 270.0
"""A start that has not ended by then hangs."""


class Point(NamedTuple):
    """Where one rank is killed."""

    rank: int
    touch: int
    """Counted from the start of training."""
    delay: float
    """Seconds."""


class Result(NamedTuple):
    """What the kills met."""

    kills: int
    """Starts that were killed."""
    during: dict[str, int]
    """Kills by what the run was doing."""
    seconds: float


def run(folder: Path, *, kills: int, seed: int, ranks: int, config: Path, say: bool = True) -> Result:
    """Do it once in `folder`; raises AssertionError at the first thing that is not as it should be."""
    from helpers.samples import write_corpus

    begin = time.monotonic()
    corpus = write_corpus(folder / "documents.jsonl")
    command = ["--deepspeed", str(config), *FLAGS, "--train_file", str(corpus)]
    whole, killed = folder / "whole", folder / "killed"
    touches = _count_touches(folder, [*command, "--output_dir", str(whole)], whole, ranks)
    draw = random.Random(seed)
    during: dict[str, int] = collections.Counter()
    done = newest = 0
    while done < kills:
        # Early points come more often: a start that takes few steps is killed in the next one's first saves.
        point = Point(
            draw.randrange(ranks), 1 + int(touches * draw.random() ** 3), draw.choice([0.0, draw.random() / 50])
        )
        statuses = _start([*command, "--output_dir", str(killed)], killed, ranks, point, folder / "log.txt")
        if all(status == 0 for status in statuses):
            # It came to its end before the point: the next ones begin anew.
            _compare(whole, killed)
            shutil.rmtree(killed)
            newest = 0
            continue
        assert -signal.SIGKILL in statuses, (
            f"{point}: it ended by itself: {statuses}\n{(folder / 'log.txt').read_text()}"
        )
        done += 1
        what, newest = _check(killed, newest, point)
        during[what] += 1
        if say:
            print(
                f"{done}/{kills}: rank {point.rank}, touch {point.touch}: killed {what}, newest whole: {newest}",
                flush=True,
            )
    statuses = _start([*command, "--output_dir", str(killed)], killed, ranks, None, folder / "log.txt")
    assert set(statuses) == {0}, (folder / "log.txt").read_text()
    _compare(whole, killed)
    return Result(done, dict(during), time.monotonic() - begin)


def _check(killed: Path, newest: int, point: Point) -> tuple[str, int]:
    """What the run was doing when it was killed, and the step of the newest whole checkpoint."""

    there = trainer_checkpoints.listed(killed)
    for path in there:
        problem = trainer_checkpoints.defect(path, contents=True, ours=True)
        assert problem is None, f"{point}: {path.name} has its final name: {problem}"
    step = trainer_checkpoints.step_of(there[-1]) if there else 0
    assert step >= newest, f"{point}: checkpoint-{newest} was whole, and the newest is {step} now"
    touched = (killed.parent / "touched.txt").read_text()
    for part, what in ((".writing-", "while saving"), ("pruned-", "while pruning"), ("checkpoint-", "while renaming")):
        if part in touched and (part != ".writing-" or "pruned-" not in touched):
            return what, step
    return "between saves", step


def _compare(whole: Path, killed: Path) -> None:
    for name in ("metrics.csv", "model/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"


def _count_touches(folder: Path, command: list[str], out: Path, ranks: int) -> int:
    """Run undisturbed; how often the first rank touches the output folder."""
    count = folder / "touches.txt"
    statuses = _start(command, out, ranks, None, folder / "log.txt", count)
    assert set(statuses) == {0}, (folder / "log.txt").read_text()
    return int(count.read_text())


def _start(
    command: list[str], out: Path, ranks: int, point: Point | None, log: Path, count: Path | None = None
) -> list[int]:
    """Exit statuses of all ranks; minus the signal of one that was killed."""
    from conftest import free_port

    port = str(free_port())
    log.write_text("")
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _be_rank(command, out, rank, ranks, port, point, log, count)
        children.append(child)
    found: dict[int, int] = {}
    deadline = time.monotonic() + LONGEST_SECONDS
    while len(found) < ranks:
        for child in children:
            if child not in found:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    found[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - found.keys():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"{point}: a rank hangs\n{log.read_text()}")
        time.sleep(0.01)
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)
    return [found[child] for child in children]


def _be_rank(
    command: list[str], out: Path, rank: int, ranks: int, port: str, point: Point | None, log: Path, count: Path | None
) -> None:
    """The life of a forked process."""
    status = 1
    try:
        os.setsid()
        opened = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        import pretrain

        with _touching(out, point if point is not None and point.rank == rank else None) as touches:
            status = pretrain.main(command)
        if count is not None and rank == 0:
            count.write_text(str(touches[0]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def _touching(out: Path, point: Point | None) -> Iterator[list[int]]:
    """Count what touches the output folder from the first line of metrics.csv on, and kill this process at `point`."""
    touches = [0]
    training = [False]
    prefix = str(out)
    touched = out.parent / "touched.txt"

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _TOUCHES or not arguments or not str(arguments[0]).startswith(prefix):
            return
        training[0] = training[0] or "metrics.csv" in str(arguments[0]) or ".writing" in str(arguments[0])
        if not training[0]:
            return
        touches[0] += 1
        if point is not None and touches[0] == point.touch:
            touched.write_text(str(arguments[0]))
            if point.delay == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.setitimer(signal.ITIMER_REAL, point.delay)

    if point is not None:
        # The default action of the timer's signal would end the process too, but not as a lost node does.
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    sys.addaudithook(hear)
    yield touches


def preload() -> None:
    """Load what every start needs; must leave no threads behind."""
    os.environ.update(
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false"
    )
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    # What a run imports on its way, some of it late.
    for name in ("pretraining.job", "ds_quant.engine", "deepspeed.runtime.zero.muon.original_muon"):
        importlib.import_module(name)
    importlib.import_module("matplotlib.backends.backend_agg")


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--config", type=Path, default=ROOT / "ds_configs" / "all4.json")
    options = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), kills=options.kills, seed=options.seed, ranks=options.ranks, config=options.config)
    print(
        f"\n{result.kills} kills of {options.ranks} ranks in {result.seconds:.0f} s, seed {options.seed}; all resumed"
    )
    for what, number in sorted(result.during.items()):
        print(f"  {number:4d} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
