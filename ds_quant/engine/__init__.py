"""The seam to DeepSpeed: the only package that names its private attributes.

DeepSpeed's internals move between releases. What this project overrides or reads is listed in `seams.SEAMS` and looked
up when this package is imported, so that a release that moved something is an error that names it, not a setting that
quietly does nothing.
"""

from ds_quant.zero.seams import check_seams, check_version

check_version()
check_seams()

from ds_quant.zero.checkpoints import raise_together  # noqa: E402  (what they import must be there)
from ds_quant.zero.communication import attach_communication  # noqa: E402
from ds_quant.zero.diagnostics import attach_diagnostics, second_moments  # noqa: E402
from ds_quant.zero.initialize import (  # noqa: E402
    accelerator,
    check_model,
    no_step_at_start,
    op_names,
    optimizer_built_by,
    own_initialize,
    strip_tripwire_in_zero_init,
    wrap_initialize,
)
from ds_quant.zero.moments import attach_moments  # noqa: E402
from ds_quant.zero.seams import find_seams  # noqa: E402
from ds_quant.zero.steps import attach_steps  # noqa: E402
from ds_quant.zero.weights import attach_weights  # noqa: E402

__all__ = [
    "accelerator",
    "attach_communication",
    "attach_diagnostics",
    "attach_moments",
    "attach_steps",
    "attach_weights",
    "check_model",
    "check_seams",
    "check_version",
    "find_seams",
    "no_step_at_start",
    "op_names",
    "optimizer_built_by",
    "own_initialize",
    "raise_together",
    "second_moments",
    "strip_tripwire_in_zero_init",
    "wrap_initialize",
]
