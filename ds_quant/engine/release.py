"""Gradients that are stepped as they come in the backward, so that they never exist all at once.

At stage 2 DeepSpeed reduces gradients in buckets during the backward, and adds them to one buffer of the partition,
which `engine.step` reads. Here that buffer has no memory of its own: a part of the masters (`optim.master`) gets a
gradient when the first of its elements arrive, and is stepped and the gradient freed with the last ones. By then the
backward of all its parameters is over: autograd hands over a gradient when all of its terms are there. `engine.step`
steps what no gradient came for, counts the step, and gathers the weights as ever.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.comm.agreement import raise_together
from ds_quant.engine.engine_class import mix_in
from ds_quant.engine.parts import Loading, Part
from ds_quant.engine.seams import check_live
from ds_quant.optim.master import MasterTensor
from ds_quant.optim.step_in_parts import StepInParts

_WHERE = "ds_quant.optimizer.release_gradients"
_NORM_ELEMENTS = 1 << 20
"""Of a gradient that are in the dtype of norms, fp64, at a time."""


class Fragment(NamedTuple):
    """What of a parameter lies in this rank's partition."""

    group: int
    number: int
    """Of the parameters in the partition."""
    parameter: Any
    begin: int
    """Its first element in the partition."""
    end: int


class _Layout:
    """Where the fragments of a group's partition lie in parts of the masters."""

    def __init__(self, masters: MasterTensor, fragments: Sequence[Fragment]) -> None:
        self.fragments = {fragment.begin: fragment for fragment in fragments}
        self.numel = [0] * masters.num_parts
        """Of each part: elements that a gradient comes for; the rest is padding."""
        self.parameters: list[list[Any]] = [[] for _ in range(masters.num_parts)]
        self.size = masters.part(0).end
        for fragment in fragments:
            for number, first, last in self.parts(fragment):
                self.numel[number] += last - first
                self.parameters[number].append(fragment.parameter)

    def parts(self, fragment: Fragment) -> Iterator[tuple[int, int, int]]:
        """(number of a part, the fragment's first element in it, its last one plus 1), counted in the partition."""
        for number in range(fragment.begin // self.size, -(-fragment.end // self.size)):
            yield number, max(fragment.begin, number * self.size), min(fragment.end, (number + 1) * self.size)


class _Group:
    """A parameter group's partition, in a step that has begun."""

    def __init__(self, masters: MasterTensor, layout: _Layout) -> None:
        self.masters, self.layout = masters, layout
        self.waiting = list(layout.numel)
        """Of each part: elements whose gradient is still to come."""
        self.norms: dict[int, Tensor] = {}
        """Of the fragments whose gradient has come."""
        self.gradients: dict[int, Tensor] = {}
        """Of parts of which some elements have come."""
        self.stepped: set[int] = set()


class _Released(list[Tensor]):
    """Stands where ZeRO keeps a partition's gradients: their norms, and a partition of zeros that takes no memory."""

    def __init__(self, norms: Sequence[Tensor], like: Tensor) -> None:
        super().__init__(norms)
        self.flat_partition = torch.zeros(1, dtype=like.dtype, device=like.device).expand(like.numel())


class ReleasedGradients:
    """The steps of one engine and rank, from the first gradient of a backward to the end of `engine.step`."""

    def __init__(self, wrapper: Any, optimizer: Any) -> None:
        self._wrapper: Any = weakref.proxy(wrapper)
        self._optimizer = optimizer
        self._layouts = [
            _Layout(masters, list(self._fragments(number)))
            for number, masters in enumerate(wrapper.single_partition_of_fp32_groups)
        ]
        self._groups: list[_Group] = []
        self._step: StepInParts | None = None
        self.is_whole = False
        """Whether the backward of the step that has begun is over."""

    @property
    def has_begun(self) -> bool:
        """Whether weights may have been stepped since the last whole step."""
        return self._step is not None

    def begin(self) -> None:
        """Begin a step, unless one has begun."""
        if self._step is not None:
            return
        wrapper = self._wrapper
        if wrapper.loss_scale != 1.0:
            raise fail(
                _WHERE,
                f"a loss scale of {wrapper.loss_scale}",
                "1: gradients are stepped as they come",
                "remove override_loss_scale, or release_gradients",
            )
        self._step, self.is_whole = StepInParts(self._optimizer), False
        partitions = wrapper.single_partition_of_fp32_groups
        self._groups = [_Group(*pair) for pair in zip(partitions, self._layouts, strict=True)]

    def _fragments(self, group: int) -> Iterator[Fragment]:
        wrapper = self._wrapper
        rank = dist.get_rank(group=wrapper.real_dp_process_group[group])
        size = int(wrapper.partition_size[group])
        for number, parameter in enumerate(wrapper.params_in_partition[group]):
            key = wrapper.get_param_id(parameter)
            begin = int(wrapper.grad_partition_insertion_offset[group][rank][key])
            source = int(wrapper.grad_start_offset[group][rank][key])
            yield Fragment(group, number, parameter, begin, min(begin + parameter.numel() - source, size))

    def fragment(self, group: int, begin: int) -> Fragment:
        """The one that begins at element `begin` of a group's partition."""
        self.begin()
        return self._layouts[group].fragments[begin]

    def deliver(self, fragment: Fragment, source: Tensor) -> None:
        """Take the reduced gradient of a fragment, and step the parts that are whole by it."""
        group, source = self._groups[fragment.group], source.view(-1)
        if self.is_whole or fragment.number in group.norms:
            raise fail(
                f"{_WHERE}: {self._wrapper.param_names.get(fragment.parameter, 'a parameter')}",
                "a second gradient before engine.step()",
                "one backward a step, in which a layer that is used twice gets the sum of its gradients",
                "call engine.step() after each backward; with activation checkpointing use_reentrant=False; or remove "
                "release_gradients",
            )
        source = source.to(group.masters.dtype)
        group.norms[fragment.number] = _norm(source) if self._wrapper.compute_grad_norm else source.new_zeros(())
        for number, first, last in group.layout.parts(fragment):
            begin, _, weight, _ = group.masters.part(number)
            if number not in group.gradients:
                group.gradients[number] = torch.zeros_like(weight)
            # Added to zeros as DeepSpeed does: the sign of a zero may make a difference.
            group.gradients[number][first - begin : last - begin].add_(
                source[first - fragment.begin : last - fragment.begin]
            )
            group.waiting[number] -= last - first
            if not group.waiting[number]:
                self._step_part(group, number)

    def _step_part(self, group: _Group, number: int) -> None:
        assert self._step is not None
        grad = group.gradients.pop(number, None)
        if grad is None:
            grad = torch.zeros_like(group.masters.part(number).weight)
        group.stepped.add(number)  # before it is done: one that fails half-way cannot be done again
        self._step.step(group.masters, number, grad)
        # A backward that still needs one of these weights is told so by autograd.
        torch.autograd.graph.increment_version(group.layout.parameters[number])

    def norms(self, group: int) -> _Released:
        """What ZeRO takes for the gradients of a group."""
        self.begin()
        found = self._groups[group]
        zero = torch.zeros((), device=found.masters.device)
        return _Released([found.norms.get(one.number, zero) for one in found.layout.fragments.values()], found.masters)

    def finish_group(self, group: int) -> None:
        """Step the parts that are left: those of parameters that got no gradient, and of padding."""
        found = self._groups[group]
        for number in range(found.masters.num_parts):
            if number not in found.stepped:
                self._step_part(found, number)

    def check_step(self) -> None:
        """Raise ConfigError where `engine.step` cannot finish the step."""
        if self._step is None:
            raise fail(
                f"{_WHERE}: engine.step()", "no backward before it", "one backward a step", "call engine.backward first"
            )
        if not self.is_whole:
            self.refuse("engine.step()")
        self._step.check_options()

    def finish(self) -> None:
        """Count the step, which has been taken whole."""
        assert self._step is not None
        self._step.finish()
        self.forget()

    def forget(self) -> None:
        """Begin anew: all that a step writes has been written whole, or loaded."""
        self._step, self._groups, self.is_whole = None, [], False

    def pending(self) -> list[Tensor]:
        """Gradients of parts that are not whole yet."""
        return [grad for group in self._groups for grad in group.gradients.values()]

    def refuse(self, what: str) -> NoReturn:
        """Raise ConfigError: `what` comes when some weights and states have been stepped and others have not."""
        parts = sum(group.masters.num_parts for group in self._groups)
        stepped = f"{sum(len(group.stepped) for group in self._groups)} of {parts} parts stepped"
        if self.is_whole:
            raise fail(
                f"{_WHERE}: {what}",
                f"a backward without engine.step() ({stepped})",
                "engine.step() right after each backward, since the backward steps weights",
                "call it, or load a checkpoint",
            )
        raise fail(
            f"{_WHERE}: {what}",
            f"a backward that did not end ({stepped})",
            "nothing but an end of the process: weights and optimizer states are of two steps",
            "fix what the backward raised, and resume from the last checkpoint in a new process",
        )


class StepsInBackward:
    """Mixed into the class of a live DeepSpeedZeroOptimizer of stage 2, over `GradientsInPlace`."""

    ds_quant_released: ReleasedGradients

    def _get_compact_grad_partition_slice(self, group_idx: int, partition_id: int, param_id: int, numel: int) -> Any:
        rank = dist.get_rank(group=self.real_dp_process_group[group_idx])  # type: ignore[attr-defined]
        if partition_id != rank:
            return None
        begin = self.grad_partition_insertion_offset[group_idx][partition_id][param_id]  # type: ignore[attr-defined]
        return self.ds_quant_released.fragment(group_idx, int(begin))

    def _add_to_grad_partition_buffer(self, output: Fragment | None, source: Tensor) -> None:
        if output is not None:
            self.ds_quant_released.deliver(output, source)

    def _build_compact_grad_partition_buffer(self, group_idx: int) -> _Released:
        return self.ds_quant_released.norms(group_idx)

    def _optimizer_step(self, group_no: int) -> None:
        self.ds_quant_released.finish_group(group_no)
        self.single_partition_of_fp32_groups[group_no].grad = None  # type: ignore[attr-defined]
        super()._optimizer_step(group_no)  # type: ignore[misc]  # which finds nothing to step; schedulers count it

    def step(self, closure: Any = None) -> None:
        self.ds_quant_released.check_step()
        super().step(closure)  # type: ignore[misc]
        self.ds_quant_released.finish()

    def _link_all_hp_params(self) -> None:
        super()._link_all_hp_params()  # type: ignore[misc]
        for group in self.bit16_groups:  # type: ignore[attr-defined]
            for parameter in group:
                parameter.get_full_hp_grad = _no_gradients("safe_get_full_grad")
                parameter.set_full_hp_grad = _no_gradients("safe_set_full_grad")


def _no_gradients(name: str) -> Any:
    def refuse(*arguments: Any) -> NoReturn:
        raise fail(
            f"{name} with {_WHERE}",
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
        check_live([(wrapper, name) for name in (*own, "averaged_gradients", "compute_grad_norm", "param_names")])
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
            f"1 with {_WHERE} (gradients of several micro steps are added up before the step)",
            "set it so, or remove release_gradients",
        )
    if engine.gradient_clipping() > 0:  # of a config that DeepSpeed read elsewhere
        got, allowed = engine.gradient_clipping(), f"0 with {_WHERE}"
        raise fail("gradient_clipping", got, allowed, "set it so, or remove release_gradients")
    if engine.has_moe_layers:
        got = "a mixture of experts"
        raise fail(_WHERE, got, "models without DeepSpeed's MoE layers (not tested with them)", "remove it")


def _norm(values: Tensor) -> Tensor:
    """The L2 norm of a gradient, without a copy of all of it in the dtype of norms."""
    pieces = values.view(-1).split(_NORM_ELEMENTS)
    norms = [torch.linalg.vector_norm(piece.to(get_norm_dtype())) for piece in pieces]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
