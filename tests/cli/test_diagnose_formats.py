"""`ds_quant diagnose formats`: the table, and what it says against a direct computation."""

import csv

import pytest
import torch
from safetensors.torch import save_file

from ds_quant.base.number_formats import FORMATS
from ds_quant.cli import diagnose
from ds_quant.numerics.integer import fake_quantize


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file({"weight": weight, "bias": torch.ones(3), "ids": torch.ones(2, 2).long()}, folder / "w.safetensors")
    output = folder / "table.csv"
    assert diagnose.main(["formats", "--tensors", str(folder / "w.safetensors"), "--output", str(output)]) == 0
    with output.open() as file:
        found = list(csv.DictReader(file))
    return weight.float(), {(row["format"], row["scale"], row["numbers"]): row for row in found}


def error(rows, *key):
    return float(rows[1][key]["relative_error"])


def test_every_format_on_all_numbers(rows):
    assert {name for name, _, _ in rows[1]} == {*FORMATS, "int8", "int4"}
    assert {numbers for _, _, numbers in rows[1]} == {"Gaussian", "Student t (3)", "w.safetensors"}


def test_errors_and_bits(rows):
    weight, found = rows
    direct = (fake_quantize(weight, 4, granularity="row") - weight).norm() / weight.norm()
    row = found["int4", "row", "w.safetensors"]
    assert float(row["relative_error"]) == pytest.approx(float(direct), rel=1e-3)
    assert float(row["bits_an_element"]) == 4 + 32 / 64
    assert found["mxfp8", "block of 32 (up)", "Gaussian"]["bits_an_element"] == "8.25"
    assert found["nvfp4", "tile of 16 x 16", "Gaussian"]["bits_an_element"] == "4.031"


def test_integers_against_floating_point(rows):
    """What arXiv 2510.25602 finds, and where a heavy tail turns it round."""
    for numbers in ("Gaussian", "Student t (3)"):
        assert error(rows, "mxint8", "block of 32 (floor)", numbers) < error(
            rows, "mxfp8", "block of 32 (floor)", numbers
        )
    assert error(rows, "nvint4", "block of 16", "Gaussian") < error(rows, "nvfp4", "block of 16", "Gaussian")
    assert error(rows, "nvint4", "block of 16", "Student t (3)") > error(rows, "nvfp4", "block of 16", "Student t (3)")


def test_what_saturates_biases_stochastic_rounding(rows):
    found = [rows[1]["mxfp8", f"block of 32 ({rule})", "Gaussian"] for rule in ("floor", "up")]
    floor, up = (float(row["bias_of_stochastic"]) for row in found)
    assert floor > 1.3 * up


def test_files_that_cannot_be_measured(tmp_path, capsys):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    assert diagnose.main(["formats", "--tensors", str(tmp_path / "broken.safetensors")]) == 2
    assert "no readable safetensors file" in capsys.readouterr().err
    save_file({"bias": torch.ones(3)}, tmp_path / "bias.safetensors")
    assert diagnose.main(["formats", "--tensors", str(tmp_path / "bias.safetensors")]) == 2
    assert "without a matrix" in capsys.readouterr().err
