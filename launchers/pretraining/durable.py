"""Small files that are replaced whole, and are on the disk when that is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ds_quant.whole_folder import sync


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file: a reader finds the old one or the new one, after a power cut too. Raises OSError."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)
