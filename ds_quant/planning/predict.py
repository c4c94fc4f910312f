"""Predictions of jobs: dry runs in processes of their own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any

from ds_quant.config import ConfigError
from ds_quant.planning.job import Job, Outcome
from ds_quant.planning.traffic import Collective


class Predictor:
    """Predicts jobs one after the other. A context: it holds a process that has everything imported."""

    def __enter__(self) -> "Predictor":
        self._log: IO[bytes] = tempfile.TemporaryFile()
        environment = {
            **os.environ,
            # Planning takes no accelerator, and no variables of a job that it is called from.
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONWARNINGS": "ignore",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            "HF_HUB_OFFLINE": "1",
            # It forks for each job: a child would wait for ever for threads that its parent has.
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        for name in ("LOCAL_SIZE", "DS_QUANT_KERNELS"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ds_quant.planning.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._log.close()

    def predict(self, job: Job, *, node_size: int | None = None, offloaded: Sequence[str] = ()) -> Outcome:
        """What a step of the job takes on its rank.

        Args:
            node_size: ranks in a node; all of them if None.
            offloaded: roles of memory (`ledger.ROLES`) that DeepSpeed's offloading keeps on the host.

        Raises:
            ConfigError: what training would refuse, and what has no size without values.
            RuntimeError: the dry run itself failed.
        """
        request: dict[str, Any] = {
            "job": {name: getattr(job, name) for name in Job.__dataclass_fields__},
            "node_size": node_size or job.world_size,
            "offloaded": list(offloaded),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(
                "ds_quant.planning: got no answer, since the process of the dry runs has ended; allowed: one that is "
                f"alive; fix: see its last lines, and where they do not help report them:\n{self._last_lines()}"
            )
        answer = json.loads(line)
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        if "failed" in answer:
            raise RuntimeError(
                "ds_quant.planning: got an error in a dry run; allowed: jobs that train; fix: where training itself "
                f"goes well, report this:\n{answer['failed']}"
            )
        return read_outcome(answer["outcome"])

    def _last_lines(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-15:])


def read_outcome(values: dict[str, Any]) -> Outcome:
    """An outcome that went through JSON."""
    collectives = [
        Collective(phase, operation, dtype, sent, tuple(ranks), tuple(splits))
        for phase, operation, dtype, sent, ranks, splits in values.pop("collectives")
    ]
    return Outcome(**values, collectives=collectives)
