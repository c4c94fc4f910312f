"""Gradients of a live engine cross the wire in few bits."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ds_quant.comm.agreement import check_agreement
from ds_quant.comm.buffers import Buffers
from ds_quant.comm.exchange import Call
from ds_quant.comm.feedback import ErrorFeedback
from ds_quant.comm.layout import Piece, Span, cut_each, whole
from ds_quant.comm.reducer import Reducer
from ds_quant.comm.statistics import Statistics, Traffic
from ds_quant.config import GradientCommunicationConfig
from ds_quant.engine.steps import seed_of_first_rank


class GradientCommunication:
    """What the seams of an engine hand their gradients to. One for each engine and rank.

    Gradients come as slices of DeepSpeed's buckets. `naming` says which parameter lies where in memory, so that
    residuals and random bits belong to parameters.
    """

    def __init__(self, engine: Any, config: GradientCommunicationConfig, *, may_skip_steps: bool) -> None:
        self.engine = engine
        self.config = config
        self.feedback = ErrorFeedback(transactional=may_skip_steps) if config.error_feedback else None
        # On an accelerator, reading errors has the host wait for it at the end of a step: only where somebody looks.
        with_errors = torch.device(engine.device).type == "cpu" or engine.monitor.enabled
        self.statistics = Statistics(with_errors=with_errors)
        self.buffers = Buffers()
        self.names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.last_step: Traffic | None = None
        """Traffic of the last whole step."""
        self.total = Traffic(0, 0, 0.0, 0.0)
        """Of all whole steps of this process."""
        self.num_steps = 0
        self._reducers: dict[Any, Reducer] = {}
        self._seed = seed_of_first_rank(engine, torch.initial_seed())
        self._places: list[tuple[int, int, str]] = []  # first address, end, name; in order

    # ---- which parameter lies where

    @contextmanager
    def naming(self, tensors: Iterable[tuple[Tensor, Any]]) -> Iterator[None]:
        """Context in which the memory of each tensor is known to hold the gradient of the parameter beside it."""
        before = self._places
        self._places = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), self.names[id(parameter)])
            for tensor, parameter in tensors
            if tensor.numel()
        )
        try:
            yield
        finally:
            self._places = before

    def spans(self, tensor: Tensor, source: int = 0, start: int = 0) -> list[Span]:
        """The parameters that lie in a 1-D contiguous tensor, in order; runs without a name where there are none."""
        size, position, found = tensor.element_size(), 0, []
        first, numel = tensor.data_ptr(), tensor.numel()
        index = max(0, bisect_right(self._places, (first, float("inf"), "")) - 1)
        while position < numel:
            while index < len(self._places) and self._places[index][1] <= first + position * size:
                index += 1
            at, last = first + position * size, first + numel * size
            begin, end, name = self._places[index] if index < len(self._places) else (last, last, "")
            if begin > at:
                name, offset, length = "", position, (min(begin, last) - at) // size
            else:
                offset, length = (at - begin) // size, (min(end, last) - at) // size
            found.append(Span(name, offset, source, start + position, length))
            position += length
        if self.feedback is not None and not any(span.name for span in found):
            raise RuntimeError(
                f"ds_quant.communication.gradient.error_feedback: got gradients of {numel} elements that belong to no "
                "known parameter; allowed: gradients of parameters of the model; fix: set it to false, and report this"
            )
        return found

    def joined_spans(self, tensors: Sequence[Tensor]) -> list[Span]:
        """The parameters in tensors that are about to be copied one behind the other."""
        found, start = [], 0
        for tensor in tensors:
            found += self.spans(tensor, 0, start)
            start += tensor.numel()
        return found

    # ---- the collectives

    def all_reduce(self, tensor: Tensor, spans: Sequence[Span], group: Any) -> None:
        """Sum in place over the ranks."""
        self.reducer(group).all_reduce([tensor.view(-1)], spans, self._call(group))

    def reduce(self, tensor: Tensor, spans: Sequence[Span], dst: int, group: Any) -> None:
        """Sum over the ranks into the tensor of `dst`, a rank of the job."""
        reducer = self.reducer(group)
        owner = torch.distributed.get_group_rank(reducer.channel.group, dst)
        flat = tensor.view(-1)
        result = torch.empty_like(flat) if owner == reducer.rank else flat[:0]
        reducer.reduce_scatter([flat], whole(spans, owner), result, self._call(group))
        if owner == reducer.rank:
            flat.copy_(result)

    def reduce_scatter(
        self, tensors: Sequence[Tensor], pieces: Sequence[Piece], output: Tensor, group: Any, factor: float = 1.0
    ) -> None:
        """Sum the pieces, times `factor`, into `output` of their owners."""
        self.reducer(group).reduce_scatter(tensors, pieces, output, self._call(group, factor))

    def reduce_scatter_coalesced(self, tensors: list[Tensor], names: Sequence[str], group: Any) -> list[Tensor]:
        """What DeepSpeed's function of this name does for stage 3: this rank's part of the mean of each tensor."""
        reducer = self.reducer(group)
        flat = [tensor.reshape(-1) for tensor in tensors]
        spans = [
            Span(name, 0, number, 0, tensor.numel())
            for number, (name, tensor) in enumerate(zip(names, flat, strict=True))
        ]
        pieces = cut_each(spans, reducer.world_size)
        output = flat[0].new_empty(reducer.own_numel(pieces))
        self.reduce_scatter(flat, pieces, output, group, 1.0 / reducer.world_size)
        lengths = [piece.numel for piece in pieces if piece.owner == reducer.rank]
        return list(output.split(lengths))

    def reducer(self, group: Any) -> Reducer:
        """Of the group, made by all its ranks at their first reduction."""
        if group not in self._reducers:
            self._reducers[group] = Reducer(
                self.config,
                group,
                feedback=self.feedback,
                statistics=self.statistics,
                buffers=self.buffers,
                seed=self._seed,
            )
        return self._reducers[group]

    def _call(self, group: Any, factor: float = 1.0) -> Call:
        engine = self.engine
        step, micro_step = engine.global_steps, engine.ds_quant_micro_steps.trained
        loss_scale = float(getattr(engine.optimizer, "loss_scale", None) or 1.0) if engine.fp16_enabled() else 1.0
        return Call(factor, self.reducer(group).key(step, micro_step), loss_scale)

    # ---- the end of a step

    def end_step(self, *, was_applied: bool) -> None:
        """A whole step is over, taken or skipped."""
        if self.feedback is not None:
            if was_applied:
                self.feedback.commit()
            else:
                self.feedback.rollback()
        self.last_step = self.statistics.take()
        self.total = self.total.plus(self.last_step)
        self.num_steps += 1

    def summary(self) -> dict[str, Any]:
        """Of the steps of this process, for its rank: figures for a report; None where nothing crossed a wire."""
        residual_bytes = self.feedback.num_bytes if self.feedback else 0
        return {**self.total.summary(self.num_steps), "residual_bytes": residual_bytes}

    def write_events(self) -> None:
        """Tell DeepSpeed's monitors of the last step."""
        monitor, traffic = self.engine.monitor, self.last_step
        if monitor.enabled and traffic is not None and traffic.sent_bytes:
            figures = {
                "wire_bytes": traffic.sent_bytes,
                "compression_ratio": traffic.compression,
                "quantization_error": traffic.relative_error,
            }
            samples = self.engine.global_samples
            monitor.write_events([(f"Train/ds_quant/{name}", value, samples) for name, value in figures.items()])

    def check_agreement(self, settings: Any) -> None:
        """Raise ConfigError on all ranks where one has another config or other parameters."""
        parameters = [
            [name, list(getattr(parameter, "ds_shape", parameter.shape)), str(parameter.dtype), parameter.requires_grad]
            for name, parameter in self.engine.module.named_parameters()
        ]
        description = [self.config.model_dump(), settings, parameters]
        device = torch.device(self.engine.device)
        check_agreement("ds_quant.communication", description, dist.get_world_group(), device)
