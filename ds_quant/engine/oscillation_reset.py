"""Weights that swing between two codes are set to their code's value: OsciReset (TetraJet-v2, arXiv 2510.27527).

In the last `watched_steps` of each `every` steps, with w the master of a weight and Q(w) what layers compute with,

    distance           += |w_t - w_(t-1)|
    quantized_distance += |Q(w)_t - Q(w)_(t-1)|

A weight that learns moves by about as much as its quantized value. One that swings around the threshold between two
codes hardly moves, and its quantized value jumps. Where quantized_distance >= ratio * distance, and the weight moved at
all, its master becomes Q(w) at the end of the watch. Q(w) of the others stays as it is wherever the largest element of
a scale is a value of its own, as with symmetric integers.

A rank watches the elements whose masters it has, 16 bytes each, between the first and the last step of a watch. Which
elements swing is exchanged as one byte each. Moments stay as they are. There the method is started late in a training
and with a ratio of 8; Q(w) is that of fp32 weights, here that of the weights that layers see.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.base.log import say, warn
from ds_quant.config.operands import OscillationResetConfig
from ds_quant.engine.parts import Loading, Part
from ds_quant.engine.rank_files import Kind, read_tensors, save_tensors
from ds_quant.engine.seams import check_live
from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear.modules import QuantizedModule

WATCHED = Kind("oscillation", "distances that oscillation_reset has watched", "a watch that was under way is left out")


class Watch(NamedTuple):
    """Of one weight, flat, the elements whose masters are here: fp32 each."""

    last: Tensor
    last_quantized: Tensor
    distance: Tensor
    quantized_distance: Tensor


class OscillationReset(Part):
    """Watches and resets the weights of an engine's quantized layers. All ranks make it.

    Raises:
        ConfigError: masters that are not to be found, or experts that ranks do not share.
    """

    def __init__(self, engine: Any, config: OscillationResetConfig) -> None:
        super().__init__(engine)
        self._config = config
        self._modules: dict[str, QuantizedModule] = {}
        self._watches: dict[str, Watch] = {}
        self._loaded: dict[str, Any] = {}
        self.last_share: float | None = None
        """Of the weights that the last reset has set."""
        check_live([(engine, "seq_data_parallel_group")])
        self._group = getattr(engine.optimizer, "dp_process_group", None) or engine.seq_data_parallel_group
        seen = set()
        for name, module in engine.module.named_modules():
            takes_part = isinstance(module, QuantizedModule) and module._quant_plan.weight is not None
            if takes_part and module.weight.requires_grad and id(module.weight) not in seen:
                seen.add(id(module.weight))
                _check(name, module.weight, engine)
                self._modules[name] = module

    def watched(self) -> list[Tensor]:
        """All that a watch holds; nothing between two of them."""
        return [tensor for watch in self._watches.values() for tensor in watch]

    def after_step(self, *, is_whole: bool) -> None:
        if not is_whole:
            return
        position, config = self._position(), self._config
        if position is None:
            self._watches.clear()
        elif position == config.every - config.watched_steps:
            self._watches = {name: self._begin(module) for name, module in self._modules.items()}
        elif self._watches:
            for name, module in self._modules.items():
                self._watches[name] = _moved(self._watches[name], *self._now(module))
            if position == 0:
                self._reset()

    def before_save(self, folder: Path) -> None:
        # An empty file between two watches: one that is missing has been lost.
        found = {f"{name}.{part}": getattr(watch, part) for name, watch in self._watches.items() for part in _KEPT}
        save_tensors(self.engine, folder, WATCHED, found)

    def before_load(self, loading: Loading) -> None:
        self._loaded = {}
        if loading.with_moments:
            # A file that is broken is found before anything is changed.
            self._loaded = read_tensors(self.engine, loading.load_dir, loading.tag, WATCHED)

    def after_load(self, loading: Loading, path: str | None) -> None:
        loaded, self._loaded = self._loaded, {}
        if path is None:
            return
        self._watches = {}
        if not loaded:
            return
        begun = {name: self._begin(module) for name, module in self._modules.items()}
        sizes = {f"{name}.{part}": watch.last.shape for name, watch in begun.items() for part in _KEPT}
        if {key: tensor.shape for key, tensor in loaded.items()} != sizes:
            warn(f"{path} is of other weights, or of other parts of them on this rank: {WATCHED.without}")
            return
        for name, watch in begun.items():
            kept = {part: loaded[f"{name}.{part}"].to(watch.last.device) for part in _KEPT}
            self._watches[name] = watch._replace(**kept)

    def _position(self) -> int | None:
        """Steps since the last reset, 0 for the step of one; None where none is due."""
        step, config = self.engine.global_steps, self._config
        due = -(-step // config.every) * config.every
        quantizes = self.engine.ds_quant_step_key.quantizes_forward
        return step % config.every if quantizes and due >= config.first_step else None

    def _begin(self, module: QuantizedModule) -> Watch:
        master, quantized = self._now(module)
        return Watch(master.clone(), quantized.clone(), torch.zeros_like(master), torch.zeros_like(master))

    def _now(self, module: QuantizedModule) -> tuple[Tensor, Tensor]:
        """Masters that are here and their quantized values, fp32, flat."""
        start, master = _master(module.weight)
        return master.to(module.weight.device), _quantized(module)[start : start + master.numel()]

    @torch.no_grad()
    def _reset(self) -> None:
        count = total = 0
        for name, module in self._modules.items():
            weight, watch = module.weight, self._watches[name]
            swings = watch.quantized_distance >= self._config.ratio * watch.distance
            swings &= watch.distance > 0
            start, master = _master(weight)
            everywhere = torch.zeros(weight.numel(), dtype=torch.uint8, device=weight.device)
            everywhere[start : start + master.numel()] = swings
            dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=self._group)
            values = _quantized(module)
            here = values[start : start + master.numel()]
            if hasattr(weight, "_hp_mapping"):
                master.copy_(torch.where(swings, here, watch.last))
            flat = weight.detach().reshape(-1)
            weight.data.copy_(torch.where(everywhere.bool(), values.to(flat.dtype), flat).reshape(weight.shape))
            count, total = count + int(everywhere.sum(dtype=torch.int64)), total + weight.numel()
        self._watches.clear()
        self.last_share = count / total if total else 0.0
        self.engine._ds_quant_weights_written()
        say(f"step {self.engine.global_steps}: {self.last_share:.2%} of the quantized weights swung and were reset")


_KEPT = ("distance", "quantized_distance")
"""In checkpoints. The others are those of the weights at the step."""


def _check(name: str, weight: nn.Parameter, engine: Any) -> None:
    """Raises ConfigError for weights that cannot be reset."""
    where = "ds_quant.linear.weight.oscillation_reset"
    if not getattr(weight, "allreduce", True):
        allowed = "layers that all ranks share, which experts of expert parallelism are not"
        raise fail(where, name, allowed, "leave them out by ds_quant.linear.exclude")
    if not hasattr(weight, "_hp_mapping") and weight.dtype != torch.float32:
        got = f"{weight.dtype} at stage {engine.zero_optimization_stage()}"
        raise fail(where, got, "masters at ZeRO stage 1 or 2, or weights in fp32", "use stage 1")


def _moved(watch: Watch, master: Tensor, quantized: Tensor) -> Watch:
    watch.distance.add_((master - watch.last).abs())
    watch.quantized_distance.add_((quantized - watch.last_quantized).abs())
    return watch._replace(last=master.clone(), last_quantized=quantized.clone())


def _master(weight: Tensor) -> tuple[int, Tensor]:
    """(where it starts in the flat weight, the fp32 master of as many elements): what of it is on this rank."""
    if not hasattr(weight, "_hp_mapping"):
        return 0, weight.detach().reshape(-1)
    mapping = weight._hp_mapping
    if mapping is None:
        return 0, torch.empty(0)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach()


def _quantized(module: QuantizedModule) -> Tensor:
    """What the layer computes with, fp32, flat in the layout of the weight."""
    quantizer = module._quant_plan.weight
    assert quantizer is not None
    weight = module.weight.detach()
    w = weight.t() if module.transposed else weight
    values = kernels.dequantize(kernels.quantize(w, None, quantizer.format, "nearest", None, 0), torch.float32)
    return (values.t() if module.transposed else values).reshape(-1)
