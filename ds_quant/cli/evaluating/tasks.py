"""Few-shot tasks, by lm-eval's own model class and evaluator."""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_quant.base.errors import closest
from ds_quant.cli.shared.errors import CommandError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER = (
    *("mnli", "mrpc", "rte", "qnli", "sst2", "wnli"),
    *("arc_easy", "arc_challenge", "hellaswag", "lambada_openai"),
)
"""The tasks of Chitsaz et al., EMNLP 2024, by lm-eval's names."""
PAPER_FEWSHOT = 5
PAPER_SEEDS = (0, 1, 2, 3, 4)
"""Five, as in the paper; which ones it took is not known."""
BOOTSTRAP_ITERATIONS = 1000
"""For standard errors of metrics that are not means, such as perplexity."""

Figures = dict[str, Any]
"""By metric: mean and deviation over the seeds, the value of each seed, lm-eval's standard error over the samples."""


class Tasks:
    """Tasks that were found, and how to run them.

    Args:
        names: tasks, groups or tags of lm-eval, or of the YAML files in `include_path`.
        num_fewshot: examples in front of each question; None: as each task says.
        seeds: each chooses other examples, and is what lm-eval's own `--seed` sets.
        limit: questions of a task, or the share of them below 1; None: all.

    Raises:
        CommandError: lm-eval is not installed, or a task is not known.
    """

    def __init__(
        self,
        names: list[str],
        *,
        include_path: str | None,
        num_fewshot: int | None,
        seeds: list[int],
        limit: float | None,
    ) -> None:
        if include_path is not None and not Path(include_path).is_dir():
            raise CommandError(f"--include_path: got {include_path!r}; allowed: a folder with task files; correct it")
        self.names = names
        self._num_fewshot, self._seeds, self._limit = num_fewshot, seeds, limit
        # Reading the thousands of files of lm-eval itself takes many seconds.
        self._manager = manager(include_path, include_defaults=include_path is None)
        if not all(name in self._manager.all_tasks for name in names):
            self._manager = manager(include_path, include_defaults=True)
        for name in names:
            if name not in self._manager.all_tasks:
                near = closest(name, self._manager.all_tasks)
                hint = f"did you mean {near!r}? " if near else ""
                raise CommandError(
                    f"--tasks: got {name!r}; allowed: paper, what `lm_eval ls tasks` lists, and the task files in "
                    f"--include_path; {hint}correct it"
                )
        with self._guarded():
            self._manager.load(names)  # their data too: known before minutes of perplexity

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, Figures]:
        """Figures by task.

        Raises:
            CommandError: a task's data cannot be loaded, or it cannot be run.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        results: list[dict[str, dict[str, Any]]] = []
        with self._guarded():
            harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            for seed in self._seeds:
                done = simple_evaluate(
                    model=harness,
                    tasks=list(self.names),
                    num_fewshot=self._num_fewshot,
                    batch_size=batch_size,
                    limit=self._limit,
                    bootstrap_iters=BOOTSTRAP_ITERATIONS,
                    log_samples=False,
                    task_manager=self._manager,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
                assert done is not None
                results.append(done["results"])
        return {task: _figures([result[task] for result in results], self._seeds) for task in results[0]}

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a hundred data sets and task files, in code that is not ours
            text = str(error).strip().splitlines()
            raise CommandError(
                f"--tasks {' '.join(self.names)}: got {type(error).__name__}: {text[0] if text else ''}; allowed: "
                "tasks whose data are in the cache or on a hub that can be reached; correct the task, or give task "
                "files with local data by --include_path"
            ) from error


@functools.cache
def manager(include_path: str | None, *, include_defaults: bool) -> Any:
    """lm-eval's index of tasks: its own, and those in a folder.

    Raises:
        CommandError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CommandError(
            "--tasks: got no package lm-eval; allowed: lm-eval 0.4.13; pip install 'ds_quant[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _figures(results: list[dict[str, Any]], seeds: list[int]) -> Figures:
    """Of one task: lm-eval's `acc,none` and `acc_stderr,none` of each seed."""
    found: Figures = {}
    for key in results[0]:
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        values = [float(result[key]) for result in results]
        errors = [result.get(f"{metric}_stderr,{filtered}") for result in results]
        found[metric if filtered == "none" else key] = {
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "values": dict(zip(map(str, seeds), values, strict=True)),
            "standard_errors": {
                str(seed): error if isinstance(error, float) else None
                for seed, error in zip(seeds, errors, strict=True)
            },
        }
    return found
