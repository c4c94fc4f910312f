"""Whether the files of a checkpoint are there and whole, before anything is loaded from them."""

import os
import zipfile
from collections.abc import Iterable

from ds_quant.errors import ConfigError, problem


def check_files(paths: Iterable[str]) -> None:
    """Raise ConfigError naming each file, as torch.save writes them, that is missing or cut short.

    Only the directory at a file's end is read: a file that was cut lacks it.
    """
    lines = []
    for path in paths:
        if not os.path.isfile(path):
            remedy = (
                "load another tag; if the number of ranks has changed, convert the checkpoint with python -m "
                "deepspeed.checkpoint.ds_to_universal and load it with checkpoint.load_universal"
            )
            lines.append(problem(path, "no such file", "the moments of this rank", remedy))
        elif not zipfile.is_zipfile(path):
            got = f"a file of {os.path.getsize(path)} bytes that ends too early or is none of torch.save's"
            lines.append(problem(path, got, "a whole file", "load another tag, or copy the checkpoint again"))
    if lines:
        raise ConfigError("\n".join(lines))
