"""QuantMuon: Muon under ZeRO with its momentum in 8 or 4 bits, and AdamW for what Muon does not take.

DeepSpeed computes Muon's update itself, where it has whole matrices: it writes the new momentum, and puts the update
in the gradient's place. What is left to the optimizer is

    param = param * (1 - lr * weight_decay) - lr * update

Between steps the momentum is codes and scales. `begin_momentum` makes it, `momentum` gives it to DeepSpeed in the dtype
of its gradients, and `put_momentum` takes the new one; `ds_quant.engine.muon` calls them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.numerics.blockwise import QuantizedBlocks
from ds_quant.numerics.random import derive_words
from ds_quant.numerics.stored_states import load, overwrite, part, store
from ds_quant.optim.adamw import AdamWOptions, adamw_steps
from ds_quant.optim.base import QuantizedOptimizer, Step
from ds_quant.optim.group_options import GroupOptions, check_hyperparameters, check_numbers
from ds_quant.optim.items import Item
from ds_quant.optim.muon_groups import muon_groups
from ds_quant.optim.state import QuantizedState

NS_METHODS = ("gram", "standard")
_ADAMW_STATES = {"exp_avg": True, "exp_avg_sq": False}
MOMENTUM = "momentum_buffer"
_MOMENTUM_STREAM = 1 << 60
"""Of the keys that round momentums: apart from those of AdamW's moments, which count up."""

PIECE_ELEMENTS = 1 << 22
"""Elements of a momentum that are decoded or coded at a time."""


class QuantMuon(QuantizedOptimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) with `momentum_buffer` in few bits, AdamW with its moments so.

    Args:
        params: parameters or parameter groups with `use_muon` set on each parameter (see `muon_groups`). A group may
            have its own states; None keeps AdamW's in 32 bits, and the momentum as DeepSpeed has it.
        lr: of both; may be a tensor of one element. Defaults are DeepSpeed's: 0.02 for Muon, 3e-4 for AdamW.
        muon_lr: of Muon, before `lr`.
        adam_lr: of AdamW, before `lr`.
        momentum: share of the old momentum in the new one.
        ns_method: how DeepSpeed orthogonalizes: "gram" or "standard".
        betas: as in torch.optim.AdamW.
        eps: as in torch.optim.AdamW.
        weight_decay: decoupled, of both.
        momentum_buffer: the object of the JSON's `ds_quant.optimizer.momentum_buffer` (or a `MomentConfig`), or None:
            in the dtype of the gradients, by DeepSpeed alone.
        exp_avg: the same of AdamW's first moment; None for 32 bits.
        exp_avg_sq: the same of its second moment.
        seed: of stochastic rounding.

    Attributes:
        momentum_numel: elements of the momentum of a parameter that ZeRO has made, where they are not the parameter's.

    Raises:
        ConfigError: arguments out of range, parameters of another dtype or without plain storage (DTensor).
    """

    STATES: ClassVar[dict[str, bool]] = {MOMENTUM: True, **_ADAMW_STATES}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | None = None,
        muon_lr: float | Tensor | None = None,
        adam_lr: float | Tensor | None = None,
        momentum: float = 0.95,
        ns_method: str = "gram",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        momentum_buffer: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        seed: int = 0,
    ):
        self.momentum_numel: dict[Tensor, int] = {}
        muon = {
            "lr": _first(muon_lr, lr, 0.02),
            "momentum": momentum,
            "weight_decay": weight_decay,
            "ns_method": ns_method,
        }
        adamw = {"lr": _first(adam_lr, lr, 3e-4), "betas": betas, "eps": eps, "weight_decay": weight_decay}
        groups = muon_groups(params, muon, adamw, self.STATES)
        states = {MOMENTUM: momentum_buffer, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if momentum_buffer is not None and not any(group["use_muon"] for group in groups):
            raise fail(
                "ds_quant.optimizer.momentum_buffer",
                "a model without a matrix outside embeddings and lm_head",
                "one that Muon has something to do in",
                "remove momentum_buffer",
            )
        super().__init__(groups, states, seed=seed)

    def check_group(self, group: dict[str, Any], where: str) -> None:
        """Raise ConfigError for hyperparameters out of range."""
        if "use_muon" not in group:
            return  # the defaults, which have no hyperparameters: each group has its own
        if not group["use_muon"]:
            check_hyperparameters(group, where)
            return
        check_numbers(group, where, ("lr", "momentum", "weight_decay"))
        if not float(group["momentum"]) < 1:
            raise fail(f"{where}(momentum)", group["momentum"], "a number from 0 to below 1", "set it so")
        if group["ns_method"] not in NS_METHODS:
            raise fail(f"{where}(ns_method)", group["ns_method"], " or ".join(NS_METHODS), "set one of them")

    def group_options(self, group: dict[str, Any]) -> GroupOptions:
        """A parameter group as a step needs it: of Muon's, without the momentum, which DeepSpeed has used already."""
        return _MuonOptions(group) if group["use_muon"] else AdamWOptions(group, _ADAMW_STATES)

    def do_steps(self, items: Sequence[Item]) -> None:
        """The last line above of Muon's parameters, AdamW's kernel for the others."""
        others = []
        for item in items:
            if isinstance(item.options, _MuonOptions):
                item.param.mul_(item.options.decay)
                item.param.add_(item.grad.view(item.param.shape), alpha=-item.options.lr)
            else:
                others.append(item)
        adamw_steps(others)

    def begin_momentum(self, group: dict[str, Any], param: Tensor) -> None:
        """Make the momentum of `param` zeros, in place of any that is there.

        To be called for all parameters before the first is given away: each takes the next free stream of random bits.
        """
        self.state[param].pop(MOMENTUM, None)
        self._stored_momentum(group, param)

    @torch.no_grad()
    def momentum(self, group: dict[str, Any], param: Tensor, dtype: torch.dtype) -> Tensor:
        """The momentum of `param` as a new plain tensor of `dtype` [its elements]."""
        blocks = self._stored_momentum(group, param).blocks
        values = torch.empty(blocks.numel, dtype=dtype, device=param.device)
        for begin, end in _pieces(blocks):
            values[begin:end] = load(part(blocks, begin, end))
        return values

    @torch.no_grad()
    def put_momentum(self, group: dict[str, Any], param: Tensor, values: Tensor) -> None:
        """Quantize `values`, of any floating dtype, as the momentum of `param`, in the step that comes."""
        state = self._stored_momentum(group, param)
        options = _MomentumOptions(group, state.numel())
        ((_, is_stochastic),) = options.stochastic
        key = None
        if is_stochastic:
            step = int(self.state[param]["step"].item()) + 1
            words = derive_words(Step(self).key(step), _MOMENTUM_STREAM + state.stream)
            key = torch.tensor(words, dtype=torch.int64, device=param.device)
        flat = values.view(-1)
        for begin, end in _pieces(state.blocks):
            stored = part(state.blocks, begin, end)
            overwrite(stored, store(flat[begin:end].float(), stored, key, begin))

    def _stored_momentum(self, group: dict[str, Any], param: Tensor) -> QuantizedState:
        Step(self).ready(self.state[param], _MomentumOptions(group, self.state_numel(MOMENTUM, param)), param)
        stored: QuantizedState = self.state[param][MOMENTUM]
        return stored

    def state_numel(self, name: str, param: Tensor) -> int:
        """Elements of the state `name` of `param`: ZeRO keeps the momentum of whole matrices at stages 1 and 2."""
        return self.momentum_numel.get(param, param.numel()) if name == MOMENTUM else param.numel()

    @torch.no_grad()
    def convert_states(self, params: Iterable[tuple[dict[str, Any], Tensor]]) -> None:
        """As in `QuantizedOptimizer`, with the momentums."""
        params = list(params)
        super().convert_states(params)
        for group, param in params:
            stored = self.state[param].get(MOMENTUM) if param in self.state else None
            if stored is None:
                continue
            if group[MOMENTUM] is not None:
                self._stored_momentum(group, param)
            elif isinstance(stored, QuantizedState):
                self.state[param][MOMENTUM] = stored.dequantize()  # DeepSpeed casts it


class _MuonOptions(GroupOptions):
    """A group of Muon's in a step."""

    def __init__(self, group: dict[str, Any]):
        super().__init__(group, {})
        self.lr = float(group["lr"])
        self.decay = 1 - self.lr * float(group["weight_decay"])


class _MomentumOptions(GroupOptions):
    """How the momentum of a group of Muon's is stored."""

    def __init__(self, group: dict[str, Any], numel: int):
        super().__init__(group, {MOMENTUM: True})
        self._shape = torch.Size([numel])

    def shape(self, param: Tensor) -> torch.Size:
        """Shape of the momentum of `param`."""
        return self._shape


def _pieces(blocks: QuantizedBlocks) -> Iterator[tuple[int, int]]:
    """Begin and end of whole blocks, some PIECE_ELEMENTS each: what computing takes beside them stays small."""
    length = blocks.block_size * max(1, PIECE_ELEMENTS // blocks.block_size)
    for begin in range(0, blocks.numel, length):
        yield begin, min(begin + length, blocks.numel)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
