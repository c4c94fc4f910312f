"""`ds_quant diagnose formats`: the table, and what it says against a direct computation."""

import argparse
import csv
import runpy

import pytest
import torch
from conftest import ROOT
from evaluate_files import write_model
from safetensors.torch import save_file
from torch import nn

from ds_quant.base.number_formats import FORMATS, WIRE_FORMATS
from ds_quant.cli import diagnose
from ds_quant.cli.diagnosing import common, formats, recorded_tensors
from ds_quant.numerics import rotation
from ds_quant.numerics.integer import fake_quantize


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file({"weight": weight, "bias": torch.ones(3), "ids": torch.ones(2, 2).long()}, folder / "w.safetensors")
    output = folder / "table.csv"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(formats, "ROWS", formats.ROWS // 8)  # the numbers are drawn from a seed
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
    tile = 4 + 8 / 256 + 32 / (formats.ROWS // 8 * formats.FEATURES)
    assert found["nvfp4", "tile of 16 x 16", "Gaussian"]["bits_an_element"] == f"{tile:.4g}"


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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small trained model in full precision."""
    return write_model(tmp_path_factory.mktemp("models") / "run", None)


def arguments(run, *flags):
    text = ("--text_file", str(run.parent / "corpus.jsonl"), "--batch_size", "2", "--batches", "2")
    return ["--checkpoints", str(run), *text, *flags]


def test_what_layers_of_a_checkpoint_multiply(run):
    """The matrices are those taken here, from the same two batches: by layer, and pooled."""
    parser = argparse.ArgumentParser()
    formats.add_arguments(parser)
    (subject,) = common.subjects(parser.parse_args(arguments(run)))
    by_layer, pooled = (recorded_tensors.record(subject, by_layer=apart) for apart in (True, False))
    layers = {name: module for name, module in subject.loaded.model.named_modules() if isinstance(module, nn.Linear)}
    del layers["lm_head"]
    seen = {f"run: {name} weights": [module.weight.detach()] for name, module in layers.items()}

    def keep(name, what, x):
        seen.setdefault(f"run: {name} {what}", []).append(x.detach().reshape(-1, x.shape[-1]))

    for name, module in layers.items():
        module.register_forward_hook(lambda _, args, y, name=name: keep(name, "activations", args[0]))
        module.register_full_backward_hook(lambda _, dx, dy, name=name: keep(name, "gradients", dy[0]))
    for batch in subject.batches:
        subject.loaded.model(**batch).loss.backward()
    assert by_layer.keys() == seen.keys()
    for name, matrices in seen.items():
        assert all(map(torch.equal, by_layer[name], matrices)), name
        assert any(x.count_nonzero() for x in matrices)
    for what in ("weights", "activations", "gradients"):
        together = [x for name, matrices in by_layer.items() if name.endswith(what) for x in matrices]
        assert len(together) == len(pooled[f"run: {what}"]) == len(layers) * (1 if what == "weights" else 2)
        assert all(map(torch.equal, together, pooled[f"run: {what}"]))


def test_a_checkpoint_has_its_rows(run, tmp_path, monkeypatch):
    for name, value in {"ROWS": 4, "FEATURES": 32}.items():
        monkeypatch.setattr(formats, name, value)
    output = tmp_path / "table.csv"
    assert diagnose.main(["formats", *arguments(run, "--draws", "0", "--output", str(output))]) == 0
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["bias_of_stochastic"] for row in rows} == {""}
    recorded = {f"run: {what}" for what in ("weights", "activations", "gradients")}
    assert {row["numbers"] for row in rows} == {"Gaussian", "Student t (3)", *recorded}


def test_gradients_as_messages_have_them(run, tmp_path, monkeypatch):
    """Of all parameters, flat; the error and the bits are those of a computation by hand."""
    for name, value in {"ROWS": 4, "FEATURES": 32}.items():
        monkeypatch.setattr(formats, name, value)
    output = tmp_path / "table.csv"
    flags = arguments(run, "--used_for", "wire", "--draws", "0", "--output", str(output))
    assert diagnose.main(["formats", *flags]) == 0
    with output.open() as file:
        rows = {(row["format"], row["scale"], row["numbers"]): row for row in csv.DictReader(file)}
    parser = argparse.ArgumentParser()
    formats.add_arguments(parser)
    (subject,) = common.subjects(parser.parse_args(arguments(run)))
    flat = []
    for batch in subject.batches:
        subject.loaded.model.zero_grad()
        subject.loaded.model(**batch).loss.backward()
        flat += [p.grad.reshape(-1).clone() for p in subject.loaded.model.parameters() if p.grad is not None]
    lost = [y - fake_quantize(y, 4, granularity="block", block_size=64) for y in flat]
    expected = sum(x.double().square().sum() for x in lost) / sum(y.double().square().sum() for y in flat)
    row = rows["int4", "block of 64", "run: parameter gradients"]
    assert float(row["relative_error"]) == pytest.approx(float(expected) ** 0.5, rel=1e-3)
    turned = [rotation.rotate(y, 64) for y in flat]
    lost = [y - fake_quantize(y, 4, granularity="block", block_size=64) for y in turned]
    expected = sum(x.double().square().sum() for x in lost) / sum(y.double().square().sum() for y in turned)
    row = rows["int4", "block of 64, rotated", "run: parameter gradients"]
    assert float(row["relative_error"]) == pytest.approx(float(expected) ** 0.5, rel=1e-3)
    scales = sum(32 + 8 * -(-y.numel() // 16) for y in flat)
    bits = 4 + scales / sum(y.numel() for y in flat)
    assert rows["nvint4", "block of 16", "run: parameter gradients"]["bits_an_element"] == f"{bits:.4g}"
    assert {name for name, _, _ in rows} >= {"int8", "mxint8", "mxfp8", "fp8_e4m3", "int4", *WIRE_FORMATS}


def test_layers_of_no_checkpoint(capsys):
    assert diagnose.main(["formats", "--by_layer"]) == 2
    assert "--by_layer: got no checkpoint; allowed: beside --checkpoints" in capsys.readouterr().err


def test_the_tables_of_the_pages_are_what_their_script_writes():
    names = runpy.run_path(str(ROOT / "docs" / "formats_table.py"))
    for path, figures in names["PAGES"].items():
        page = path.read_text()
        assert page == names["page"](page, figures), "run python docs/formats_table.py"
