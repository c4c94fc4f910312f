"""What the tests of the section share: loading it, and the parts of a message."""

from pathlib import Path

import pytest

from ds_quant.config import ConfigError, QuantConfig

W8 = {"weight": {"bits": 8}}
LINEAR = "ds_quant.linear"


def load(section):
    return QuantConfig.load({"train_batch_size": 1, "ds_quant": section})


def errors(section) -> str:
    with pytest.raises(ConfigError) as caught:
        load(section)
    return str(caught.value)


def check_parts(line: str, where: str, got: str, allowed: str, fix: str) -> None:
    assert line.startswith(f"{where}: got {got}; allowed: "), line
    rest = line.split("; allowed: ", 1)[1]
    assert allowed in rest.split("; fix: ")[0], line
    assert fix in rest.split("; fix: ")[1], line


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
