"""A step that is taken part after part while gradients come, from the first of a backward to the end of `engine.step`.

`release` says how DeepSpeed's optimizer calls it.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.optim.master import MasterTensor
from ds_quant.optim.step_in_parts import StepInParts

WHERE = "ds_quant.optimizer.release_gradients"
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


class GradientNorms(list[Tensor]):
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
        self._seen: set[int] = set()
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
                WHERE,
                f"a loss scale of {wrapper.loss_scale}",
                "1: gradients are stepped as they come",
                "remove override_loss_scale, or release_gradients",
            )
        self._step, self.is_whole, self._seen = StepInParts(self._optimizer), False, set()
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

    def expect(self, parameter: Any) -> None:
        """A gradient of `parameter` is about to be reduced, on all ranks. Raises ConfigError for a second one."""
        self.begin()
        if self.is_whole or id(parameter) in self._seen:
            self.is_whole = False
            raise fail(
                f"{WHERE}: {self._wrapper.param_names.get(parameter, 'a parameter')}",
                "a second gradient before engine.step()",
                "one backward a step, in which a layer that is used twice gets the sum of its gradients",
                "call engine.step() after each backward; with activation checkpointing use_reentrant=False; or remove "
                "release_gradients",
            )
        self._seen.add(id(parameter))

    def fragment(self, group: int, begin: int) -> Fragment:
        """The one that begins at element `begin` of a group's partition."""
        self.begin()
        return self._layouts[group].fragments[begin]

    def deliver(self, fragment: Fragment, source: Tensor) -> None:
        """Take the reduced gradient of a fragment, and step the parts that are whole by it."""
        group = self._groups[fragment.group]
        source = source.view(-1).to(group.masters.dtype)
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

    def norms(self, group: int) -> GradientNorms:
        """What ZeRO takes for the gradients of a group."""
        self.begin()
        found = self._groups[group]
        zero = torch.zeros((), device=found.masters.device)
        return GradientNorms(
            [found.norms.get(one.number, zero) for one in found.layout.fragments.values()], like=found.masters
        )

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
                f"{WHERE}: engine.step()", "no backward before it", "one backward a step", "call engine.backward first"
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
                f"{WHERE}: {what}",
                f"a backward without engine.step() ({stepped})",
                "engine.step() right after each backward, since the backward steps weights",
                "call it, or load a checkpoint",
            )
        raise fail(
            f"{WHERE}: {what}",
            f"a backward that did not end ({stepped})",
            "nothing but an end of the process: weights and optimizer states are of two steps",
            "fix what the backward raised, and resume from the last checkpoint in a new process",
        )


def _norm(values: Tensor) -> Tensor:
    """The L2 norm of a gradient, without a copy of all of it in the dtype of norms."""
    pieces = values.view(-1).split(_NORM_ELEMENTS)
    norms = [torch.linalg.vector_norm(piece.to(get_norm_dtype())) for piece in pieces]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
