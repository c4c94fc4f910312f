"""`numerics.random` in device code, with uint32 arithmetic. Importing this module needs triton."""

# What a Triton function is passed has no type that mypy knows.
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from ds_quant.numerics.random import INCREMENT, MASK

_FIRST_LOW, _FIRST_HIGH = (tl.constexpr(number * INCREMENT[0] & MASK) for number in (11, 12))
_SECOND_LOW, _SECOND_HIGH = (tl.constexpr(number * INCREMENT[1] & MASK) for number in (11, 12))
"""What `derive_key` adds to the halves of a key before it absorbs the words of a stream."""


@triton.jit
def mix(x):
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def derive_key(first, second, low, high):
    """The subkey of a key's halves for a stream's low and high word, all uint32."""
    first = mix((mix((first + _FIRST_LOW) ^ low) + _FIRST_HIGH) ^ high)
    second = mix((mix((second + _SECOND_LOW) ^ low) + _SECOND_HIGH) ^ high)
    return first, second
