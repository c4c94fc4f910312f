"""Gradients and weights in few bits on the wire: collectives, and a communication hook for DistributedDataParallel.

Works with torch.distributed alone; under DeepSpeed the JSON's `communication` section does it all.
"""

from typing import TYPE_CHECKING, Any

from ds_quant.comm.collectives import Handle, all_reduce, reduce_scatter
from ds_quant.comm.ddp import DDPState, ddp_hook

if TYPE_CHECKING:
    from ds_quant.comm.accelerate_ddp import ddp_kwargs

__all__ = ["DDPState", "Handle", "all_reduce", "ddp_hook", "ddp_kwargs", "reduce_scatter"]


def __getattr__(name: str) -> Any:
    if name == "ddp_kwargs":  # imports accelerate
        from ds_quant.comm.accelerate_ddp import ddp_kwargs

        return ddp_kwargs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
