"""Sharpness or outliers: what each change leaves as it is, and what it does not."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.study_results import ROWS, a_result
from scipy import stats
from studying import isolation, plan, results
from studying.arms import ARMS, CLIP, clipped, rescale, rotated, spread, train_on
from studying.isolation import Measured, measures
from studying.plan import Key, Settings
from studying.products import Outliers, Rounded, products
from transformers import LlamaConfig, LlamaForCausalLM

from ds_quant.cli.shared.errors import CommandError
from ds_quant.linear.convert import convert

GROUP = ("0.7m", "llama", 1.0, 0.002)


def a_model() -> Any:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As wide as trained ones: a model that says nothing has no gap.
            parameter.mul_(1 + torch.rand_like(parameter)) if "norm" in name else parameter.mul_(4)
    return model.eval()


def some_text(count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 96, (count, 2, 17))]


@pytest.mark.parametrize("row", list(isolation.QUANTIZERS))
def test_quantizers_are_those_of_the_papers_rows(row: str) -> None:
    model, (batch,) = a_model(), some_text(1)
    other = copy.deepcopy(model)
    names = convert(other, json.loads(ROWS[row].config)["ds_quant"]["linear"])
    operand, granularity = isolation.QUANTIZERS[row]
    assert set(names) == {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    with torch.no_grad():
        plain = model(**batch).logits
        with products(model, rounded=Rounded(operand, granularity)):
            found = model(**batch).logits
            # Layer by layer: in a model, one sum in another order may take a value of the next layer to another code.
            for name in names:
                x = torch.randn(2, 5, model.get_submodule(name).in_features)
                one, expected = model.get_submodule(name)(x), other.get_submodule(name)(x)
                # The same codes; their products are summed in another order: fp32, and up to 80 of them.
                assert torch.allclose(one, expected, rtol=0, atol=80 * 2**-23 * float(expected.abs().max())), name
        after = model(**batch).logits
    assert float((found - plain).abs().max()) > 1e-2 * float(plain.abs().max()), "they do something"
    assert torch.equal(after, plain), "and end"


def test_the_same_function_with_other_outliers_or_another_sharpness() -> None:
    model, text = a_model(), some_text()
    before = measures(model, "trained", text)
    for name, change in (
        ("spread_a", lambda one: spread(one, 8.0)),
        ("spread_w", lambda one: spread(one, 0.125)),
        ("rescaled", lambda one: rescale(one, 8.0)),
    ):
        other = copy.deepcopy(model)
        change(other)
        after = measures(other, name, text)
        assert after["loss"] == before["loss"], "powers of two round nothing"
        if name == "rescaled":
            assert {key: after[key] for key in isolation.QUANTIZERS} == {k: before[k] for k in isolation.QUANTIZERS}
            assert after["sharpness"] > before["sharpness"]
            # Peaks and kurtoses have no unit. Only their sums are rounded: of some thousand elements in fp32.
            for key in ("weight_peak", "weight_kurtosis", "activation_peak", "activation_kurtosis"):
                assert after[key] == pytest.approx(before[key], rel=1e-4)
        else:
            part = "activation" if name == "spread_a" else "weight"
            assert after[f"{part}_peak"] > before[f"{part}_peak"]
            assert after[f"{part}_kurtosis"] > before[f"{part}_kurtosis"]


def test_rotation_leaves_the_loss_and_its_derivatives() -> None:
    model, text = a_model(), some_text()
    spread(model, 8.0)
    before, after = measures(model, "trained", text), measures(model, "rotated", text)
    # To the rounding of fp32; a difference of two losses loses digits.
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert after["sharpness"] == pytest.approx(before["sharpness"], abs=1e-4 * before["loss"])
    assert after["activation_kurtosis"] < before["activation_kurtosis"]
    assert after["activation_peak"] < before["activation_peak"]
    x, weight = torch.randn(3, 5, 80), torch.randn(7, 80)
    one, other = rotated(x, weight)
    assert one.shape == x.shape
    assert torch.allclose(one @ other.T, x @ weight.T, atol=1e-4)
    assert not torch.allclose(one, x, atol=0.1)


def test_clipping_cuts_what_stands_out() -> None:
    x = torch.randn(4, 6, 200)
    x[0, 0] = 0
    x[1, 2, 3] = 1000
    one, _ = clipped(x, x[0])
    limit = CLIP * x.square().mean(-1, keepdim=True).sqrt()
    assert torch.equal(one, x.clamp(-limit, limit))
    assert one[1, 2, 3] < 1000
    assert torch.equal(one[1, 2, :3], x[1, 2, :3])


def stepped(model: Any, text: list[dict[str, torch.Tensor]], rho: float) -> torch.Tensor:
    """The definition of SAM with AdamW: all parameters after it."""
    expected = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0)
    for batch in text:
        moved = copy.deepcopy(expected)
        moved(**batch).loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in moved.parameters()))
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(parameter.grad, alpha=rho / norm)
        moved.zero_grad()
        moved(**batch).loss.backward()
        for parameter, other in zip(expected.parameters(), moved.parameters(), strict=True):
            parameter.grad = other.grad
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(expected.parameters()).detach()


def test_steps_up_the_gradient_are_those_of_their_definition() -> None:
    model, text = a_model(), some_text(2)
    expected = {rho: stepped(model, text, rho) for rho in (0.0, 0.3)}
    apart = float((expected[0.3] - expected[0.0]).norm())
    for rho in expected:
        found = copy.deepcopy(model)
        train_on(found, text, 1e-3, rho=rho)
        # AdamW makes a step of an element whose gradient is but rounding, so that single ones may differ.
        off = float((torch.nn.utils.parameters_to_vector(found.parameters()).detach() - expected[rho]).norm())
        assert off < 0.1 * apart, rho


def test_outliers_are_peaks_and_kurtoses() -> None:
    found, parts = Outliers(), [torch.randn(3, 7, 11), torch.rand(2, 9)]
    parts[0][0, 0] = 0  # has no peak
    for part in parts:
        found.see(part)
    rows = [part.flatten(0, -2) for part in parts]
    peaks = [torch.stack([r.abs().max() / r.square().mean().sqrt() for r in part if r.any()]).mean() for part in rows]
    assert found.peak == pytest.approx(float(sum(peaks) / 2), rel=1e-5)
    kurtoses = [float(stats.kurtosis(part.double().flatten(), fisher=False)) for part in parts]
    assert found.kurtosis == pytest.approx(sum(kurtoses) / 2, rel=1e-5)


def measured(arm: str, seed: int, **changes: Any) -> Measured:
    names = ("loss", *isolation.QUANTIZERS, *isolation.MEASURES)
    values: dict[str, Any] = {**dict.fromkeys(names, 5.0), "sharpness": 0.5, **changes}
    told = {"text": "a text", "processor": "p", "commit": "c", "date": "2026-11-29"}
    key = Key(*GROUP[:3], GROUP[3], "baseline", seed)
    return Measured(key=key, arm=arm, fingerprint=isolation.fingerprint(), **{**told, **values})


def test_a_table_of_means_and_of_paired_changes(tmp_path: Path) -> None:
    found = [measured("trained", seed, a4_token=5.2 + 0.01 * seed) for seed in range(3)]
    found += [measured("rotated", seed, a4_token=5.1 + 0.01 * seed, sharpness=0.25) for seed in range(2)]
    found += [measured("flattened", 0, a4_token=9.0)]  # without `continued` it is held against nothing
    found += [measured("rotated", 2, text="another"), measured("clipped", 0, loss=math.nan)]
    known = {(one.key, one.arm): one for one in found}
    lines = isolation.table(known, GROUP, "a text")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    trained, changed = next(c for c in cells if c[0] == "trained"), [c for c in cells if c[1] == "trained"]
    assert trained[2] == "3"
    assert trained[-1] == "+0.2100"
    assert [c[0] for c in changed] == ["clipped", "rotated"]
    assert changed[1][2:4] == ["2", "0.50"]
    assert changed[1][-1] == "-0.1000 (-0.1000 to -0.1000)"
    assert isolation.table(known, (*GROUP[:3], 0.004), "a text") == []
    assert isolation.table(known, GROUP, "no text") == []
    path = tmp_path / "isolation.csv"
    isolation.write(path, known.values())
    assert {repr(one) for one in isolation.read(path).values()} == {repr(one) for one in known.values()}


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "text", "a text")
    settings, csv = Settings(tmp_path, tmp_path), tmp_path / "runs.csv"
    key = a_result("baseline", 0, 5.0).key
    lines = [{**vars(key), **vars(measured(arm, 0))} for arm in ARMS]
    results.write_lines(isolation.path(csv), isolation.COLUMNS, lines)
    assert isolation.measure([key, key], ROWS, settings, csv) == 1
    results.write_lines(isolation.path(csv), isolation.COLUMNS, lines[1:])
    folder = plan.folder(key, ROWS["baseline"], settings)
    with pytest.raises(CommandError, match=f"got no {folder}"):
        isolation.measure([key], ROWS, settings, csv)
    with pytest.raises(CommandError, match="--families: got gpt2"):
        isolation.measure([Key("0.7m", "gpt2", 1.0, 0.002, "baseline", 0)], ROWS, settings, csv)
