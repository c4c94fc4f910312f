"""What `triton_quantize` launches: device code. Importing this module needs triton."""

# What a Triton function is passed has no type that mypy knows.
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from ds_quant.kernels.triton_random import derive_key, mix

PARTS = tl.constexpr(32)
"""How many parts a program reads at a time."""


@triton.jit
def _subkey(key, stream_low, stream_high):
    """`derive_key`; zeros where there is no key."""
    if key is None:
        first = 0
        second = 0
    else:
        low = stream_low.to(tl.uint32, bitcast=True)
        high = stream_high.to(tl.uint32, bitcast=True)
        first, second = derive_key(tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32), low, high)
    return first, second


@triton.jit
def _numbers(first_row, first_column, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NARROW: tl.constexpr):
    """Low and high word of the number of each element of a tile."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    first = tl.cast(first_row, tl.int64) * C + first_column
    if NARROW:
        low = first.to(tl.uint32) + (row * C + column).to(tl.uint32)
        high = 0
    else:
        number = first + row.to(tl.int64) * C + column
        low = number.to(tl.uint32)
        high = (number >> 32).to(tl.uint32)
    return low, high


@triton.jit
def _scale(maximum, LEVELS: tl.constexpr):
    """`numerics.integer.symmetric_scale`."""
    scale = tl.math.div_rn(maximum, LEVELS)
    short = (scale < 1.1754943508222875e-38) & (scale * LEVELS < maximum)  # 2^-126
    scale = (scale.to(tl.int32, bitcast=True) + short.to(tl.int32)).to(tl.float32, bitcast=True)  # 2^-149 more
    return tl.where(maximum < float("inf"), scale, float("nan"))


@triton.jit
def _round(y, scale, numbers, subkey, LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """int8 codes; 0 where the scale is 0 or NaN."""
    there = scale > 0
    steps = tl.where(there, tl.math.div_rn(y, tl.where(there, scale, 1.0)), 0.0)
    if STOCHASTIC:
        bits = mix(mix(numbers[0] ^ subkey[0]) + subkey[1] + numbers[1] * 0x1E3779B1)
        floor = tl.floor(steps)
        draw = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        steps = tl.where(draw < steps - floor, floor + 1.0, floor)
    else:
        steps = (steps + 12582912.0) - 12582912.0  # to nearest, ties to even: 1.5 * 2^23
    lowest: tl.constexpr = -LEVELS - (LEVELS % 1)
    highest: tl.constexpr = LEVELS - (LEVELS % 1)
    return tl.minimum(tl.maximum(steps, lowest), highest).to(tl.int32).to(tl.int8)


@triton.jit
def _magnitude(y):
    """Inf for a NaN, which a maximum may leave out."""
    magnitude = tl.abs(y)
    return tl.where(magnitude < float("inf"), magnitude, float("inf"))


@triton.jit
def _load_tile(x, first_row, first_column, R, C, stride_r, stride_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32, 0 beyond the operand."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < R - first_row) & (column < C - first_column)
    start = x + tl.cast(first_row, tl.int64) * stride_r + tl.cast(first_column, tl.int64) * stride_c
    return tl.load(start + row * stride_r + column * stride_c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_factor(factor, first, count, LENGTH: tl.constexpr, ONE: tl.constexpr):
    if ONE:
        loaded = tl.load(factor + tl.zeros([LENGTH], dtype=tl.int32))
    else:
        index = first + tl.arange(0, LENGTH)
        loaded = tl.load(factor + index, mask=index < count, other=0.0)
    return loaded


@triton.jit
def _store_tile(
    codes,
    turned,
    values,
    first_row,
    first_column,
    padded_rows,
    padded_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """To padded codes and turned codes, as far as there are any."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < padded_rows - first_row) & (column < padded_columns - first_column)
    if codes is not None:
        start = codes + tl.cast(first_row, tl.int64) * padded_columns + first_column
        tl.store(start + row * padded_columns + column, values, mask=inside)
    if turned is not None:
        start = turned + tl.cast(first_column, tl.int64) * padded_rows + first_row
        tl.store(start + column * padded_rows + row, values, mask=inside)


@triton.jit(do_not_specialize=["stream_low", "stream_high"])
def group_kernel(
    x, factor, key, codes, turned, scales, R, C, stride_r, stride_c, stream_low, stream_high,
    LEVELS: tl.constexpr, BY_COLUMNS: tl.constexpr, ONE_FACTOR: tl.constexpr, NARROW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    padded_rows, padded_columns = (R + 15) // 16 * 16, (C + 15) // 16 * 16
    program = tl.program_id(0)
    GROUPS: tl.constexpr = COLUMNS if BY_COLUMNS else ROWS
    LENGTH: tl.constexpr = ROWS if BY_COLUMNS else COLUMNS
    AXIS: tl.constexpr = 0 if BY_COLUMNS else 1
    if BY_COLUMNS:
        count, extent, padded_extent = C, R, padded_rows
    else:
        count, extent, padded_extent = R, C, padded_columns
    first = program * GROUPS
    subkey = _subkey(key, stream_low, stream_high)

    maximum = tl.zeros([GROUPS], dtype=tl.float32)
    for start in range(0, extent, LENGTH):
        first_row, first_column = (start, first) if BY_COLUMNS else (first, start)
        y = _load_tile(x, first_row, first_column, R, C, stride_r, stride_c, ROWS, COLUMNS)
        if factor is not None:
            y = y * tl.expand_dims(_load_factor(factor, start, extent, LENGTH, ONE_FACTOR), 1 - AXIS)
        maximum = tl.maximum(maximum, tl.max(_magnitude(y), axis=AXIS))
    scale = _scale(maximum, LEVELS)
    index = first + tl.arange(0, GROUPS)
    tl.store(scales + index, scale, mask=index < count)
    spread = tl.expand_dims(scale, AXIS)

    # From the end: what was read last is what a cache still has.
    num_tiles = tl.cdiv(padded_extent, LENGTH)
    for tile in range(num_tiles):
        start = (num_tiles - 1 - tile) * LENGTH
        first_row, first_column = (start, first) if BY_COLUMNS else (first, start)
        y = _load_tile(x, first_row, first_column, R, C, stride_r, stride_c, ROWS, COLUMNS)
        if factor is not None:
            y = y * tl.expand_dims(_load_factor(factor, start, extent, LENGTH, ONE_FACTOR), 1 - AXIS)
        numbers = _numbers(first_row, first_column, C, ROWS, COLUMNS, NARROW)
        values = _round(y, spread, numbers, subkey, LEVELS, key is not None)
        _store_tile(codes, turned, values, first_row, first_column, padded_rows, padded_columns, ROWS, COLUMNS)


@triton.jit
def scan_kernel(
    x, column_factor, row_factor, row_scales, column_parts, one_parts, sum_parts, R, C, stride_r, stride_c,
    LEVELS: tl.constexpr, ONE_COLUMN_FACTOR: tl.constexpr, ONE_ROW_FACTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first_row = program * ROWS
    row = first_row + tl.arange(0, ROWS)
    row_scale = tl.zeros([ROWS], dtype=tl.float32)
    if row_factor is not None:
        row_scale = _load_factor(row_factor, first_row, R, ROWS, ONE_ROW_FACTOR)
    maximum = tl.zeros([ROWS], dtype=tl.float32)
    for first_column in range(0, C, COLUMNS):
        values = _load_tile(x, first_row, first_column, R, C, stride_r, stride_c, ROWS, COLUMNS)
        column = first_column + tl.arange(0, COLUMNS)
        at = program.to(tl.int64) * C + column
        y = values
        if column_factor is not None:
            y = y * _load_factor(column_factor, first_column, C, COLUMNS, ONE_COLUMN_FACTOR)[None, :]
        maximum = tl.maximum(maximum, tl.max(_magnitude(y), axis=1))
        if column_parts is not None:
            y = values
            if row_factor is not None:
                y = y * row_scale[:, None]
            tl.store(column_parts + at, tl.max(_magnitude(y), axis=0), mask=column < C)
        if sum_parts is not None:
            tl.store(sum_parts + at, tl.sum(values, axis=0), mask=column < C)
    if row_scales is not None:
        tl.store(row_scales + row, _scale(maximum, LEVELS), mask=row < R)
    if one_parts is not None:
        tl.store(one_parts + program, tl.max(maximum, axis=0))


@triton.jit(
    do_not_specialize=[
        *("num_parts", "num_tiles"),
        *("row_stream_low", "row_stream_high", "column_stream_low", "column_stream_high"),
    ]
)
def tile_kernel(
    x, column_factor, row_factor, key, codes, turned, row_scales, scales, parts, sum_parts, sums,
    num_parts, num_tiles, R, C, stride_r, stride_c,
    row_stream_low, row_stream_high, column_stream_low, column_stream_high,
    LEVELS: tl.constexpr, ONE_SCALE: tl.constexpr, ONE_COLUMN_FACTOR: tl.constexpr, ONE_ROW_FACTOR: tl.constexpr,
    NARROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One scale for all, or those of rows for the codes and those of columns for the turned ones. A program has
    `num_tiles` tiles below each other."""
    padded_rows, padded_columns = (R + 15) // 16 * 16, (C + 15) // 16 * 16
    # From the end: the scan read these columns last.
    first_column = (tl.num_programs(0) - 1 - tl.program_id(0)) * COLUMNS
    is_first = tl.program_id(1) == 0
    column = first_column + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS)
    # Of columns; where there is one scale, all take the maximum of the same parts.
    maximum = tl.zeros([COLUMNS], dtype=tl.float32)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first_part in range(0, num_parts, PARTS):
        number = first_part + part
        if ONE_SCALE:
            loaded = tl.load(parts + number, mask=number < num_parts, other=0.0)
            maximum = tl.maximum(maximum, tl.max(loaded, axis=0))
        else:
            at = number.to(tl.int64)[:, None] * C + column[None, :]
            there = (number < num_parts)[:, None] & (column < C)[None, :]
            maximum = tl.maximum(maximum, tl.max(tl.load(parts + at, mask=there, other=0.0), axis=0))
            if sum_parts is not None:
                total += tl.sum(tl.load(sum_parts + at, mask=there, other=0.0), axis=0)
    column_scale = _scale(maximum, LEVELS)
    if is_first:
        tl.store(scales + column, column_scale, mask=(column < 1) if ONE_SCALE else (column < C))
        if sums is not None:
            tl.store(sums + column, total.to(sums.dtype.element_ty), mask=column < C)
    row_subkey = _subkey(key, row_stream_low, row_stream_high)
    column_subkey = _subkey(key, column_stream_low, column_stream_high)
    if column_factor is not None:
        across = _load_factor(column_factor, first_column, C, COLUMNS, ONE_COLUMN_FACTOR)[None, :]

    begin = tl.program_id(1) * num_tiles
    for tile in range(begin, tl.minimum(begin + num_tiles, tl.cdiv(padded_rows, ROWS))):
        first_row = tile * ROWS
        values = _load_tile(x, first_row, first_column, R, C, stride_r, stride_c, ROWS, COLUMNS)
        numbers = _numbers(first_row, first_column, C, ROWS, COLUMNS, NARROW)
        if ONE_SCALE:
            found = _round(values, column_scale[None, :], numbers, row_subkey, LEVELS, key is not None)
            _store_tile(codes, turned, found, first_row, first_column, padded_rows, padded_columns, ROWS, COLUMNS)
        else:
            row_scale = _load_factor(row_scales, first_row, R, ROWS, False)[:, None]
            y = values
            if column_factor is not None:
                y = y * across
            found = _round(y, row_scale, numbers, row_subkey, LEVELS, key is not None)
            _store_tile(codes, None, found, first_row, first_column, padded_rows, padded_columns, ROWS, COLUMNS)
            y = values
            if row_factor is not None:
                y = y * _load_factor(row_factor, first_row, R, ROWS, ONE_ROW_FACTOR)[:, None]
            found = _round(y, column_scale[None, :], numbers, column_subkey, LEVELS, key is not None)
            _store_tile(None, turned, found, first_row, first_column, padded_rows, padded_columns, ROWS, COLUMNS)
