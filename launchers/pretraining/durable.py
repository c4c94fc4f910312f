"""Small files that are replaced whole, and are on the disk when that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_quant.base.whole_folder import write_whole


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file: a reader finds the old one or the new one, after a power cut too. Raises OSError."""
    write_whole(path, json.dumps(content, indent=1) + "\n")
