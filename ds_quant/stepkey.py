"""Which random bits a stochastic rounding draws: a key that names the step instead of a generator with a state.

The bits depend on (seed, step, micro step, rank, stream) and the element's index alone, so that dropout and data order
stay paired with a run that does not round stochastically, a resumed run needs no saved generator, and a layer that is
computed again under activation checkpointing rounds exactly as it did the first time.
"""

import torch

from ds_quant.numerics.random import fold_key

SEED_MASK = 2**63 - 1
"""Seeds are sent between ranks as int64."""


class StepKey:
    """The seed, step and rank that all stochastically rounding modules of one model share.

    An engine drives it with :meth:`set`. A model without an engine counts its own training forwards (``advance``).

    Args:
        seed: any integer; its low 63 bits count.
        rank: the data-parallel rank, for what differs between ranks (activations, gradients).
    """

    def __init__(self, seed: int = 0, rank: int = 0):
        self.seed = seed & SEED_MASK
        self.rank = rank
        self.step = 0
        self.micro_step = 0
        self._keys: dict[tuple[bool, torch.device], torch.Tensor] = {}

    def set(self, step: int, micro_step: int = 0) -> None:
        """Name the training step and the micro step within it that the next forward and its backward belong to."""
        if (step, micro_step) != (self.step, self.micro_step):
            self.step, self.micro_step = step, micro_step
            # New tensors, never in-place: a pending backward still holds the keys of its forward.
            self._keys = {}

    def advance(self) -> None:
        """Go to the next step."""
        self.set(self.step + 1)

    def reseed(self, seed: int, rank: int) -> None:
        """Take over seed and rank once they are known, which is when the ranks have met."""
        self.seed, self.rank = seed & SEED_MASK, rank
        self._keys = {}

    def local(self, device: torch.device) -> torch.Tensor:
        """Key for what differs between ranks: activations and gradients. int64, shape (2,)."""
        return self._key(True, device)

    def replicated(self, device: torch.device) -> torch.Tensor:
        """Key for what all ranks hold alike and must round alike: weights. int64, shape (2,)."""
        return self._key(False, device)

    def _key(self, with_rank: bool, device: torch.device) -> torch.Tensor:
        key = self._keys.get((with_rank, device))
        if key is None:
            # Rank 0 of the local keys must not coincide with the replicated one.
            rank = self.rank + 1 if with_rank else 0
            key = fold_key(self.seed, self.step, self.micro_step, rank, device=device)
            self._keys[with_rank, device] = key
        return key


class CountForwards:
    """Forward pre-hook of a model that no engine drives: every training forward is a step of its own."""

    def __init__(self, step_key: StepKey):
        self.step_key = step_key

    def __call__(self, module: torch.nn.Module, args: tuple) -> None:
        if module.training and torch.is_grad_enabled():
            self.step_key.advance()
