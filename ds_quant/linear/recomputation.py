"""Activation checkpointing computes a part of a forward again: it is to draw the random bits that it drew then.

By then other forwards may have begun, and a layer that is called several times in one forward is called out of order.
So the function that is computed again goes back to where the StepKeys stood when it ran first, as checkpointing itself
goes back to the generators' states. What is extended is the place where both of torch's ways keep that function.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint

from ds_quant.linear.step_key import step_keys

_GENERATORS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
"""Of torch from 2.14 on, where the second one is left to old callers and calls the first, and of those before."""
_COMPOSABLE = "torch.distributed._composable.checkpoint_activation"
"""Takes the generator over by name when it is imported."""


class Again:
    """A function that is called to compute something again; made before it is computed first."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._moments = [(step_key, step_key.moment()._replace(recomputes=True)) for step_key in step_keys()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = [(step_key, step_key.moment()) for step_key, _ in self._moments]
        for step_key, moment in self._moments:
            step_key.go_to(moment)
        try:
            return self._function(*args, **kwargs)
        finally:
            for step_key, moment in before:
                step_key.go_to(moment)


@functools.cache
def follow() -> None:
    """From now on in this process torch's activation checkpointing draws the bits of its forward.

    Raises:
        ImportError: this version of torch keeps its functions elsewhere.
    """
    follow_reentrant(checkpoint.CheckpointFunction)
    name = next((name for name in _GENERATORS if hasattr(checkpoint, name)), None)
    if name is None:
        raise ImportError(f"ds_quant: torch.utils.checkpoint has no {_GENERATORS[-1]}; fix: install a supported torch")
    original = getattr(checkpoint, name)

    @functools.wraps(original)
    def generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(Again(fn), *args, **kwargs)

    for module in (checkpoint, sys.modules.get(_COMPOSABLE)):
        if getattr(module, name, None) is original:
            setattr(module, name, generator)


@functools.cache
def follow_reentrant(function_class: Any) -> None:
    """The same for a CheckpointFunction that keeps what it computes again in `ctx.run_function`."""
    original = function_class.forward

    @functools.wraps(original)
    def forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        again = Again(run_function)
        result = original(ctx, run_function, *args)
        ctx.run_function = again
        return result

    function_class.forward = staticmethod(forward)
