"""Where DeepSpeed reduces gradients, and what takes the place of its collectives there.

DeepSpeed divides by the number of ranks, predivides, casts and copies around its collectives in many ways. All that
stays: for as long as one of these methods of its runs, the module that it is written in finds quantized collectives
where it looks for full-precision ones. Stages 1 and 2 alone get another algorithm: a reduce-scatter to the owners of
the slices where DeepSpeed all-reduces all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import constants
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor

from ds_quant.comm.layout import Piece, Span
from ds_quant.engine.engine_class import MixedIn
from ds_quant.engine.gradients import GradientCommunication

CAN_SUM = hasattr(constants, "GRADIENT_ALLREDUCE_OP")
"""Whether gradients may be summed over ranks. Before 0.19.6 DeepSpeed averages them always."""


class _Collectives:
    """deepspeed.comm, with sums over ranks quantized."""

    def __init__(self, gradients: GradientCommunication, spans: Sequence[Span]) -> None:
        self._gradients, self._spans = gradients, spans

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, tensor: Tensor, group: Any = None) -> None:
        self._gradients.all_reduce(tensor, self._spans, group)

    def reduce(self, tensor: Tensor, dst: int, group: Any = None) -> None:
        self._gradients.reduce(tensor, self._spans, dst, group)


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """While it lasts, `name` of a module is `value`."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _quantized(module: ModuleType, gradients: GradientCommunication, spans: Sequence[Span]) -> Any:
    """While it lasts, `module` reduces tensors quantized, in which the parameters lie as `spans` say."""
    return replaced(module, "dist", _Collectives(gradients, spans))


class QuantizedReductionEngine(MixedIn):
    """Mixed into the class of a live engine whose wrapper leaves the reduction to it: stage 0 and BF16_Optimizer."""

    ds_quant_gradients: GradientCommunication

    def buffered_allreduce_fallback(self, grads: Any = None, elements_per_buffer: int = 500000000) -> None:
        gradients = self.ds_quant_gradients
        if hasattr(self.optimizer, "get_grads_for_reduction"):
            wrapper = self.optimizer
            places = [
                (gradient, parameter)
                for group, parameters in zip(wrapper.fp32_groups_gradients, wrapper.bf16_groups, strict=True)
                for gradient, parameter in zip(group, parameters, strict=True)
            ]
        else:
            # Those without a gradient get zeros, which must be there before they can be named.
            self._get_gradients_for_reduction()
            parameters = self.module.parameters()
            places = [(parameter.grad, parameter) for parameter in parameters if parameter.grad is not None]
        with gradients.naming(places):
            super().buffered_allreduce_fallback(grads, elements_per_buffer)

    def allreduce_bucket(self, bucket: Sequence[Tensor], dp_group: Any, dp_world_size: Any = None) -> Any:
        spans = self.ds_quant_gradients.joined_spans(bucket)
        with _quantized(engine_module, self.ds_quant_gradients, spans):
            return super().allreduce_bucket(bucket, dp_group, dp_world_size)


class QuantizedReductionStage1And2(MixedIn):
    """Mixed into the class of a live DeepSpeedZeroOptimizer."""

    ds_quant_gradients: GradientCommunication

    def reduce_ipg_grads(self, comm_dtype: Any = None) -> None:
        places: list[tuple[Tensor, Any]] = []
        if not self.contiguous_gradients:
            groups = self.bit16_groups
            for bucket in self.ipg_buckets.values():
                places += zip(bucket.grads, [groups[i][number] for i, number, _ in bucket.params], strict=True)
        with self.ds_quant_gradients.naming(places):
            super().reduce_ipg_grads(comm_dtype)

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        bucket = self.ipg_buckets[communication_data_type]
        places, start = [], 0
        for group, number, _ in bucket.params:
            parameter = self.bit16_groups[group][number]
            places.append((tensor.narrow(0, start, parameter.numel()), parameter))
            start += parameter.numel()
        with self.ds_quant_gradients.naming(places):
            super().average_tensor(tensor, communication_data_type)

    def gradient_reduction_w_predivide(self, tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        spans = self.ds_quant_gradients.spans(tensor) if tensor.numel() else []
        with _quantized(stage_1_and_2, self.ds_quant_gradients, spans):
            return super().gradient_reduction_w_predivide(tensor, communication_data_type)

    def allreduce_bucket(self, bucket: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        spans = self.ds_quant_gradients.joined_spans([tensor.view(-1) for tensor in bucket])
        with _quantized(stage_1_and_2, self.ds_quant_gradients, spans):
            return super().allreduce_bucket(bucket, *args, **kwargs)

    def allreduce_and_scatter(
        self,
        bucket: Sequence[Any],
        communication_data_type: torch.dtype,
        numel_per_bucket: int = 500000000,
        log: Any = None,
        divide: bool = True,
        process_group: Any = None,
    ) -> None:
        # Entries are (destinations, slice) or (destinations, slice, where to add the result as well).
        slices = [(entry[0], entry[1], entry[2] if len(entry) > 2 else None) for entry in bucket]
        owners = [min(to) if isinstance(to, frozenset) else to for to, _, _ in slices]
        several = [entry for entry in bucket if isinstance(entry[0], frozenset) and len(entry[0]) > 1]
        if several:  # Muon needs whole matrices on several ranks
            super().allreduce_and_scatter(
                several, communication_data_type, numel_per_bucket, log, divide, process_group
            )
            single = [entry for entry in bucket if not any(entry is other for other in several)]
            if single:
                self.allreduce_and_scatter(
                    single, communication_data_type, numel_per_bucket, log, divide, process_group
                )
            return
        gradients = self.ds_quant_gradients
        group = self.dp_process_group if process_group is None else process_group
        reducer = gradients.reducer(group)
        tensors = [gradient for _, gradient, _ in slices]
        pieces = [
            Piece(*span, owner)
            for number, (owner, gradient) in enumerate(zip(owners, tensors, strict=True))
            for span in gradients.spans(gradient, number)
        ]
        factor = 1.0
        if divide and (not CAN_SUM or self.gradient_average):
            factor = self.sequence_parallel_size / reducer.world_size
        numel = reducer.own_numel(pieces)
        buffer = gradients.buffers.take(4 * numel, tensors[0].device)
        means = buffer.view(torch.float32)
        gradients.reduce_scatter(tensors, pieces, means, group, factor)
        start, accelerator = 0, get_accelerator()
        for owner, (_, gradient, output) in zip(owners, slices, strict=True):
            if owner == reducer.rank:
                mean = means[start : start + gradient.numel()]
                if output is not None:
                    self._add_to_grad_partition_buffer(output, mean)
                gradient.copy_(mean)
                start += gradient.numel()
            # As DeepSpeed does around its own collectives, on every accelerator with streams.
            if self.overlap_comm and not accelerator.resolves_data_dependency():
                gradient.record_stream(self.reduction_stream)
        gradients.buffers.give_back(buffer)


class QuantizedReductionStage3(MixedIn):
    """Mixed into the class of a live DeepSpeedZeroOptimizer_Stage3. The methods' names are mangled by its class."""

    ds_quant_gradients: GradientCommunication

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        gradients = self.ds_quant_gradients
        names = [gradients.names[id(parameter)] for parameter in params_to_reduce]

        def reduce_scatter_coalesced(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
            return gradients.reduce_scatter_coalesced(tensors, names, group)

        with replaced(stage3, "reduce_scatter_coalesced", reduce_scatter_coalesced):
            return super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(params_to_reduce, communication_data_type)

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads(
        self, buffer_to_reduce: Tensor, communication_data_type: torch.dtype
    ) -> list[Tensor]:
        spans, start = [], 0
        for parameter in self.ipg_buckets[communication_data_type].params:
            numel = parameter.grad.numel()
            spans.append(Span(self.ds_quant_gradients.names[id(parameter)], 0, 0, start, numel))
            start += numel
        with _quantized(stage3, self.ds_quant_gradients, spans):
            return super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads(
                buffer_to_reduce, communication_data_type
            )
