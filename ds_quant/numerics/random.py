"""Random bits from a counter: a hash of a key and an element's index, and no generator.

The same key and index give the same bits in eager mode, under torch.compile, and in the C++ and Triton kernels,
which repeat this definition with uint32 arithmetic (everything below is modulo 2^32):

    mix(x):        x ^= x >> 16;  x *= 0x21f0aaad;  x ^= x >> 15;  x *= 0x735a2d97;  x ^= x >> 15
    bits(key, i):  mix(mix(lo32(i) ^ key[0]) + key[1] + hi32(i) * 0x1e3779b1)

`mix` is Ettinger's bijection found by hash-prospector (https://github.com/skeeto/hash-prospector). A key is made
of 64-bit counters by absorbing their 32-bit words one after the other:

    absorb(key, j, word):  key[h] = mix((key[h] + (j + 1) * INCREMENT[h]) ^ word)      for h = 0, 1
    fold_key(...):         key = START; the words are numbered j = 0..9 and absorbed in the order
                           lo32(seed), hi32(seed), lo32(step), hi32(step), lo32(micro_step), hi32(micro_step),
                           lo32(rank), hi32(rank), lo32(stream), hi32(stream)
    derive_key(key, s):    absorb j = 10 with lo32(s), then j = 11 with hi32(s)

Each absorption is a bijection of the word, so keys that differ in one word differ in both halves.

Tensors hold the words as int64 in [0, 2^32), because torch has no full uint32 arithmetic; both multipliers of
`mix` are below 2^31, so no product leaves int64.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF
START = (0x243F6A88, 0x85A308D3)
INCREMENT = (0x9E3779B9, 0xC2B2AE35)
HIGH_WORD_MULTIPLIER = 0x1E3779B1

_INCREMENTS = [
    np.array([(number + 1) * increment & MASK for increment in INCREMENT], np.uint32)[:, None] for number in range(12)
]

Word = TypeVar("Word", int, Tensor)


def _mix(x: Word) -> Word:
    """The bijection `mix` of the module docstring, on a Python int or an int64 tensor in [0, 2^32)."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & MASK
    return x ^ (x >> 15)


def _absorb(halves: tuple[Word, Word], number: int, word: int) -> tuple[Word, Word]:
    first = _mix(((halves[0] + (number + 1) * INCREMENT[0]) & MASK) ^ word)
    second = _mix(((halves[1] + (number + 1) * INCREMENT[1]) & MASK) ^ word)
    return first, second


def _check_counter(where: str, value: int) -> None:
    if not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(
            f"{where}: got {value!r}; allowed: integers from 0 to 2^64 - 1; pass a Python int, and a negative "
            "seed modulo 2^64"
        )


def check_key(where: str, key: Tensor) -> None:
    """Raise ValueError unless `key` has the form that `fold_key` and `derive_key` give."""
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape != (2,):
        got = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else f"a {type(key).__name__}"
        raise ValueError(f"{where}: got {got}; allowed: an int64 tensor of shape (2,); make it with fold_key()")


def fold_key(
    seed: int,
    step: int = 0,
    micro_step: int = 0,
    rank: int = 0,
    stream: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Key of the random bits of one place in a run: int64 of shape (2,), values in [0, 2^32).

    A change in any counter gives an unrelated key. Leave `rank` at 0 for state that is replicated between ranks:
    replicas must draw the same bits. Call it outside a compiled region and pass the key in: compiled code then
    serves every key, whereas it would be specialized on the Python ints.

    Raises ValueError where a counter is not an integer from 0 to 2^64 - 1.
    """
    return torch.tensor(fold_words(seed, step, micro_step, rank, stream), dtype=torch.int64, device=device)


def fold_words(seed: int, step: int = 0, micro_step: int = 0, rank: int = 0, stream: int = 0) -> tuple[int, int]:
    """`fold_key` as Python ints: what a kernel is passed."""
    counters = {"seed": seed, "step": step, "micro_step": micro_step, "rank": rank, "stream": stream}
    halves = START
    for position, (name, value) in enumerate(counters.items()):
        _check_counter(f"fold_key({name})", value)
        halves = _absorb(halves, 2 * position, value & MASK)
        halves = _absorb(halves, 2 * position + 1, value >> 32)
    return halves


def derive_key(key: Tensor, stream: int) -> Tensor:
    """Subkey number `stream` of `key`: int64 of shape (2,), on the key's device.

    Only tensor operations touch the key, so a compiled caller is not compiled again when its values change.
    The subkey differs from `fold_key(..., stream=stream)`. `derive_words` gives the same words without tensors.
    """
    check_key("derive_key(key)", key)
    _check_counter("derive_key(stream)", stream)
    if type(key) is Tensor and key.device.type == "cpu" and not torch.compiler.is_compiling():
        first, second = key.tolist()  # some forty small tensors less, which counts in a layer
        return torch.tensor(derive_words((first, second), stream))
    halves = (key[0], key[1])
    halves = _absorb(halves, 10, stream & MASK)
    halves = _absorb(halves, 11, stream >> 32)
    return torch.stack(halves)


def derive_words(key: tuple[int, int], stream: int) -> tuple[int, int]:
    """`derive_key` on Python ints: what a kernel is passed, with no tensor made and no device waited for."""
    _check_counter("derive_words(stream)", stream)
    return _absorb(_absorb(key, 10, stream & MASK), 11, stream >> 32)


def derive_many(key: tuple[int, int], streams: np.ndarray) -> np.ndarray:
    """`derive_words` for each of `streams`, uint64 [num_streams]: int64 [2, num_streams]."""
    # Both halves in one array, whose words wrap around by themselves: it takes a third of the time of `_absorb`.
    halves: Any = np.array(key, np.uint32)[:, None]
    for number, words in ((10, streams), (11, streams >> np.uint64(32))):
        halves = (halves + _INCREMENTS[number]) ^ words.astype(np.uint32)
        halves ^= halves >> 16
        halves *= np.uint32(0x21F0AAAD)
        halves ^= halves >> 15
        halves *= np.uint32(0x735A2D97)
        halves ^= halves >> 15
    return halves.astype(np.int64)


def random_bits(
    key: Tensor, shape: int | Sequence[int], device: torch.device | str | None = None, *, offset: int = 0
) -> Tensor:
    """32 random bits an element: int64 in [0, 2^32), of `shape` (an int gives a 1-D tensor).

    The element with row-major index i gets bits(key, offset + i); `offset` is from 0 to 2^63 - 1 - numel.
    `device` is the key's unless given.
    """
    check_key("random_bits(key)", key)
    index = _indices(shape, key.device if device is None else device, offset)
    return bits_at(key.to(index.device), index)


def _indices(shape: int | Sequence[int], device: torch.device | str, offset: int | Tensor) -> Tensor:
    """The row-major index of each element, plus `offset`: int64 of `shape`."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return torch.arange(math.prod(shape), dtype=torch.int64, device=device).reshape(shape) + offset


def bits_at(key: Tensor | tuple[Tensor, Tensor] | tuple[int, int], index: Tensor) -> Tensor:
    """bits(key, i) for each i of `index`, int64 from 0: int64 in [0, 2^32), of index's shape. key[0] and key[1] may be
    ints, or tensors that broadcast against it."""
    low, high = index & MASK, index >> 32
    return _mix((_mix(low ^ key[0]) + key[1] + high * HIGH_WORD_MULTIPLIER) & MASK)


def uniform(
    key: Tensor, shape: int | Sequence[int], device: torch.device | str | None = None, *, offset: int = 0
) -> Tensor:
    """fp32 in [0, 1): the upper 24 of the bits that `random_bits` gives, times 2^-24 (exact in fp32)."""
    return (random_bits(key, shape, device, offset=offset) >> 8).to(torch.float32) * 2.0**-24


def uniform16(
    key: Tensor, shape: int | Sequence[int], device: torch.device | str | None = None, *, offset: int | Tensor = 0
) -> Tensor:
    """fp32 multiples of 2^-16 in [0, 1), two from each 32 random bits: half the price of `uniform`.

    Of each run of 32 elements, element j and element j + 16 share a word: with i the element's row-major index plus
    `offset`, the word is bits(key, 16 * (i >> 5) + (i & 15)), of which i takes the lower half where bit 4 of i is 0,
    else the upper one.
    """
    check_key("uniform16(key)", key)
    index = _indices(shape, key.device if device is None else device, offset)
    word = bits_at(key.to(index.device), ((index >> 5) << 4) | (index & 15))
    return ((word >> (index & 16)) & 0xFFFF).to(torch.float32) * 2.0**-16
