"""What quantized collectives compute, by the definition of the wire and a layout, and how far off they may be."""

import torch

from ds_quant.comm.layout import build
from ds_quant.numerics import wire
from ds_quant.numerics.random import derive_words

LEVELS = {8: 127, 4: 7}


def bound(shares, bits, block_size, blocks_of_result, rotation):
    """The largest error of a sum: half a step of each share that was sent, and half of the result's, all roundings
    included. Blocks start at pieces, which start at multiples of the block, so a step is at most that of the whole."""
    spread = block_size**0.5 if rotation == "hadamard" else 1.0  # of one element's error over its block, at most
    steps = [share.abs().max() / LEVELS[bits] for share in shares]
    sum_of_steps = sum(steps)
    total = sum_of_steps
    if blocks_of_result:
        total = total + (sum(share.abs().max() for share in shares) + sum_of_steps) / LEVELS[bits]
    # Rotated values may be sqrt(block) times as large as the largest before.
    return float(total * spread * spread + 1e-5 * sum(share.abs().max() for share in shares))


def simulate(shares, pieces, fmt, *, factor=1.0, keys=None, feedbacks=None, residual_scale=1.0, output_dtype=None):
    """All ranks of a reduction in one process, by the definition of `numerics.wire` and a layout.

    `shares` are each rank's tensors, `keys` its random bits. Returns each rank's tensors after an all-reduce, or, with
    `output_dtype`, each rank's part of a reduce-scatter.
    """
    world_size = len(shares)
    ranks = range(world_size)
    layouts = [build(pieces, fmt, world_size, rank) for rank in ranks]

    def options(rank, phase, owned, inverse):
        found = {} if keys is None or keys[rank] is None else {"key": derive_words(keys[rank], phase)}
        if feedbacks is not None:
            slots = feedbacks[rank].slots(owned, torch.device("cpu"))
            found["residuals"] = wire.Residuals(slots.read, slots.write, residual_scale, inverse)
        return found

    messages = []
    for rank, layout in enumerate(layouts):
        message = torch.zeros(sum(layout.send_splits), dtype=torch.uint8)
        wire.quantize(
            shares[rank], layout.sent, message, fmt, **options(rank, 0, layout.sent_pieces, 1.0 / residual_scale)
        )
        messages.append(message.split(layout.send_splits))
    slots, outputs = [], []
    for rank, layout in enumerate(layouts):
        received = torch.stack([messages[other][rank] for other in ranks if other != rank])
        where = (shares[rank], layout.own, received, rank, fmt)
        if output_dtype is not None:
            outputs.append(torch.empty(layout.own_numel, dtype=output_dtype))
            wire.reduce(*where, factor=factor, output=outputs[-1])
        else:
            slots.append(torch.zeros(layout.slot_bytes, dtype=torch.uint8))
            about = options(rank, 1, layout.own_pieces, 1.0 / (factor * residual_scale))
            wire.reduce(*where, factor=factor, message=slots[-1], **about)
    if output_dtype is not None:
        return outputs
    results = [[tensor.clone() for tensor in tensors] for tensors in shares]
    for layout, tensors in zip(layouts, results, strict=True):
        wire.dequantize(torch.cat(slots), layout.gathered, tensors, fmt)
    return results


def expected_of(shares, pieces, fmt, node, *, factor, keys, output_dtype=None):
    """`simulate`, for one flat tensor a rank and either number of levels; sums within nodes of `node` ranks are those
    of their dtype. One rank alone quantizes nothing."""
    world_size = len(shares)
    if world_size == 1:
        return [(shares[0].float() * factor).to(output_dtype or shares[0].dtype)]
    if not node:
        found = simulate(
            [[share] for share in shares], pieces, fmt, factor=factor, keys=keys, output_dtype=output_dtype
        )
        return found if output_dtype is not None else [tensors[0] for tensors in found]
    sums = [[sum(shares[at + 1 : at + node], shares[at])] for at in range(0, world_size, node)]
    results = [None] * world_size if output_dtype is not None else [share.clone() for share in shares]
    for number in range(node):
        chunk = [piece._replace(owner=piece.owner // node) for piece in pieces if piece.owner % node == number]
        found = simulate(sums, chunk, fmt, factor=factor, keys=keys[number::node], output_dtype=output_dtype)
        if output_dtype is not None:
            results[number::node] = found
            continue
        for result in results:
            for piece in chunk:
                at = slice(piece.start, piece.start + piece.numel)
                result[at] = found[0][0][at]
    return results


def as_sent(tensor):
    return tensor.float() if tensor.dtype == torch.float64 else tensor
