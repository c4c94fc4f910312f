"""Pictures of every kind, and sentences with the numbers that are in them."""

import builtins
import io
import math

import pytest
import torch
from small_models import batch, converted, llama

from ds_quant.base.errors import ConfigError
from ds_quant.diagnostics import figures
from ds_quant.diagnostics.gradient_error import GradientErrorRecorder
from ds_quant.diagnostics.gradient_norms import GradientNormRecorder, norm_history
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.landscape import landscape
from ds_quant.diagnostics.measurement import KINDS, Measurement
from ds_quant.diagnostics.moments import MomentRecorder
from ds_quant.diagnostics.oscillation import OscillationRecorder
from ds_quant.diagnostics.outliers import OutlierRecorder
from ds_quant.diagnostics.quantization_error import QuantizationErrorRecorder
from ds_quant.diagnostics.sharpness import sharpness


@pytest.fixture(scope="module")
def measured():
    """Three looks of every kind at a model that changes in between; an outlier channel in the first layer's input."""
    model = converted(llama(), {"weight": {"bits": 4}, "activation": {"bits": 8}, "gradient": {"bits": 4}}).eval()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 60.0
    classes = (OutlierRecorder, QuantizationErrorRecorder, GradientErrorRecorder, GradientNormRecorder)
    recorders = [*(cls() for cls in classes), OscillationRecorder()]
    found = {kind: [] for kind in KINDS}
    for step in (100, 200, 300):
        with attach(model, recorders):
            model(**batch()).loss.backward()
        for recorder in recorders:
            found[recorder.kind].append(recorder.result(step))
            recorder.reset()
        moments = MomentRecorder()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                moments.observe(name, parameter.grad.square())
                parameter.sub_(0.01 * parameter.grad.sign())
        model.zero_grad()
        found["moments"].append(moments.result(step))
        found["sharpness"].append(sharpness(model, [batch(), batch()], step=step))
        found["landscape"].append(landscape(model, [batch()], points=3, step=step))
    found["landscape"].append(landscape(model, [batch()], dimensions=2, points=3, step=300))
    norms = [1.0] * 9 + [5.0]
    found["gradient_norms"].append(norm_history(range(10), norms))
    return found


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_pictures_with_something_in_them(measured, kind, count):
    looks = measured[kind][-count:]
    drawn = figures.draw(kind, looks)
    assert drawn
    for figure, sentence in drawn:
        marks = sum(len(axis.lines) + len(axis.patches) + len(axis.collections) for axis in figure.axes)
        assert marks > 0
        assert all(axis.get_xlabel() or axis.get_ylabel() for axis in figure.axes)
        assert sentence.endswith(".")
        assert "nan" not in sentence
        svg = io.BytesIO()
        figure.savefig(svg, format="svg")
        assert len(svg.getvalue()) > 3000
        assert figures.png(figure).startswith(b"\x89PNG")
    assert figures.explain(kind, looks) == [sentence for _, sentence in drawn]


def test_kinds_with_several_shapes_have_a_picture_each(measured):
    assert len(figures.draw("landscape", measured["landscape"])) == 2
    assert len(figures.draw("gradient_norms", measured["gradient_norms"])) == 2
    first = MomentRecorder("exp_avg", [{"bits": 8}])
    first.observe("a", torch.randn(100))
    assert len(figures.draw("moments", [*measured["moments"], first.result(300)])) == 2


def test_sentences_have_the_numbers(measured):
    (outliers,) = figures.explain("outliers", measured["outliers"])
    last = measured["outliers"][-1]
    count, share = int(last.scalars["outlier_channels"]), last.scalars["outlier_share"]
    assert count == 3  # channel 5 of q, k and v
    assert f"3 input channels ({share:.2%}) in 3 of 15 layers exceed mean + 6 std at step 300" in outliers
    assert f"{last.scalars['largest_over_mean']:.1f} times" in outliers
    assert "over 3 looks 100.0% of the outlier channels stay so" in outliers
    (sharp,) = figures.explain("sharpness", measured["sharpness"])
    values = [found.scalars["sharpness"] for found in measured["sharpness"]]
    steepest = ("step 100", "step 200", "step 300")[values.index(max(values))]
    assert f"{steepest} ({max(values):.4f}) is the sharpest" in sharp
    assert f"by {values[-1]:.4f} nats" in sharp
    (history,) = figures.explain("gradient_norms", measured["gradient_norms"][-1:])
    assert (
        history == "1 of 10 gradient norms exceed 3 times the median of those before them; the largest is 5 at step 9."
    )
    line, plane = figures.explain("landscape", measured["landscape"])
    assert "step 300: from" in line
    assert "along a plane" in plane
    (error,) = figures.explain("gradient_error", measured["gradient_error"])
    worst = max(measured["gradient_error"][-1].rows, key=lambda row: row["relative_l2"])
    assert f"the worst layer is {worst['layer']} with {worst['relative_l2']:.3g}" in error
    (moments,) = figures.explain("moments", measured["moments"])
    lost = measured["moments"][-1].scalars["becomes_zero/8-bit linear per tensor"]
    assert lost > 0.1
    assert f"{lost:.1%} with 8-bit linear per tensor" in moments
    (oscillation,) = figures.explain("oscillation", measured["oscillation"])
    assert "of the codes have changed since the look before at step 300" in oscillation
    (quantization,) = figures.explain("quantization_error", measured["quantization_error"])
    assert f"({measured['quantization_error'][-1].scalars['weight_snr_db']:.1f} dB)" in quantization


def test_a_first_look_at_codes_says_that_it_takes_a_second(measured):
    (text,) = figures.explain("oscillation", measured["oscillation"][:1])
    assert "takes a second look" in text


def test_no_outlier_is_said_so():
    found = Measurement("outliers", 1, {"outlier_channels": 0.0, "outlier_share": 0.0, "layers_with_outliers": 0.0},
        [{"layer": "a", "channels": 9, "outliers": 0, "indices": "", "mean": 0.0, "largest": 0.0,
          "largest_over_mean": None, "threshold": 0.0}], {"num_std": 6.0})  # fmt: skip
    assert figures.explain("outliers", [found]) == ["No input channel of 1 layers exceeds mean + 6 std at step 1."]
    assert figures.draw("outliers", [found])


def test_values_that_are_not_finite_can_be_drawn():
    rows = [{"layer": f"l{n}", "quantized": "", "cosine": math.nan, "relative_l2": value, "relative_l1": math.nan,
             "norm_ratio": math.nan} for n, value in enumerate([math.nan, math.inf])]  # fmt: skip
    scalars = dict.fromkeys(("cosine", "relative_l2"), math.nan)
    ((figure, _),) = figures.draw("gradient_error", [Measurement("gradient_error", 1, scalars, rows)])
    assert figures.png(figure)


def test_deep_models_are_drawn_as_lines():
    rows = [{"layer": f"model.layers.{n}.q", "operand": "weight", "bits": 8, "relative_l2": 0.1, "snr_db": 20.0 + n,
             "max_error": 0.1, "becomes_zero": 0.0, "at_ends": 0.0} for n in range(200)]  # fmt: skip
    scalars = {"weight_relative_l2": 0.1, "weight_snr_db": 20.0}
    ((figure, _),) = figures.draw("quantization_error", [Measurement("quantization_error", 1, scalars, rows)])
    assert [len(line.get_ydata()) for line in figure.axes[0].lines] == [200]


def test_names_lose_what_nearly_all_begin_with():
    names = [f"model.layers.{n}.q_proj" for n in range(9)]
    assert figures._short([*names, "lm_head"]) == [*(f"{n}.q_proj" for n in range(9)), "lm_head"]
    assert figures._short(["0", "lm_head"]) == ["0", "lm_head"]
    assert figures._short(["first"]) == ["first"]


def test_other_kinds_are_refused(measured):
    with pytest.raises(ConfigError, match="each kind by itself"):
        figures.draw("moments", measured["outliers"])


def test_without_matplotlib_the_package_to_install_is_named(measured, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'ds_quant\[plot\]'"):
        figures.draw("outliers", measured["outliers"])
    assert figures.explain("outliers", measured["outliers"])
