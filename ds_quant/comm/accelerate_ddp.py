"""The way into accelerate's DDP: the only file that imports accelerate."""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import DistributedDataParallelKwargs

from ds_quant.comm.ddp import DDPState, ddp_hook
from ds_quant.config import GradientCommunicationConfig


def ddp_kwargs(gradient: Mapping[str, Any], **options: Any) -> DistributedDataParallelKwargs:
    """A handler that has accelerate's DDP reduce gradients quantized:
    `Accelerator(kwargs_handlers=[ddp_kwargs({"bits": 8})])`.

    Args:
        gradient: the JSON object `communication.gradient`.
        options: fields of DistributedDataParallelKwargs, without those of communication hooks.

    accelerate does not tell it the loss scale of fp16: with error feedback use bf16 or fp32.

    Raises:
        ConfigError: `gradient` is out of range.
    """
    GradientCommunicationConfig.parse(dict(gradient))
    # In a field that accelerate leaves out of what it hands to DDP.
    return _QuantizedDDPKwargs(comm_state_option=dict(gradient), **options)


class _QuantizedDDPKwargs(DistributedDataParallelKwargs):
    # accelerate looks its handlers up by exact class, and knows none but its own hooks.
    __class__ = property(lambda self: DistributedDataParallelKwargs)

    def register_comm_hook(self, model: Any) -> None:
        model.register_comm_hook(DDPState(model, **self.comm_state_option), ddp_hook)
