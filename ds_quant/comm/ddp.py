"""Quantized gradients in DistributedDataParallel: a communication hook.

    state = DDPState(model, bits=8)
    ddp_model.register_comm_hook(state, ddp_hook)

Buckets are reduced in a pipeline of three steps, one bucket behind the other: a bucket's messages travel while the next
one's gradients are computed. All ranks take the steps in the same order, on the thread that runs the backward, so the
hook works on gloo as on NCCL.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as torch_dist

from ds_quant.base.errors import ConfigError
from ds_quant.comm import backend
from ds_quant.comm.agreement import check_agreement
from ds_quant.comm.exchange import Call, Exchange
from ds_quant.comm.feedback import ErrorFeedback
from ds_quant.comm.layout import Span
from ds_quant.comm.reducer import Reducer
from ds_quant.comm.statistics import Traffic
from ds_quant.config import GradientCommunicationConfig
from ds_quant.numerics.integer import DTYPES


class DDPState:
    """What `ddp_hook` keeps between calls, one for each DDP model and rank.

    Args:
        model: the model that DDP wraps, or DDP itself: names its parameters.
        group: the process group that DDP was given; None: all ranks.
        loss_scale: what the loss is multiplied by before the backward, or a function that says it
            (`scaler.get_scale`): residuals are kept without it.
        settings: those of the JSON's `communication.gradient`: bits (required), block_size, rounding, error_feedback,
            rotation, hierarchical.

    With error feedback, residuals count at once: a step that a gradient scaler skips loses what it owed, and only
    blocks with non-finite values are dropped.

    Raises:
        ConfigError: settings out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        group: backend.Group | None = None,
        loss_scale: float | Callable[[], float] = 1.0,
        **settings: Any,
    ) -> None:
        self._group = backend.resolve(group)
        self._loss_scale = loss_scale
        config = GradientCommunicationConfig.parse(settings)
        feedback = ErrorFeedback(transactional=False) if config.error_feedback else None
        self._reducer = Reducer(config, self._group, feedback=feedback, seed=torch.initial_seed())
        module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._parameters = list(module.parameters())  # an id is a name only while its object lives
        self._step = 0
        self._agreed: set[tuple[Span, ...]] = set()
        self._sent: list[tuple[Exchange, Tensor, torch.futures.Future[Tensor]]] = []
        self._reduced: list[tuple[Exchange, Tensor, torch.futures.Future[Tensor]]] = []

    def traffic(self) -> Traffic:
        """Bytes sent and quantization error of this rank since the last call."""
        return self._reducer.statistics.take()

    def state_dict(self) -> dict[str, Any]:
        """Step and residuals of this rank: tensors and numbers, for torch.save or a safetensors file."""
        feedback = self._reducer.feedback
        residuals = feedback.state_dict() if feedback else {}
        return {"step": self._step, "world_size": self._reducer.world_size, "residuals": residuals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` of the same rank. Raises ConfigError where the number of ranks is another."""
        if state["world_size"] != self._reducer.world_size:
            raise ConfigError(
                f"DDPState.load_state_dict: got the state of one of {state['world_size']} ranks; allowed: one of "
                f"{self._reducer.world_size}; fix: begin with a new DDPState, which owes nothing"
            )
        if self._reducer.feedback is not None:
            self._reducer.feedback.load_state_dict(state["residuals"], self._parameters[0].device)
        self._step = int(state["step"])

    def reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Take a bucket (torch.distributed.GradBucket) one step on, and those before it."""
        buffer = bucket.buffer()
        if bucket.index() == 0:
            self._sent, self._reduced = [], []  # left by a backward that failed
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[] if buffer.device.type == "cpu" else [buffer.device]
        )
        if buffer.dtype not in DTYPES:
            raise ValueError(
                f"ds_quant.comm.ddp_hook(bucket): got gradients in {buffer.dtype}; allowed: float32, bfloat16, "
                "float16; convert the model"
            )
        spans = self._spans(bucket)
        if spans not in self._agreed:
            description = [self._reducer.config.model_dump(), str(buffer.dtype), [[s.name, s.numel] for s in spans]]
            check_agreement("ds_quant.comm.ddp_hook", description, self._group, buffer.device)
            self._agreed.add(spans)
        loss_scale = self._loss_scale() if callable(self._loss_scale) else self._loss_scale
        key = self._reducer.key(self._step, 0, bucket.index())
        call = Call(1.0 / self._reducer.world_size, key, float(loss_scale))
        exchange = self._reducer.start_all_reduce([buffer], spans, call)
        self._advance()
        self._sent.append((exchange, buffer, future))
        if bucket.is_last():
            while self._sent or self._reduced:
                self._advance()
            if self._reducer.feedback is not None:
                self._reducer.feedback.commit()
            self._step += 1
        return future

    def _advance(self) -> None:
        """Take every bucket under way one step on, the oldest first."""
        for exchange, buffer, future in self._reduced:
            exchange.finish()
            future.set_result(buffer)
        self._reduced = self._sent
        for exchange, _, _ in self._reduced:
            exchange.reduce()
        self._sent = []

    def _spans(self, bucket: Any) -> tuple[Span, ...]:
        spans, start = [], 0
        for parameter in bucket.parameters():
            name = self._names.get(id(parameter))
            if name is None:
                raise ConfigError(
                    "DDPState(model): got a model without a parameter that DDP reduces; allowed: the model that DDP "
                    "wraps; fix: DDPState(ddp_model, ...)"
                )
            spans.append(Span(name, 0, 0, start, parameter.numel()))
            start += parameter.numel()
        return tuple(spans)


# DDP looks at the annotations: it takes these, or none. torch's stubs do not know GradBucket.
def ddp_hook(
    state: DDPState,
    bucket: torch_dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The hook for `DistributedDataParallel.register_comm_hook(state, ddp_hook)`: averages gradients over the ranks.

    Ranks compare settings and layout at the first call of each bucket.

    Raises:
        ConfigError: ranks whose buckets or settings differ; a model that is not DDP's.
        ValueError: gradients that are not fp32, bf16 or fp16.
    """
    return state.reduce(bucket)
