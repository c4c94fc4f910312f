"""Diagnostics inside training: a look every so many optimizer steps, on the batches that the run itself trains on.

A look covers the first micro-batch of a step, on all ranks. Before its forward the recorders' hooks are attached, after
its backward they are removed; after the step the second moments are measured, what the ranks saw is added up, and rank
0 passes the figures to DeepSpeed's monitor and writes them.
No value of the run is changed and no random bit is drawn, so training is bit for bit the same as without diagnostics.

A diagnostic that fails is reported and left out on all ranks: training goes on.
"""

import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ds_quant.base.errors import fail
from ds_quant.base.log import say, warn
from ds_quant.base.whole_folder import write_whole
from ds_quant.comm.agreement import check_agreement, raise_together
from ds_quant.config import DiagnosticsConfig
from ds_quant.diagnostics import folder
from ds_quant.diagnostics.choice import Choice, make_recorders
from ds_quant.diagnostics.guarded import Guarded, add_up
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.measurement import Measurement
from ds_quant.diagnostics.monitor import write_events
from ds_quant.diagnostics.norms import StepNorms
from ds_quant.diagnostics.reports import Reports, check_packages


class TrainingDiagnostics:
    """What the section's `diagnostics` do in a live engine. One for each engine and rank.

    Args:
        engine: the live engine. All ranks make theirs together.
        config: the JSON object.
        choice: what it comes to, from `choose`.
        second_moments: yields (name of a parameter, exp_avg_sq) of what this rank of an engine holds.

    Raises:
        ConfigError: on all ranks, where rank 0 cannot write the folder, a package for the report is missing, the
            optimizer has no second moment or the ranks differ in what they measure.
    """

    def __init__(
        self,
        engine: Any,
        config: DiagnosticsConfig,
        choice: Choice,
        second_moments: Callable[[Any], Iterable[tuple[str, torch.Tensor]]],
    ):
        self.config = config
        self.choice = choice = _without_second_moment(choice, config, engine)
        self.may_write: Callable[[], bool] = lambda: True
        """Asked on rank 0 before anything is written: another job may have taken the folder over."""
        self.seconds = 0.0
        """That this rank spent on looks so far."""
        self._engine = engine
        self._second_moments = second_moments
        self._is_first = torch.distributed.get_rank() == 0
        self._every = config.every
        self._hooks: ExitStack | None = None
        self._begun = self._resumed = False
        self._told: set[str] = set()
        self._recorders = self._make()
        self._norms = StepNorms() if self._is_first and "gradient_norms" in choice.kinds else None
        self._check()
        self._reports = Reports(Path(config.output_dir)) if config.report and self._is_first else None
        if self._reports is not None:
            weakref.finalize(engine, self._reports.finish)
        for line in self._lines():
            say(line)

    # ---- called by the engine

    def before_forward(self) -> None:
        """Attach the hooks where this is the first forward of a step that is measured."""
        engine = self._engine
        if not (engine.module.training and torch.is_grad_enabled()):
            return
        if not self._begun:
            self._begin()
        is_due = (engine.global_steps + 1) % self._every == 0
        if is_due and self._hooks is None and engine.ds_quant_micro_steps.now() == 0:
            self._hooks = ExitStack()
            self._hooks.enter_context(attach(engine.module, self._recorders.values()))

    def after_backward(self) -> None:
        """Remove the hooks after the micro-batch."""
        self._detach()

    def after_step(self, *, is_whole: bool) -> None:
        """End the look after the step."""
        self._detach()
        if not is_whole:
            return
        engine = self._engine
        if self._norms is not None:
            self._norms.add(engine.global_steps, engine.get_global_grad_norm())
        if engine.global_steps % self._every == 0:
            begin = time.perf_counter()
            self.seconds += sum(guarded.seconds for guarded in self._recorders.values())
            self._look()
            if self._reports is not None and self.may_write():
                self._reports.look_written()
            self.seconds += time.perf_counter() - begin

    def loaded(self, state: dict[str, Any] | None) -> None:
        """Resume from a checkpoint: restore what diagnostics keep between two looks."""
        self._detach()
        self._recorders = self._make()
        state = state or {}
        if self._norms is not None:
            self._norms = StepNorms(state.get("norms"))
        if "oscillation" in self._recorders and "oscillation" in state:
            recorder: Any = self._recorders["oscillation"].recorder
            recorder.load_state_dict(state["oscillation"])
        self._begun, self._resumed = False, True

    def state_dict(self) -> dict[str, Any]:
        """What `loaded` takes on all ranks. Called on rank 0."""
        state: dict[str, Any] = {}
        if self._norms is not None:
            state["norms"] = self._norms.state()
        if "oscillation" in self._recorders:
            recorder: Any = self._recorders["oscillation"].recorder
            state["oscillation"] = recorder.state_dict()
        return state

    def finish(self) -> None:
        """Bring the report up to date; also done when the engine goes."""
        if self._reports is not None and self.may_write():
            self._reports.finish()

    # ---- a look

    def _detach(self) -> None:
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None

    def _look(self) -> None:
        step = self._engine.global_steps
        if "moments" in self._recorders:
            self._recorders["moments"].run(self._observe_moments)
        healthy = self._join()
        if self._is_first:
            found = [self._measure(kind, step) for kind in healthy]
            if self._norms is not None:
                found.append(self._norms.take())
            self._write(step, [measurement for measurement in found if measurement is not None])
        for guarded in self._recorders.values():
            guarded.begin_anew()

    def _observe_moments(self) -> None:
        engine = self._engine
        if self._is_first or engine.zero_optimization_stage() > 0:  # at stage 0 all ranks hold the same
            recorder: Any = self._recorders["moments"].recorder
            for name, moment in self._second_moments(engine):
                recorder.observe(name, moment)

    def _join(self) -> list[str]:
        """Add up the records of the ranks; returns the kinds that failed on none of them."""
        device = torch.device(self._engine.device)
        failed = torch.tensor([guarded.error is not None for guarded in self._recorders.values()], dtype=torch.int32)
        failed = failed.to(device)
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
        if failed.any():
            self._tell_of_errors()
        healthy = [kind for kind, bad in zip(self._recorders, failed.tolist(), strict=True) if not bad]
        add_up([self._recorders[kind].recorder for kind in healthy], device)
        return healthy

    def _measure(self, kind: str, step: int) -> Measurement | None:
        guarded = self._recorders[kind]
        found: Measurement | None = guarded.run(guarded.recorder.result, step)
        if guarded.error is not None or found is None:
            self._tell_once(kind, f"{kind} is left out at step {step}: {guarded.error}")
            return None
        engine = self._engine
        found.settings.update(
            every=self._every,
            zero_stage=engine.zero_optimization_stage(),
            ranks=torch.distributed.get_world_size(),
            samples=engine.global_samples,
            seconds=round(guarded.seconds, 4),
        )
        return found

    def _write(self, step: int, found: list[Measurement]) -> None:
        if not self.may_write():
            return
        try:
            write_events(self._engine, found)
            folder.add_look(Path(self.config.output_dir), step, found)
        except OSError as error:
            self._tell_once("written", f"the look at step {step} could not be written: {error}")

    # ---- around it

    def _make(self) -> dict[str, Guarded]:
        return {recorder.kind: Guarded(recorder) for recorder in make_recorders(self.choice)}

    def _begin(self) -> None:
        """Prepare the folder at the first training step, when the starting step is known."""
        self._begun = True
        if not self._is_first or not self.may_write():
            return
        try:
            line = folder.begin(Path(self.config.output_dir), self._engine.global_steps, resumed=self._resumed)
            if line:
                say(f"diagnostics: {line}")
        except (OSError, ValueError) as error:
            self._tell_once("ready", f"the folder could not be made ready: {error}")

    def _tell_of_errors(self) -> None:
        said: list[Any] = [None] * torch.distributed.get_world_size()
        own = {kind: str(guarded.error) for kind, guarded in self._recorders.items() if guarded.error is not None}
        torch.distributed.all_gather_object(said, own)
        step = self._engine.global_steps
        for rank, errors in enumerate(said):
            for kind, text in errors.items():
                self._tell_once(kind, f"{kind} failed on rank {rank} and is left out at step {step}: {text}")

    def _tell_once(self, what: str, text: str) -> None:
        """What goes wrong at one look will go wrong at many."""
        if what not in self._told:
            self._told.add(what)
            warn(f"diagnostics: {text}; later looks say no more of it")

    def _check(self) -> None:
        where, engine = self.config.where, self._engine
        settings = self.config.model_dump(exclude={"output_dir", "report"})
        group, device = torch.distributed.group.WORLD, torch.device(engine.device)
        check_agreement(where, [settings, self.choice.kinds], group, device)
        with attach(engine.module, ()):
            pass  # a model without linear layers is refused now
        flat = [item.granularity for item in self.choice.moments if item.granularity != "block"]
        if "moments" in self._recorders and flat and engine.zero_optimization_stage() > 0:
            allowed = '"block" above ZeRO stage 0, where a rank holds flat parts of the moments'
            raise fail(f"{where}.exp_avg_sq.granularity", flat[0], allowed, "remove it, or look at a checkpoint")
        raise_together(self._check_output, torch.device(engine.device))

    def _check_output(self) -> None:
        if not self._is_first:
            return
        if self.config.report:
            check_packages(self.config.where)
        path = Path(self.config.output_dir)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_whole(path / ".writable", "")
            (path / ".writable").unlink()
        except OSError as error:
            where, allowed = f"{self.config.where}.output_dir", "a folder that rank 0 can write"
            raise fail(where, str(path), f"{allowed} ({error.strerror or error})", "name another") from error

    def _lines(self) -> list[str]:
        kinds = ", ".join(self.choice.kinds)
        first = f"diagnostics every {self._every} steps: {kinds}; into {self.config.output_dir}"
        return [first, *(f"diagnostics leave out {line}" for line in self.choice.left_out)]


def _without_second_moment(choice: Choice, config: DiagnosticsConfig, engine: Any) -> Choice:
    """Where the optimizer has no second moment: `moments` left out, or refused if it was asked for by name."""
    optimizer = type(engine.basic_optimizer).__name__
    has_it = "exp_avg_sq" in getattr(engine.basic_optimizer, "STATES", ()) or "adam" in optimizer.lower()
    if "moments" not in choice.kinds or has_it:
        return choice
    if config.kinds is not None:
        allowed = f"the other kinds: {optimizer} has no exp_avg_sq"
        raise fail(f"{config.where}.kinds", "moments", allowed, "take it out")
    kinds = tuple(kind for kind in choice.kinds if kind != "moments")
    return replace(choice, kinds=kinds, left_out=(*choice.left_out, f"moments: {optimizer} has no exp_avg_sq"))
