"""A random order of millions of sequences, computed on demand instead of stored."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_ROUNDS = 8
_AT_ONCE = 1 << 14


class Permutation:
    """A pseudo-random permutation of 0 to n-1, selected by the numbers `key`. It takes no memory, whatever n is.

    A Feistel network over pairs of digits (x = high * base + low): each round adds a hash of one digit to the other.
    A round can be undone, so no two numbers collide. There are slightly more pairs than n; a result of n or more goes
    through the network again until it is below n, which keeps the map one to one (cycle walking).
    """

    def __init__(self, n: int, *key: int) -> None:
        if not 1 <= n < 1 << 62:
            raise ValueError(f"A permutation needs at least one element and fewer than 2**62, not {n}.")
        self.n = n
        self._base = math.isqrt(n - 1) + 1
        self._high = -(-n // self._base)
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The elements at `positions` ([any], integers below n), as int64."""
        result = self._once(np.asarray(positions).astype(np.uint64))
        outside = np.flatnonzero(result >= self.n)
        while len(outside):
            result[outside] = self._once(result[outside])
            outside = outside[result[outside] >= self.n]
        return result.astype(np.int64)

    def _once(self, x: np.ndarray) -> np.ndarray:
        high, low = x // self._base, x % self._base
        for number, key in enumerate(self._keys):
            if number % 2:
                high = (high + _hash(low ^ key) % self._high) % self._high
            else:
                low = (low + _hash(high ^ key) % self._base) % self._base
        return high * self._base + low


def _hash(x: np.ndarray) -> np.ndarray:
    # The finalizer of splitmix64: every input bit affects every result bit. Overflow is intended.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class PermutedBatches(Sampler[list[int]]):
    """This rank's micro-batches of an epoch, in the order of a `Permutation` keyed by the seed and the epoch.

    Step s takes positions s * global_batch to (s + 1) * global_batch of the order, for any number of ranks. Its
    micro-batch i takes batch_size of these, from (i * world_size + rank) * batch_size on. Sequences at the end of an
    epoch that do not fill a global batch are left out; the next epoch leaves out others.
    """

    def __init__(self, n: int, *, global_batch: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        if n < global_batch or global_batch % (batch_size * world_size):
            raise ValueError(
                f"{n} sequences cannot be cut into global batches of {global_batch} for {world_size} ranks with "
                f"micro-batches of {batch_size}."
            )
        self.n = n
        self.batch_size = batch_size
        self._global_batch = global_batch
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._epoch = 0

    @property
    def batch_sampler(self) -> PermutedBatches:
        """Itself, because the Trainer passes the epoch to the `batch_sampler` of a loader's batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Select the order of that epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.n // self._global_batch * (self._global_batch // (self._world_size * self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = Permutation(self.n, self._seed, self._epoch)
        batches = max(1, _AT_ONCE // self.batch_size)
        for begin in range(0, len(self), batches):
            numbers = np.arange(begin, min(begin + batches, len(self)))
            first = (numbers * self._world_size + self._rank) * self.batch_size
            positions = first[:, None] + np.arange(self.batch_size)
            yield from order(positions.reshape(-1)).reshape(positions.shape).tolist()
