"""Recognizes errors of a full disk."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file grew too large"}


def problem(error: BaseException, folder: Path) -> str | None:
    """A message on why nothing more can be written below `folder`; None if `error` has another cause."""
    free = shutil.disk_usage(folder).free
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return f"{_FULL[cause.errno]} ({free >> 20} MiB free)"
        cause = cause.__cause__ or cause.__context__
    # The writers of torch and safetensors raise their own errors, without an errno.
    text = str(error).lower()
    if "no space left" in text or "os error 28" in text:
        return f"{_FULL[errno.ENOSPC]} ({free >> 20} MiB free)"
    if "quota exceeded" in text or "os error 122" in text:
        return f"{_FULL[errno.EDQUOT]} ({free >> 20} MiB free)"
    if ("pytorchstreamwriter" in text or "unexpected pos" in text or "inline_container" in text) and free < 1 << 20:
        return f"{_FULL[errno.ENOSPC]} ({free >> 20} MiB free)"
    return None
