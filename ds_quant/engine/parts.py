"""What one part of the section does in a live engine: the moments in which the engine calls it.

A part overrides the hooks that it needs. `quant_engine` says in which order the parts of an engine are called.
"""

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum


@dataclass
class Loading:
    """The arguments of a call of `load_checkpoint`, as its parts see them."""

    load_dir: str
    tag: str | None
    load_optimizer_states: bool
    load_module_only: bool
    during: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Holds what a part changes for as long as DeepSpeed loads."""

    @property
    def with_moments(self) -> bool:
        return self.load_optimizer_states and not self.load_module_only


class Part:
    """A part of one engine, which does nothing yet. All ranks have the same parts and call their hooks together."""

    unpinned: Sequence[OffloadStateTypeEnum] = ()
    """States that `offload_states` must not put into pinned memory."""

    def __init__(self, engine: Any) -> None:
        self.engine: Any = weakref.proxy(engine)

    def before_forward(self, *, trains: bool) -> None:
        """A forward begins; it `trains` where a backward may follow."""

    def after_forward(self, *, trains: bool, failed: bool) -> None:
        """The forward is over, or has `failed`, if only because a part raised before it."""

    def after_backward(self) -> None:
        """A backward is over, its gradients added up or reduced."""

    def after_step(self, *, is_whole: bool) -> None:
        """`engine.step` is over. Where it `is_whole`, an optimizer step was taken or skipped."""

    def after_writing(self) -> None:
        """Weights may have been written: by a step or by loading, also by one that raised."""

    def before_reading(self) -> None:
        """All ranks are about to read the weights, together; nothing that fails on one rank alone comes in between."""

    def before_save(self, folder: Path) -> None:
        """A checkpoint is about to be written into `folder`, which may not exist yet. An error reaches all ranks."""

    def before_load(self, loading: Loading) -> None:
        """A checkpoint is about to be loaded; nothing has changed yet."""

    def after_load(self, loading: Loading, path: str | None) -> None:
        """DeepSpeed has loaded the checkpoint file `path`, or found none."""

    def before_compile(self) -> None:
        """`engine.compile` was called."""

    def before_offload(self, states: Sequence[OffloadStateTypeEnum]) -> None:
        """`offload_states` is about to move `states`."""

    def after_reload(self) -> None:
        """`reload_states` has moved states back."""
