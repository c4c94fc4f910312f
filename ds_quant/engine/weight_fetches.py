"""Weights fetched as codes in a live engine at stage 3, before the forward and the backward of their layers.

DeepSpeed decides what is fetched, prefetched and released when; its coordinator asks for parameters by
`all_gather_coalesced`, a method of every parameter, and nobody else does. What it asks for comes as codes where layers
compute the same with them (see `comm.weight_codes`). Everybody else (GatheredParameters, saving, code that reads a
layer's weight by itself) asks by `all_gather`, and gets whole weights, also of a parameter that lies there in codes.
Partitions, which optimizers and checkpoints read, are whole always.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, get_allgather_dtype

from ds_quant.base.log import say, warn
from ds_quant.comm.agreement import check_agreement
from ds_quant.comm.buffers import Buffers
from ds_quant.comm.weight_fetch import Fetch, PartitionedWeight, WeightFetcher
from ds_quant.comm.weight_layout import Weight
from ds_quant.config import WeightCommunicationConfig
from ds_quant.engine.coded_weights import check_any_coded, coded_weights, tell_codes
from ds_quant.engine.multiplied_weights import MultipliedWeights
from ds_quant.engine.parameter_methods import METHODS, replace_methods
from ds_quant.engine.seams import check_live
from ds_quant.engine.weight_guards import CodedWeights, Guard
from ds_quant.engine.weight_part import WeightPart

_Parameter = Any
"""A torch.nn.Parameter with the attributes of DeepSpeed's stage 3."""


class WeightFetches(WeightPart):
    """Has a live engine at stage 3 fetch weights as codes. All ranks make it.

    Raises:
        ConfigError: no weight can be fetched as codes, or the ranks differ in config or model.
        ImportError: the live engine or its parameters lack what is used here.
    """

    def __init__(self, engine: Any, config: WeightCommunicationConfig) -> None:
        super().__init__(engine, config)
        _check_live(engine)
        self._persistent = engine.optimizer.persistent_parameters
        self._coded: dict[int, PartitionedWeight] = {}
        self._parameters: dict[int, _Parameter] = {}
        self._fetchers: dict[int, WeightFetcher] = {}
        self._multiplied = MultipliedWeights(engine.module)
        self._in_codes: set[int] = set()
        """Parameters whose values, while they are there, came as codes."""
        self._read_elsewhere: set[int] = set()
        self._is_stale = True
        self._counts = False
        self._came_in_step: list[_Parameter] = []
        """Parameters that came in codes in a step or a load that is not over yet."""
        self._make_fetchers(engine)
        guard = Guard(_Weights(self))
        for module in engine.module.modules():
            parameters = list(module.parameters(recurse=False))
            if any(parameter.ds_id in self._coded for parameter in parameters):
                module.register_state_dict_pre_hook(guard)
            for parameter in parameters:
                replace_methods(parameter, self)
        engine.ds_quant_weight_communication = self

    def _make_fetchers(self, engine: Any) -> None:
        codings = coded_weights(engine.module)
        weights: list[Weight] = []
        groups: dict[int, tuple[Any, list[int]]] = {}
        for name, parameter in engine.module.named_parameters():
            coding = codings.get(id(parameter))
            weights.append(Weight(name, 0, tuple(parameter.ds_shape), coding))
            if coding is None:
                continue
            group = parameter.ds_process_group
            world_size, rank = dist.get_world_size(group), dist.get_rank(group)
            dtype = get_allgather_dtype(parameter, parameter.ds_tensor)
            self._coded[parameter.ds_id] = PartitionedWeight(parameter.ds_shape, coding, dtype, world_size, rank)
            self._parameters[parameter.ds_id] = parameter
            groups.setdefault(id(group), (group, []))[1].append(parameter.ds_id)
        check_any_coded(self.config, weights)
        description = [self.config.model_dump(), weights]  # what all layouts are made of
        check_agreement("ds_quant.communication.weight", description, dist.get_world_group(), self._device)
        buffers = Buffers()
        for group, ids in groups.values():
            fetcher = WeightFetcher([self._coded[key] for key in ids], group, buffers, self.statistics)
            self._fetchers |= dict.fromkeys(ids, fetcher)
        tell_codes(self.config, weights, "elements")
        if dist.get_world_size() == 1:
            say("there is one rank: no weights cross a wire")

    @property
    def _device(self) -> torch.device:
        return torch.device(self.engine.device)

    # ---- what parameters ask for

    def fetch(self, parameters: Sequence[_Parameter], original: Any, *args: Any, **kwargs: Any) -> Any:
        """What a parameter's `all_gather_coalesced` does: start to gather `parameters`; returns what to wait for."""
        coded, whole = self._sorted_out(parameters)
        handles = []
        if whole:
            handles.append(original(whole, *args, **kwargs))
        if coded:
            handles.append(self._start(coded))
        return handles[0] if len(handles) == 1 else _Handles(handles)

    def gather(self, parameters: Sequence[_Parameter], original: Any, *args: Any, **kwargs: Any) -> Any:
        """What a parameter's `all_gather` does: gather `parameters` that are not there, whole."""
        if parameters is self._persistent:
            return self._gather_persistent(original, *args, **kwargs)
        for parameter in parameters:
            if parameter.ds_id in self._in_codes and parameter.ds_status is not ZeroParamStatus.INFLIGHT:
                self._in_codes.discard(parameter.ds_id)
                self.were_released([parameter])
                # Whoever computes with what is there keeps it, and its layers find the same codes in what comes.
                parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        return original(parameters, *args, **kwargs)

    def _gather_persistent(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """What all ranks keep from step to step is gathered after each."""
        self._is_stale = True
        absent = [p for p in self._persistent if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        coded, _ = self._sorted_out(absent)
        if coded:
            self._start(coded, is_kept=True).wait()
            self._came_in_step = coded
        return original(self._persistent, *args, **kwargs)

    def _sorted_out(self, parameters: Sequence[_Parameter]) -> tuple[list[_Parameter], list[_Parameter]]:
        """What is to come in codes, in an order that all ranks share, and what comes whole, which is counted."""
        coded = sorted((p for p in parameters if self._comes_in_codes(p)), key=lambda p: p.ds_id)
        kept = {parameter.ds_id for parameter in coded}
        whole = [parameter for parameter in parameters if parameter.ds_id not in kept]
        self._in_codes.difference_update(parameter.ds_id for parameter in whole)
        self._count_whole(whole)
        return coded, whole

    def is_read_elsewhere(self, parameter: _Parameter) -> None:
        """Something other than its layers reads a parameter in a forward: it comes whole, now and from now on."""
        if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE:
            self._count_whole([parameter])
        if parameter.ds_id in self._coded and parameter.ds_id not in self._read_elsewhere:
            self._read_elsewhere.add(parameter.ds_id)
            name = next(name for name, other in self.engine.module.named_parameters() if other is parameter)
            warn(f"{name} crosses the wire in its dtype from now on, since more than its layer reads it")

    def were_released(self, parameters: Sequence[_Parameter]) -> None:
        """They are not there any more, or not as they came."""
        for parameter in parameters:
            if parameter.ds_id in self._coded:
                self._multiplied.drop(parameter)

    def were_written(self) -> None:
        """Partitions have changed on all ranks."""
        self._is_stale = True

    def _comes_in_codes(self, parameter: _Parameter) -> bool:
        key = parameter.ds_id
        return key in self._coded and key not in self._read_elsewhere and self._fetchers[key].world_size > 1

    def _start(self, parameters: Sequence[_Parameter], *, is_kept: bool = False) -> "_Handles":
        if self._is_stale:
            self._agree()
        of_fetcher: dict[int, list[_Parameter]] = {}
        for parameter in parameters:
            if parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(f"ds_quant: cannot fetch {parameter.ds_summary()}")
            parameter.ds_status = ZeroParamStatus.INFLIGHT
            of_fetcher.setdefault(id(self._fetchers[parameter.ds_id]), []).append(parameter)
        handles = []
        for together in of_fetcher.values():
            fetcher = self._fetchers[together[0].ds_id]
            weights = [self._coded[parameter.ds_id] for parameter in together]
            partitions = [parameter.ds_tensor.detach().to(self._device) for parameter in together]
            fetch = fetcher.start(weights, partitions, counted=self._counts)
            self._in_codes.update(parameter.ds_id for parameter in together)
            trains = is_kept or self._counts
            wanted = [trains and self._multiplied.is_wanted(parameter) for parameter in together]
            handles.append(_Handle(fetch, together, wanted, self._multiplied))
        return _Handles(handles)

    def _agree(self) -> None:
        for fetcher in dict.fromkeys(self._fetchers.values()):
            if fetcher.world_size > 1:
                held = [key for key, other in self._fetchers.items() if other is fetcher]
                partitions = [self._parameters[key].ds_tensor.detach() for key in held]
                fetcher.agree(partitions, self._device, counted=self._counts)
        self._is_stale = False

    def _count_whole(self, parameters: Sequence[_Parameter]) -> None:
        if not self._counts:
            return
        for parameter in parameters:
            size = parameter.ds_tensor.ds_numel * (dist.get_world_size(parameter.ds_process_group) - 1)
            dtype = get_allgather_dtype(parameter, parameter.ds_tensor)
            self.statistics.count(size * dtype.itemsize, size, dtype.itemsize)

    # ---- whole weights

    def held_in_codes(self) -> list[_Parameter]:
        """What is there now and came as codes, in the same order on all ranks."""
        held = [self._parameters[key] for key in sorted(self._in_codes)]
        return [parameter for parameter in held if parameter.ds_status is ZeroParamStatus.AVAILABLE]

    def forget(self, parameter: _Parameter) -> None:
        """Another engine gathers it now."""
        self._in_codes.discard(parameter.ds_id)
        self.were_released([parameter])

    def before_reading(self) -> None:
        held = self.held_in_codes()
        if held:
            held[0].all_gather(held)

    # ---- moments

    def before_forward(self, *, trains: bool) -> None:
        # Partitions may have been written by the user's hands, too.
        self._is_stale, self._counts, self._came_in_step = True, trains, []

    def after_writing(self) -> None:
        self._is_stale = True
        for parameter in self._came_in_step:
            self._multiplied.renew(parameter)
        self._came_in_step = []

    def after_step(self, *, is_whole: bool) -> None:
        super().after_step(is_whole=is_whole)
        self._counts &= not is_whole


class _Handle:
    """Waits for a fetch, and gives parameters their values."""

    def __init__(
        self,
        fetch: Fetch,
        parameters: Sequence[_Parameter],
        wanted: Sequence[bool],
        multiplied: MultipliedWeights,
    ) -> None:
        self._fetch: Fetch | None = fetch
        self._parameters, self._wanted, self._multiplied = parameters, wanted, multiplied

    @torch.no_grad()
    def wait(self, **kwargs: Any) -> None:
        if self._fetch is None:  # it is asked for each of the parameters
            return
        found = self._fetch.finish(self._wanted)
        for parameter, (flat, codes) in zip(self._parameters, found, strict=True):
            values = flat[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.data = values.to(parameter.ds_tensor.dtype)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
            if codes is not None:
                self._multiplied.hand_over(parameter, *codes)
        self._fetch = None


class _Handles:
    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def wait(self, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.wait(**kwargs)


class _Weights(CodedWeights):
    """Whether what is there of the weights of an engine at stage 3 is whole."""

    def __init__(self, part: WeightFetches) -> None:
        super().__init__()
        self._part = weakref.ref(part)

    def is_whole(self) -> bool:
        part = self._part()
        return part is None or not part.held_in_codes()


def _check_live(engine: Any) -> None:
    """Raise ImportError for what is read off a live engine and its parameters, and has moved."""
    names = ["ds_id", "ds_shape", "ds_numel", "ds_status", "ds_tensor", "ds_process_group", "ds_summary"]
    names += METHODS
    parameter = next(iter(engine.module.parameters()))
    check_live([(engine.optimizer, "persistent_parameters"), *((parameter, name) for name in names)])
