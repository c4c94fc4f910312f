"""One quantized reduction: an all-to-all of codes and scales, one fused dequantize-sum, and, for an all-reduce, an
all-gather of the requantized result.

The phases are calls of their own, so that a bucket's messages can travel while the next one's gradients are computed.
The owner's own share is added in full precision: it never crosses the wire. All ranks decode the same codes, the owner
included, and so end with the same bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ds_quant.comm import backend
from ds_quant.comm.buffers import Buffers
from ds_quant.comm.feedback import ErrorFeedback
from ds_quant.comm.layout import Layout
from ds_quant.comm.statistics import Statistics
from ds_quant.kernels import wire
from ds_quant.numerics.random import derive_words

Words = tuple[int, int]
"""A key of random bits (`numerics.random.fold_words`)."""


class Call(NamedTuple):
    """What one reduction is told."""

    factor: float = 1.0
    """The sum is multiplied by it."""
    key: Words | None = None
    """Of stochastic rounding; None: to nearest."""
    residual_scale: float = 1.0
    """What residuals are multiplied by before they are added: the loss scale."""


class Channel(NamedTuple):
    """What the reductions of a process group have in common."""

    group: backend.Group
    buffers: Buffers
    feedback: ErrorFeedback | None
    statistics: Statistics


class Exchange:
    """`send`, then `reduce`, then `finish`, each once.

    Args:
        tensors: 1-D contiguous, of one dtype (fp32, bf16 or fp16) and device; the pieces of `layout` refer to them.
        output: takes the result of the own pieces, one after the other: 1-D, of own_numel elements, any of the dtypes
            (reduce-scatter). None: every rank's result goes into `tensors` (all-reduce).
    """

    def __init__(
        self, channel: Channel, tensors: Sequence[Tensor], layout: Layout, call: Call, output: Tensor | None = None
    ) -> None:
        self.channel, self.tensors, self.layout, self.call, self.output = channel, tensors, layout, call, output
        self.device = tensors[0].device
        self._taken: list[Tensor] = []
        self._work: Any = None

    def send(self) -> None:
        """Quantize the pieces of other owners and start the all-to-all."""
        layout, feedback, fmt = self.layout, self.channel.feedback, self.layout.fmt
        if layout.world_size == 1:
            return
        message = self._take(layout.sent_bytes)
        residuals = None
        if feedback is not None:
            slots = feedback.slots(layout.sent_pieces, self.device)
            scale = self.call.residual_scale
            residuals = wire.Residuals(slots.read, slots.write, scale, 1.0 / scale)
        if layout.sent_pieces:
            wire.quantize(
                self.tensors,
                layout.sent,
                message,
                fmt,
                key=self._key(0),
                residuals=residuals,
                errors=self.channel.statistics.errors_on(self.device),
            )
        self._received = self._take((layout.world_size - 1) * layout.own_bytes)
        self._work = backend.all_to_all(
            self._received, message, layout.receive_splits, layout.send_splits, self.channel.group
        )
        self._count(message.numel(), layout.sent_numel)

    def reduce(self) -> None:
        """Sum up the own pieces; for an all-reduce, start the all-gather of the result."""
        layout, feedback = self.layout, self.channel.feedback
        if layout.world_size == 1:
            self._reduce_alone()
            return
        self._wait()
        received = self._received.reshape(layout.world_size - 1, layout.own_bytes)
        options: dict[str, Any] = {"factor": self.call.factor}
        if self.output is not None:
            if feedback is not None:
                owed = feedback.settle(layout.own_pieces)
                if any(tensor is not None for tensor in owed):
                    options["residuals"] = wire.Residuals(owed, [None] * len(owed), self.call.residual_scale, 1.0)
            options["output"] = self.output
        else:
            self._gathered = self._take(layout.world_size * layout.slot_bytes)
            begin = layout.rank * layout.slot_bytes
            slot = self._gathered[begin : begin + layout.slot_bytes]
            if feedback is not None:
                slots, scale = feedback.slots(layout.own_pieces, self.device), self.call.residual_scale
                inverse = 1.0 / (self.call.factor * scale)
                options["residuals"] = wire.Residuals(slots.read, slots.write, scale, inverse)
            options |= {"message": slot, "key": self._key(1), "errors": self.channel.statistics.errors_on(self.device)}
        if layout.own_pieces:
            wire.reduce(self.tensors, layout.own, received, layout.rank, layout.fmt, **options)
        if self.output is None:
            self._work = backend.all_gather(self._gathered, slot, self.channel.group)
            others = layout.world_size - 1
            self._count(others * slot.numel(), others * layout.own_numel)

    def finish(self) -> None:
        """For an all-reduce, put the results into the tensors."""
        if self.output is None and self.layout.world_size > 1:
            self._wait()
            wire.dequantize(self._gathered, self.layout.gathered, self.tensors, self.layout.fmt)
        self._give_back()

    def complete(self) -> None:
        """What is left after `send`."""
        self.reduce()
        self.finish()

    def _reduce_alone(self) -> None:
        """A group of one rank: nothing crosses a wire, nothing is quantized."""
        written = 0
        for piece in self.layout.pieces:
            own = self.tensors[piece.source][piece.start : piece.start + piece.numel]
            if self.output is not None:
                self.output[written : written + piece.numel] = own.float() * self.call.factor
                written += piece.numel
            elif self.call.factor != 1.0:
                own *= self.call.factor

    def _key(self, phase: int) -> Words | None:
        return None if self.call.key is None else derive_words(self.call.key, phase)

    def _take(self, num_bytes: int) -> Tensor:
        buffer = self.channel.buffers.take(num_bytes, self.device)
        self._taken.append(buffer)
        return buffer

    def _count(self, sent_bytes: int, numel: int) -> None:
        self.channel.statistics.count(sent_bytes, numel, self.tensors[0].element_size())

    def _give_back(self) -> None:
        for buffer in self._taken:
            self.channel.buffers.give_back(buffer)
        self._taken = []

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
