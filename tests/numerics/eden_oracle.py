"""MS-EDEN by its definition, block by block in float64. Shares no code with the implementation."""

import numpy as np
import torch
from numerics import format_oracle, oracle


def blocks(rotated, how):
    """(values in units of the scale, scale, factor, its part for the tensor): what is rounded to nearest, and how far
    off each block of the fp32 matrix `rotated` is. Float64 arrays, the first of its shape, others [rows, blocks]."""
    x = rotated.numpy()
    if "format" in how:
        size = format_oracle.FORMATS[how["format"]][2] or how["block_size"]
        steps, scales = format_oracle.quantize(x, how["format"], rule="ms_eden", granularity="block", block_size=size)
        elements = format_oracle.FORMATS[how["format"]][0]
        largest = np.float32(256 * format_oracle.table(elements)[-1])
        tensor = float(oracle.step_size(np.abs(x).max(), largest))
    else:
        size, tensor = how["block_size"], None
        codes, scale, _ = oracle.quantize(x, how["bits"], granularity="block", block_size=size, symmetric=True)
        steps, scales = codes, oracle.expand(scale, x.shape, "block", size)
    steps, scales, x = (array.astype(np.float64) for array in (steps, scales, x))
    count = -(-x.shape[1] // size)
    scale, factor = np.zeros((len(x), count)), np.ones((len(x), count))
    for row in range(len(x)):
        for number in range(count):
            part = (row, slice(number * size, (number + 1) * size))
            scale[row, number] = scales[part][0]
            estimate = float((x[part] * steps[part]).sum() * scale[row, number])
            if estimate > 0:
                factor[row, number] = float((x[part] ** 2).sum()) / estimate
    return steps, scale, factor, tensor, size


def neighbours(value):
    """The two values of e4m3 around it, equal where it is one."""
    table = format_oracle.table("e4m3")
    above = int(np.searchsorted(table, value))
    return (value, value) if table[above] == value else (table[above - 1], table[above])


def quantize(rotated, how, key):
    """float64 of the shape of `rotated`, dequantized."""
    steps, scale, factor, tensor, size = blocks(rotated, how)
    scale = scale * factor
    if "format" in how and tensor:
        draws = oracle.uniform(key.tolist(), scale.size).reshape(scale.shape)
        for place, value in np.ndenumerate(scale / tensor):
            low, high = neighbours(value)
            scale[place] = (high if high > low and draws[place] < (value - low) / (high - low) else low) * tensor
    return torch.from_numpy(steps * scale.repeat(size, 1)[:, : steps.shape[1]])
