from __future__ import annotations

import gc
import sys
import types
import weakref

import benchmark
import pytest
import torch
from benchmark_files import PNG, TIMED, read
from torch import nn

from benchmarks import choices, held, linear_contenders, recipes
from benchmarks.linear_contenders import BASE, CEILING, Operands
from ds_quant import QuantLinear
from ds_quant.cli.shared.errors import CommandError

CPU = torch.device("cpu")


# ---- bytes that are held


def test_a_linear_layer_holds_its_input_and_not_its_parameters():
    layer = nn.Linear(32, 64, bias=False)
    x = torch.randn(10, 32, requires_grad=True)
    assert held.held_bytes(layer, lambda: layer(x)) == (10 * 32 * 4, 0, 0)


def test_a_quantized_layer_holds_codes_scales_and_the_codes_of_its_weight():
    section = recipes.w8a8g8("int8")
    layer = QuantLinear(32, 64, bias=False, dtype=torch.bfloat16, config=section)
    x = torch.randn(10, 32, dtype=torch.bfloat16, requires_grad=True)
    found = held.held_bytes(layer, lambda: layer(x))
    assert found.saved == 10 * 32 + 10 * 4
    # And the seed and the step that random bits are drawn from.
    assert 64 * 32 + 64 * 4 <= found.kept <= 64 * 32 + 64 * 4 + 64


def test_a_storage_counts_once_and_whole():
    layer = nn.Identity()
    x = torch.randn(100, requires_grad=True)

    def forward():
        big = layer(x * 2)
        return big[:10] * big[:10].exp()

    # A view of `big`, and its exponential.
    assert held.held_bytes(layer, forward).saved == 100 * 4 + 10 * 4


def test_what_modules_save_is_told_apart():
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 8))
    x = torch.randn(4, 8, requires_grad=True)
    found = held.held_bytes(model, lambda: model(x), [model[0], model[2]])
    # The second linear saves what the sigmoid saves too: once in the whole.
    assert found.saved_within == 4 * (8 + 16) * 4
    assert found.saved == found.saved_within
    assert held.held_bytes(model, lambda: model(x), [model[1]]).saved_within == 4 * 16 * 4
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_what_is_kept_in_attributes_is_found():
    model = nn.Sequential(nn.ReLU())
    model[0].cache = {"a": [types.SimpleNamespace(b=torch.zeros(100))]}
    assert held.held_bytes(model, lambda: None).kept == 400


def test_nothing_is_held_afterwards():
    """Also what saves its own result, as tanh does."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    results = []
    model.register_forward_hook(lambda module, args, result: results.append(weakref.ref(result)))
    assert held.held_bytes(model, lambda: model(torch.randn(4, 8))).saved > 0
    gc.collect()
    assert results[0]() is None


# ---- contenders


@pytest.mark.parametrize("bias", [False, True])
def test_all_layers_compute_the_same(bias):
    operands = Operands.draw(64, 32, 48, bias=bias, device=CPU)
    results = {}
    for contender in linear_contenders.contenders("int8", CPU):
        if contender.needs is None:
            layer = contender.make(operands)
            layer.forward_backward()
            results[contender.name] = (layer.forward().detach(), layer.x.grad, layer.module.weight.grad)
            layer.clear()
            assert layer.x.grad is None
            assert all(parameter.grad is None for parameter in layer.module.parameters())
    exact = results.pop("fp32 nn.Linear")
    assert len(results) == 4
    for name, found in results.items():
        for value, expected in zip(found, exact, strict=True):
            assert torch.dist(value.float(), expected) < 0.03 * expected.norm(), name


def test_the_weights_of_every_call_are_new():
    operands = Operands.draw(32, 16, 24, bias=False, device=CPU)
    layer = next(c for c in linear_contenders.contenders("int8", CPU) if c.name == "ds_quant W8A8G8").make(operands)
    before = layer.forward()
    with torch.no_grad():
        layer.module.weight.data.mul_(2)  # nothing but the step of an optimizer tells
        layer.x.data.mul_(2)
    layer.clear()
    assert torch.allclose(layer.forward().float(), 4 * before.float(), rtol=0.02, atol=0.02)


def test_peers_are_matched_by_what_they_do_in_8_bits():
    """The fastest of the same products counts, ours never do, and those without a peer have no figure."""
    chosen = linear_contenders.contenders("int8", torch.device("cuda"))
    capable = {contender.name: contender.products for contender in chosen}
    assert capable["ds_quant W8A8"] == capable["bitsandbytes int8"] == "Y"
    assert {capable[name] for name in ("ds_quant W8A8G8", "torchao int8, compiled", "Transformer Engine float8")} == {
        "Y dX dW"
    }
    assert capable[BASE] == capable[f"{BASE}, compiled"] == ""
    seconds = {
        BASE: [1.0, 1.0],
        "torchao int8": [4.0, 4.0],
        "torchao int8, compiled": [3.0, 6.0],
        "Transformer Engine float8": [2.0, 3.0],
        "ds_quant W8A8": [8.0, 8.0],
        "ds_quant W8A8G8": [1.0, 1.5],
    }
    assert linear_contenders.matched_speed_ups(seconds, chosen) == {"ds_quant W8A8G8": 2.0}
    seconds["bitsandbytes int8"] = [2.0, 2.0]
    assert linear_contenders.matched_speed_ups(seconds, chosen)["ds_quant W8A8"] == 0.25


def test_competitors_that_are_missing_are_left_out_with_a_line(capsys):
    contender = linear_contenders.Contender("theirs", lambda operands: None, needs="no_such_package")
    base = linear_contenders.Contender(BASE, lambda operands: None)
    assert choices.choose([base, contender], None, BASE) == [base]
    assert capsys.readouterr().out.startswith("left out: theirs, since no_such_package is not installed")


def test_a_competitor_that_fails_is_left_out_and_the_base_is_not(capsys):
    def fail():
        raise RuntimeError("no kernel\nfor this")

    assert not choices.attempt("theirs", BASE, fail)
    assert capsys.readouterr().out == "left out: theirs: RuntimeError: no kernel\n"
    with pytest.raises(CommandError, match=r"bf16 nn.Linear: got RuntimeError: no kernel; allowed: .*; fix that error"):
        choices.attempt(BASE, BASE, fail)


# ---- the subcommand


def test_linear_from_end_to_end(tmp_path, capsys):
    output = tmp_path / "folder" / "linear.csv"
    arguments = ["--shapes", "64x128,128x64", "--tokens", "32", "--rounds", "2", "--warm-up", "0", "--threads", "1"]
    arguments += ["--only", "ds_quant,fp32", "--device", "cpu", "--output", str(output)]
    assert benchmark.main(["linear", *arguments]) == 0
    rows = read(output)
    names = ["fp32 nn.Linear", BASE]
    names += [f"ds_quant {name}" for name in ("W8A8", "W8A8G8", "W8A8G8, stochastic G")] + [CEILING]
    assert [(row["shape"], row["contender"]) for row in rows] == [
        (shape, name) for shape in ("64x128", "128x64") for name in names
    ]
    columns = {"shape", "tokens", "bias", "backend", "contender", "share_of_ceiling", "saved_bytes", "kept_bytes"}
    columns |= {"saved_bytes_per_element", "peak_extra_bytes", "processor", "commit", "torch"}
    columns |= {"products_in_8_bits", "matched_speed_up"}
    for row in rows:
        assert TIMED | columns <= set(row)
        assert float(row["seconds_p50"]) > 0
        assert float(row["ratio_p20"]) <= float(row["ratio_p50"]) <= float(row["ratio_p80"])
        assert float(row["speed_up"]) == pytest.approx(1 / float(row["ratio_p50"]))
        assert row["threads"] == "1"
        is_base, is_ceiling = row["contender"] == BASE, row["contender"] == CEILING
        assert not is_base or row["ratio_p50"] == "1.0"
        assert not is_ceiling or row["share_of_ceiling"] == "1.0"
        per_element = row["saved_bytes_per_element"]
        if is_ceiling:
            assert per_element == ""
        elif row["contender"].startswith("ds_quant"):
            in_features = int(row["shape"].split("x")[0])
            # Codes, a scale for each token, and a key of 16 bytes where rounding is stochastic.
            key = 16 / (32 * in_features) if "stochastic" in row["contender"] else 0
            assert float(per_element) == 1 + 4 / in_features + key
        else:
            assert float(per_element) == (2 if is_base else 4)
    printed = capsys.readouterr().out
    assert "64x128: X [32, in], forward and backward" in printed
    assert output.with_suffix(".png").read_bytes().startswith(PNG)


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--shapes", "8x8", "--tokens", "17", "--rounds", "2", "--only", BASE, "--device", "cpu"]
    assert benchmark.main(["linear", *arguments, "--output", str(tmp_path / "linear.csv")]) == 0
    assert capsys.readouterr().out.count("matplotlib is missing (pip install 'ds_quant[plot]')") == 1
    assert not (tmp_path / "linear.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "--rounds: got 1; allowed: 2 or more"),
        (["--only", "sgd"], "--only: got 'sgd'; allowed: parts of fp32 nn.Linear; bf16 nn.Linear"),
        (["--shapes", "768"], "--shapes: got '768'; allowed: INxOUT (768x3072), multiples of 8"),
        (["--shapes", "768x100"], "--shapes: got '768x100'; allowed: INxOUT"),
        (["--tokens", "16"], "--tokens: got 16; allowed: 17 or more"),
        (["--threads", "0"], "--threads: got 0; allowed: 1 or more"),
        (["--warm-up", "-1"], "--warm-up: got -1; allowed: 0 or more"),
        (["--device", "abacus"], "--device: got 'abacus' ("),
    ],
)
def test_wrong_arguments_end_with_a_line(arguments, message, capsys):
    assert benchmark.main(["linear", *arguments]) == 2
    assert message in capsys.readouterr().err
