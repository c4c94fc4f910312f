"""Text to train on that is made here."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ["def", "return", "self", "value", "if", "else", "for", "in", "range", "print", "import", "None", "yield"]


def write_corpus(path: Path) -> Path:
    """Forty documents of Python-like text, as .jsonl."""
    lines = []
    for number in range(40):
        code = "".join(
            f"{' ' * 4 * (line % 3)}{WORDS[(number + line) % 13]} {WORDS[(number * line) % 13]}_{line % 7}:\n"
            f"\t# {number}\n"
            for line in range(40)
        )
        lines.append(json.dumps({"text": code, "number": number}))
    path.write_text("\n".join(lines))
    return path
