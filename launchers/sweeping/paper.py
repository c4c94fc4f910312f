"""The paper's experiment matrix as DeepSpeed JSONs, generated from the table in this file.

    python launchers/sweeping/paper.py            write the files; those that match the table do not change

Each row quantizes one component, or the combination at the end of the paper. It becomes `paper/paper_ROW.json`, with
the paper's settings. A component of a linear layer also becomes `ROW.json`, with the product's defaults. All other
settings are those of baseline.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_quant.config import TRIPWIRE
from ds_quant.config.deepspeed_json import TRIPWIRE_VALUE

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"

Section = Mapping[str, Mapping[str, Any]]
"""The JSON objects of the operands of linear layers, or of the moments."""


def _operand(bits: int, granularity: str, **more: Any) -> dict[str, Any]:
    return {"bits": bits, "granularity": granularity, **more}


def _moment(bits: int, granularity: str) -> dict[str, Any]:
    return {"bits": bits, "map": "linear", "granularity": granularity, "rounding": "nearest"}


COMPONENTS: dict[str, Section] = {
    "w8_tensor": {"weight": _operand(8, "tensor")},
    "w8_channel": {"weight": _operand(8, "channel")},
    "w4_tensor": {"weight": _operand(4, "tensor")},
    "w4_channel": {"weight": _operand(4, "channel")},
    "a8_tensor": {"activation": _operand(8, "tensor")},
    "a8_token": {"activation": _operand(8, "token")},
    "a4_tensor": {"activation": _operand(4, "tensor")},
    "a4_token": {"activation": _operand(4, "token")},
    "a4_channel": {"activation": _operand(4, "channel")},
    "a4_token_asymmetric": {"activation": _operand(4, "token", symmetric=False)},
    "g8_tensor": {"gradient": _operand(8, "tensor")},
    "g8_token": {"gradient": _operand(8, "token")},
    "g8_token_input": {"gradient": _operand(8, "token", used_for=["input"])},
    "g4_tensor": {"gradient": _operand(4, "tensor")},
    "g4_token": {"gradient": _operand(4, "token")},
}
COMBINATIONS: dict[str, Section] = {
    "w8a8": {"weight": _operand(8, "channel"), "activation": _operand(8, "token")},
    "w8a8g8": {
        "weight": _operand(8, "channel"),
        "activation": _operand(8, "token"),
        "gradient": _operand(8, "token"),
    },
}
MOMENTS: dict[str, Section] = {
    "m8_tensor": {"exp_avg": _moment(8, "tensor")},
    "m8_channel": {"exp_avg": _moment(8, "channel")},
    "m4_tensor": {"exp_avg": _moment(4, "tensor")},
    "m4_channel": {"exp_avg": _moment(4, "channel")},
    "v8_tensor": {"exp_avg_sq": _moment(8, "tensor")},
    "v8_channel": {"exp_avg_sq": _moment(8, "channel")},
}

OUTCOMES: dict[str, str] = {
    "w8_tensor": "competitive",
    "w8_channel": "slightly better than its baseline",
    "w4_tensor": "unstable, degraded",
    "w4_channel": "unstable, degraded",
    "a8_tensor": "about baseline",
    "a8_token": "about baseline",
    "a4_tensor": "unstable",
    "a4_token": "unstable",
    "a4_channel": "",
    "a4_token_asymmetric": "",
    "g8_tensor": "converges, worse than baseline",
    "g8_token": "converges, worse than baseline",
    "g8_token_input": "converges, worse than baseline",
    "g4_tensor": "fails to converge",
    "g4_token": "fails to converge",
    "w8a8": "about baseline: recommended",
    "w8a8g8": "",
    "m8_tensor": "fine",
    "m8_channel": "fine",
    "m4_tensor": "fine",
    "m4_channel": "fine",
    "v8_tensor": "fails",
    "v8_channel": "fails",
}
"""What the paper found of each row, in a few words; empty where that is not known to us."""

_PRODUCT = {"backend": "simulated", "backward_operands": "quantized"}
_PAPER = {"backend": "simulated", "backward_operands": "original", "exclude": []}


def files(baseline: str) -> dict[str, str]:
    """The text of each file, by its path in ds_configs; `baseline` is the text of baseline.json."""
    found = {}
    for name, row in COMPONENTS.items():
        found[f"{name}.json"] = _text(baseline, "linear", {**_used_for(row, ["weight", "input"]), **_PRODUCT})
    for name, row in (COMPONENTS | COMBINATIONS).items():
        section = {**_used_for(row, ["weight"]), **_PAPER}
        found[f"paper/paper_{name}.json"] = _text(baseline, "linear", section)
    for name, row in MOMENTS.items():
        # A scale per tensor or channel needs whole parameters, which ZeRO splits above stage 0.
        found[f"paper/paper_{name}.json"] = _text(baseline, "optimizer", row, stage=0)
    return found


def _used_for(row: Section, products: list[str]) -> dict[str, Any]:
    """The row; its gradient gets these `used_for` products unless the row has its own."""
    return {
        operand: {**values, "used_for": values.get("used_for", products)} if operand == "gradient" else values
        for operand, values in row.items()
    }


def _text(baseline: str, part: str, section: Mapping[str, Any], *, stage: int | None = None) -> str:
    content = json.loads(baseline)
    zero = {TRIPWIRE: TRIPWIRE_VALUE, **content["zero_optimization"]}
    if stage is not None:
        zero["stage"] = stage
    # Uses the baseline's own text, so that all files have the same layout.
    head, found, _ = baseline.partition('  "zero_optimization"')
    assert found
    assert list(content)[-1] == "zero_optimization"
    changed = f'  "zero_optimization": {_lines(zero, 2)},\n  "ds_quant": {{\n    "{part}": {_lines(section, 4)}\n  }}\n'
    return f"{head}{changed}}}\n"


def _lines(values: Mapping[str, Any], indent: int) -> str:
    """A JSON object with one line per key."""
    inner = ",\n".join(f'{" " * (indent + 2)}"{key}": {json.dumps(value)}' for key, value in values.items())
    return f"{{\n{inner}\n{' ' * indent}}}"


def write(folder: Path = FOLDER) -> None:
    """Write all files into `folder`, next to its baseline.json."""
    (folder / "paper").mkdir(exist_ok=True)
    for name, text in files((folder / "baseline.json").read_text(encoding="utf-8")).items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write()
