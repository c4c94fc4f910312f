"""What Inductor generates for a GPU around an int8 layer: nothing but calls of its kernels, which are counted too."""

import benchmark
import pytest
import torch
from torch import nn
from torch._inductor import graph as inductor_graph
from torch._inductor.fx_passes import joint_graph
from torch._subclasses import fake_tensor

import ds_quant
from benchmarks import generated, internals, recipes
from benchmarks.generated_code import generate
from benchmarks.single_layers import as_in_a_model

triton = pytest.importorskip("triton", reason="the extra dev has triton for Linux on x86_64 only")
BF16 = torch.bfloat16
MOST_LAUNCHES = 8
"""Of a layer, forward and backward, whichever way it rounds."""
FORWARD = ["group_kernel", "group_kernel", "kernel"]
"""X, W and Y."""
BACKWARD = ["group_kernel", "scan_kernel", "tile_kernel", "kernel", "kernel"]
"""W, since compiled code keeps no codes of it; the gradient; dX and dW."""
IN, OUT, TOKENS = 80, 48, 96


@pytest.mark.parametrize("rounding", generated.ROUNDINGS)
@pytest.mark.parametrize("kind", [ds_quant.QuantLinear, ds_quant.QuantConv1D])
def test_a_compiled_layer_has_no_kernels_beside_its_own(kind, rounding):
    """Its launches, and the bytes that go through memory, are those of its operations: no copies, casts or sums.

    Codes of X are Inductor's where they are rounded to nearest.
    """
    section = recipes.w8a8g8("int8", rounding=rounding)
    section["activation"]["rounding"] = rounding
    sizes = (IN, OUT) if kind is ds_quant.QuantLinear else (OUT, IN)
    x = torch.empty(2, TOKENS // 2, IN, dtype=BF16, requires_grad=True)
    forward, backward = generate(as_in_a_model(kind(*sizes, config=section)).to(BF16), x)
    num_fused = int(rounding == "nearest")
    assert (len(forward.kernels), backward.kernels) == (num_fused, [])
    for graph in (forward, backward):
        assert graph.libraries == []
        assert all(name.startswith("ds_quant.") for name in graph.operators)
    assert (forward.operator_launches, backward.operator_launches) == (FORWARD[num_fused:], BACKWARD)
    assert forward.launches + backward.launches <= MOST_LAUNCHES
    x, w, y = TOKENS * IN, IN * OUT, TOKENS * OUT
    # X in two ways, W in one; codes are read and Y is written. G in two ways, W in the other one, and two products.
    matrices = ((2 + 2) * x + (2 + 1) * w + (x + w + 2 * y), (2 + 2) * y + (2 + 1) * w + 2 * y + 3 * w + 3 * x)
    for graph, expected in zip((forward, backward), matrices, strict=True):
        vectors = graph.num_bytes - expected  # scales, biases, keys: each is read or written a few times
        assert 0 < vectors <= 6 * 4 * (TOKENS + IN + OUT)


def test_what_is_fused_and_what_is_not_is_counted():
    """Codes of X are made by the kernel of the norm before them; a product after the layer is a kernel more."""
    x = torch.empty(TOKENS, IN, dtype=BF16, requires_grad=True)
    section = recipes.w8a8g8("int8")
    norm, layer = nn.RMSNorm(IN, dtype=BF16), ds_quant.QuantLinear(IN, OUT, dtype=BF16, config=section)
    forward, backward = generate(lambda x: layer(norm(x)) * 2, x)
    assert forward.operator_launches == FORWARD[1:]
    assert len(forward.kernels) == 2
    assert forward.launches == 4
    assert len(backward.kernels) >= 2
    forward, backward = generate(lambda x: nn.functional.linear(x, layer.weight), x)
    assert (forward.kernels, forward.libraries, forward.operators) == ([], ["mm"], [])
    assert backward.libraries == ["mm", "mm"]
    assert forward.num_bytes == 2 * (TOKENS * IN + IN * OUT + TOKENS * OUT)


FP8_COPIES = {"": ["clone", "ones", "_scaled_mm", "clone", "clone", "ones", "_scaled_mm"]}
FP8_COPIES[", a scale a tensor"] = [name for name in FP8_COPIES[""] if name != "ones"]
"""dX takes turned codes of W, dW those of G and X; where one side's scales are in the other's codes, it has ones."""


@pytest.mark.parametrize(
    ("gradient", "scales"),
    [
        ("e5m2", ""),
        ("e4m3", ", a scale a tensor"),
        pytest.param("e4m3", "", marks=pytest.mark.thorough),
        pytest.param("e5m2", ", a scale a tensor", marks=pytest.mark.thorough),
    ],
)
def test_a_compiled_fp8_layer_copies_no_scales(gradient, scales):
    """Three products by torch, and what turns their operands; vectors are passed as they are."""
    x = torch.empty(2, TOKENS // 2, IN, dtype=BF16, requires_grad=True)
    layer = generated.linear(f"fp8, {gradient} gradient{scales}", IN, OUT)
    forward, backward = generate(layer, x)
    assert (forward.libraries, backward.libraries) == (["_scaled_mm"], FP8_COPIES[scales])
    for graph, num_products in ((forward, 1), (backward, 2)):
        assert graph.operators == ["ds_quant.fp8_matmul"] * num_products
        assert graph.operator_launches == []
    # Codes of X, W and twice of G are Inductor's: one kernel each, but that it shares one among some.
    assert len(forward.kernels) + len(backward.kernels) <= (12 if scales else 7)
    x, w, y = TOKENS * IN, IN * OUT, TOKENS * OUT
    # As for int8, and copies of one way of W, G and X, which are read and written. Sums for the bias read G once more.
    least = (3 * x + 3 * w + (x + w + 2 * y), 6 * y + 2 * y + 3 * w + 3 * x + 2 * w + 2 * (w + y + x))
    # At most one of a graph's operands is read once more than that, or written in two types.
    most = (2 * x, 2 * (w + y))
    if not scales:
        for graph, expected, more in zip((forward, backward), least, most, strict=True):
            assert 0 < graph.num_bytes - expected <= more + 6 * 4 * (TOKENS + IN + OUT)


def test_codes_of_a_norm():
    """Fused, the codes take one launch and half the bytes."""
    (operator,) = generated.norm_to_codes("as an operator", TOKENS, IN)
    (fused,) = generated.norm_to_codes("fused, as layers do", TOKENS, IN)
    assert (len(operator.kernels), operator.operator_launches) == (1, ["group_kernel"])
    assert (len(fused.kernels), fused.operators) == (1, [])
    vectors = 4 * TOKENS + 2 * IN
    assert operator.num_bytes == 8 * TOKENS * IN + vectors
    assert fused.num_bytes == 4 * TOKENS * IN + vectors


@pytest.mark.slow
def test_a_compiled_step_of_adamw_writes_what_it_need_not():
    """At 8 bits weights, gradients, moments and their scales are 16 bytes and more a parameter."""
    (step,) = generated.adamw_step(8, 4096)
    assert len(step.kernels) == 3
    assert step.num_bytes > 2 * 16 * 4096


@pytest.mark.parametrize("option", ["hidden", "tokens"])
def test_sizes_that_are_refused(option, capsys):
    assert benchmark.main(["generated", f"--{option}", "8"]) == 2
    assert f"--{option}: got 8; allowed: 16 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        (inductor_graph, "GraphLowering", "_compile_to_module_lines"),
        (fake_tensor, "", "init_gpu_context"),
        (torch.utils._python_dispatch, "", "_disable_current_modes"),
    ],
)
def test_a_torch_without_what_is_replaced_is_named(module, owner, name, monkeypatch, capsys):
    monkeypatch.delattr(getattr(module, owner) if owner else module, name)
    monkeypatch.setattr(torch, "__version__", "2.99.1")
    assert benchmark.main(["generated", "--hidden", "16", "--tokens", "16"]) == 2
    told = capsys.readouterr().err
    gone = ".".join(filter(None, (module.__name__, owner, name)))
    assert f"generated code: got torch 2.99.1 and triton {triton.__version__} without {gone}; allowed: " in told


def test_a_torch_that_does_otherwise_is_named(monkeypatch, capsys):
    """Of one that was tested, errors are shown as they are."""

    def lazy_init(*_):
        raise TypeError("lazy_init() takes another number of arguments")

    arguments = ["generated", "--hidden", "16", "--tokens", "16"]
    monkeypatch.setattr(joint_graph, "lazy_init", lazy_init)
    monkeypatch.setattr(internals, "TESTED", "2.98")
    assert benchmark.main(arguments) == 2
    told = capsys.readouterr().err
    assert f"generated code: got torch {torch.__version__}" in told
    assert "where it failed: BackendCompilerFailed: " in told
    assert "TypeError: lazy_init() takes another number" in told
    monkeypatch.setattr(internals, "TESTED", ".".join(torch.__version__.split(".")[:2]))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        benchmark.main(arguments)


def test_a_triton_without_its_driver_is_named(monkeypatch, capsys):
    monkeypatch.delattr(triton.runtime.driver, "_active")
    assert benchmark.main(["host", "--parts", "calls", "--rounds", "2"]) == 2
    assert f"triton {triton.__version__} without triton.runtime.driver._active; allowed: " in capsys.readouterr().err


@pytest.mark.slow
def test_tables(capsys):
    assert benchmark.main(["generated", "--hidden", "64", "--tokens", "64"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("int8, stochastic") == 2
    assert printed.count("fp8, e5m2 gradient") == 4
    assert "AdamW step of a parameter of 64x64" in printed
