"""Inside DeepSpeed's engine: the only package that names its private attributes.

Begin with `entry` (initialize, enable), which calls `preparation` before DeepSpeed makes an engine and `attachment`
after. DeepSpeed's internals move between releases: what is overridden or read is listed in `seams.SEAMS` and looked up
when this package is imported, so that a release that moved something is an error that names it, not a setting that
quietly does nothing. Only the job that `ds_quant diagnose memory` starts imports deepspeed beside this package.
"""

from ds_quant.engine.seams import check_seams, check_version, find_seams

check_version()
check_seams()

from ds_quant.engine.entry import disable, enable, initialize, was_called  # noqa: E402  (needs the seams)
from ds_quant.engine.patches import accelerator, op_names  # noqa: E402

__all__ = [
    "accelerator",
    "check_seams",
    "check_version",
    "disable",
    "enable",
    "find_seams",
    "initialize",
    "op_names",
    "was_called",
]
