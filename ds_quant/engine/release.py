"""Gradients that are stepped as they come in the backward, so that they never exist all at once.

At stage 2 DeepSpeed reduces gradients in buckets during the backward, and adds them to one buffer of the partition,
which `engine.step` reads. Here that buffer has no memory of its own: a part of the masters (`optim.master`) gets a
gradient when the first of its elements arrive, and is stepped and the gradient freed with the last ones. By then the
backward of all its parameters is over: autograd hands over a gradient when all of its terms are there. `engine.step`
steps what no gradient came for, counts the step, and gathers the weights as ever.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

from deepspeed import comm as dist
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.comm.agreement import raise_together
from ds_quant.engine.engine_class import MixedIn, mix_in
from ds_quant.engine.parts import Loading, Part
from ds_quant.engine.released_steps import WHERE, Fragment, GradientNorms, ReleasedGradients
from ds_quant.engine.seams import check_live


class StepsInBackward(MixedIn):
    """Mixed into the class of a live DeepSpeedZeroOptimizer of stage 2, over `GradientsInPlace`."""

    ds_quant_released: ReleasedGradients

    def process_gradients(self, param: Any, i: int) -> None:
        if getattr(param, "ds_grad_is_ready", True):
            self.ds_quant_released.expect(param)
        super().process_gradients(param, i)

    def _get_compact_grad_partition_slice(self, group_idx: int, partition_id: int, param_id: int, numel: int) -> Any:
        rank = dist.get_rank(group=self.real_dp_process_group[group_idx])
        if partition_id != rank:
            return None
        begin = self.grad_partition_insertion_offset[group_idx][partition_id][param_id]
        return self.ds_quant_released.fragment(group_idx, int(begin))

    def _add_to_grad_partition_buffer(self, output: Fragment | None, source: Tensor) -> None:
        if output is not None:
            self.ds_quant_released.deliver(output, source)

    def _build_compact_grad_partition_buffer(self, group_idx: int) -> GradientNorms:
        return self.ds_quant_released.norms(group_idx)

    def _optimizer_step(self, group_no: int) -> None:
        self.ds_quant_released.finish_group(group_no)
        self.single_partition_of_fp32_groups[group_no].grad = None
        super()._optimizer_step(group_no)  # which finds nothing to step; schedulers count it

    def step(self, closure: Any = None) -> None:
        self.ds_quant_released.check_step()
        super().step(closure)
        self.ds_quant_released.finish()

    def _link_all_hp_params(self) -> None:
        super()._link_all_hp_params()
        for group in self.bit16_groups:
            for parameter in group:
                parameter.get_full_hp_grad = _no_gradients("safe_get_full_grad")
                parameter.set_full_hp_grad = _no_gradients("safe_set_full_grad")


def _no_gradients(name: str) -> Any:
    def refuse(*arguments: Any) -> NoReturn:
        raise fail(
            f"{name} with {WHERE}",
            "a gradient that has been stepped and freed",
            "runs that keep their gradients",
            "watch them by hooks (Tensor.register_hook), or remove release_gradients",
        )

    return refuse


class Release(Part):
    """Steps gradients in the backward of a live engine. Made after its masters and before its communication.

    Raises:
        ConfigError: several micro steps a step, or a mixture of experts.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        wrapper = engine.optimizer
        own = ("params_in_partition", "grad_partition_insertion_offset", "grad_start_offset", "get_param_id")
        buffers = ("_get_compact_grad_partition_slice", "_build_compact_grad_partition_buffer", "averaged_gradients")
        check_live([(wrapper, name) for name in (*own, *buffers, "compute_grad_norm", "param_names")])
        _check_engine(engine)
        wrapper.ds_quant_released = self._released = ReleasedGradients(wrapper, engine.basic_optimizer)
        mix_in(wrapper, StepsInBackward)
        wrapper._link_all_hp_params()

    def before_forward(self, *, trains: bool) -> None:
        self._check("a forward")

    def after_backward(self) -> None:
        self._released.begin()  # of a rank for whose partition no gradient came
        self._released.is_whole = True

    def before_reading(self) -> None:
        raise_together(lambda: self._check("saving or gathering weights"), self.engine.device)

    def before_load(self, loading: Loading) -> None:
        if self._released.has_begun and not (self._released.is_whole and loading.with_moments):
            self._released.refuse("engine.load_checkpoint()")

    def after_load(self, loading: Loading, path: str | None) -> None:
        if path is not None and self._released.has_begun:
            self._released.forget()
            wrapper = self.engine.optimizer
            wrapper.averaged_gradients.update(dict.fromkeys(wrapper.averaged_gradients))

    def before_offload(self, states: Sequence[OffloadStateTypeEnum]) -> None:
        self._check("engine.offload_states()")

    def _check(self, what: str) -> None:
        if self._released.has_begun:
            self._released.refuse(what)


def _check_engine(engine: Any) -> None:
    steps = engine.gradient_accumulation_steps()
    if steps != 1:
        raise fail(
            "gradient_accumulation_steps",
            steps,
            f"1 with {WHERE} (gradients of several micro steps are added up before the step)",
            "set it so, or remove release_gradients",
        )
    if engine.gradient_clipping() > 0:  # of a config that DeepSpeed read elsewhere
        got, allowed = engine.gradient_clipping(), f"0 with {WHERE}"
        raise fail("gradient_clipping", got, allowed, "set it so, or remove release_gradients")
    if engine.has_moe_layers:
        got = "a mixture of experts"
        raise fail(WHERE, got, "models without DeepSpeed's MoE layers (not tested with them)", "remove it")
