"""Quantized reductions of one process group, under one config."""

import functools
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor
from torch import distributed as torch_dist

from ds_quant.base.number_formats import FORMATS
from ds_quant.comm import backend, layout
from ds_quant.comm.buffers import Buffers
from ds_quant.comm.exchange import Call, Channel, Exchange, Words
from ds_quant.comm.feedback import ErrorFeedback
from ds_quant.comm.hierarchy import (
    Nodes,
    TwoLevelExchange,
    TwoLevelLayout,
    check_nodes,
    make_nodes,
    ranks_per_node,
    two_level,
)
from ds_quant.comm.layout import Layout, Piece, Span
from ds_quant.comm.statistics import Statistics
from ds_quant.config import GradientCommunicationConfig
from ds_quant.kernels.wire import WireFormat
from ds_quant.numerics.random import fold_words

STREAM = 0x636F6D6D
"""Sets the random bits of communication apart from those of layers and moments."""
MAX_LAYOUTS = 4096


class Reducer:
    """Quantized all-reduce and reduce-scatter over `group`. All ranks of the group make it, and call it alike.

    Args:
        config: what the JSON says.
        group: a process group; None: all ranks.
        feedback: where residuals are kept; made here if the config asks for them and None is given.
        statistics: where traffic is counted; own ones if None.
        seed: of stochastic rounding; each rank draws for itself.

    Raises:
        ConfigError: `hierarchical` does not fit the group.
    """

    def __init__(
        self,
        config: GradientCommunicationConfig,
        group: backend.Group | None = None,
        *,
        feedback: ErrorFeedback | None = None,
        statistics: Statistics | None = None,
        buffers: Buffers | None = None,
        seed: int = 0,
    ) -> None:
        group = backend.resolve(group)
        self.config = config
        self.seed = seed
        self.fmt = wire_format(config)
        self.world_size, self.rank = torch_dist.get_world_size(group), torch_dist.get_rank(group)
        if config.error_feedback and feedback is None:
            feedback = ErrorFeedback()
        self.feedback = feedback if config.error_feedback else None
        self.statistics = statistics or Statistics()
        self.channel = Channel(group, buffers or Buffers(), self.feedback, self.statistics)
        self._node_size = ranks_per_node(config.hierarchical) if self.world_size > 1 else 0
        if self._node_size:
            check_nodes(self.world_size, self._node_size)
        self._layouts: dict[Hashable, Layout | TwoLevelLayout] = {}

    @functools.cached_property
    def nodes(self) -> Nodes | None:
        """Made by all ranks at their first reduction, once they have compared settings: a rank that wants no nodes
        would leave the others waiting for it."""
        return make_nodes(self.channel.group, self._node_size) if self._node_size else None

    def all_reduce(self, tensors: Sequence[Tensor], spans: Sequence[Span], call: Call) -> None:
        """Sum the spans of `tensors` over the ranks, in place, times `call.factor`; the same bits on all ranks.

        `tensors` are 1-D, contiguous, of one dtype (fp32, bf16, fp16) and device.
        """
        self.start_all_reduce(tensors, spans, call).complete()

    def start_all_reduce(self, tensors: Sequence[Tensor], spans: Sequence[Span], call: Call) -> Exchange:
        """`all_reduce` with its first messages on their way. Call `reduce` and `finish` on the result, in an order of
        calls that is the same on all ranks."""
        key = (True, *spans)
        found = self._layouts.get(key) or self._remember(key, layout.cut_evenly(spans, self.fmt, self.world_size))
        return self._start(tensors, found, call, None)

    def reduce_scatter(self, tensors: Sequence[Tensor], pieces: Sequence[Piece], output: Tensor, call: Call) -> None:
        """Sum the pieces over the ranks, times `call.factor`, each for its owner alone.

        `output` takes the own pieces, one after the other: 1-D, contiguous, fp32, bf16 or fp16.
        """
        self.start_reduce_scatter(tensors, pieces, output, call).complete()

    def start_reduce_scatter(
        self, tensors: Sequence[Tensor], pieces: Sequence[Piece], output: Tensor, call: Call
    ) -> Exchange:
        """`reduce_scatter` with its messages on their way; see `start_all_reduce`."""
        key = (False, *pieces)
        found = self._layouts.get(key) or self._remember(key, pieces)
        return self._start(tensors, found, call, output)

    def own_numel(self, pieces: Sequence[Piece]) -> int:
        """Elements of the pieces that this rank owns."""
        return sum(piece.numel for piece in pieces if piece.owner == self.rank)

    def key(self, step: int, micro_step: int, stream: int = 0) -> Words | None:
        """Random bits of this rank in a call of a step, told apart by `stream`; None where rounding is to nearest."""
        if self.config.rounding == "nearest":
            return None
        return fold_words(self.seed, step, micro_step, self.rank + 1, STREAM << 32 | stream)

    def _start(
        self, tensors: Sequence[Tensor], found: Layout | TwoLevelLayout, call: Call, output: Tensor | None
    ) -> Exchange:
        exchange: Exchange
        if isinstance(found, TwoLevelLayout):
            assert self.nodes is not None
            exchange = TwoLevelExchange(self.channel, self.nodes, tensors, found, call, output)
        else:
            exchange = Exchange(self.channel, tensors, found, call, output)
        exchange.send()
        return exchange

    def _remember(self, key: Hashable, pieces: Sequence[Piece]) -> Layout | TwoLevelLayout:
        if len(self._layouts) >= MAX_LAYOUTS:
            self._layouts.clear()  # tensors of ever new sizes
        built: Any = layout.build(pieces, self.fmt, self.world_size, self.rank)
        if self.nodes is not None:
            built = two_level(built, self.nodes)
        self._layouts[key] = built
        return built


def wire_format(config: GradientCommunicationConfig) -> WireFormat:
    """What the JSON's object says of elements and scales."""
    if config.format is None:
        assert config.bits is not None
        return WireFormat(config.bits, config.block_size, config.rotation)
    rule = config.scale_rule or "floor"
    return WireFormat(FORMATS[config.format].bits, config.block_size, config.rotation, config.format, rule)


def describe_wire(config: GradientCommunicationConfig) -> str:
    """One line for reports."""
    words = [f"{config.format or f'{config.bits} bits'} in blocks of {config.block_size}"]
    if config.scale_rule:
        words.append(f"scale rule {config.scale_rule}")
    if config.rounding == "stochastic":
        words.append("stochastic rounding")
    if config.rotation != "none":
        words.append(f"{config.rotation} rotation")
    if config.error_feedback:
        words.append("error feedback")
    if config.hierarchical:
        words.append("between nodes only")
    return ", ".join(words)


def bytes_an_element(config: GradientCommunicationConfig) -> float:
    """On the wire, scales included, of a long piece."""
    fmt = wire_format(config)
    scale = 4 if fmt.scale_kind == "float" else 1  # and 4 bytes for each piece in nvfp4 and nvint4
    return fmt.bits / 8 + scale / fmt.block_size
