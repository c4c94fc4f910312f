"""The three products of a quantized linear by their definition in linear/recipe.py, in float64, with error bounds."""

import math

import numpy as np
import torch
from numerics import format_oracle, oracle

import ds_quant
from ds_quant.base.number_formats import FORMATS
from ds_quant.linear.convert import step_key_of
from ds_quant.numerics.rotation import rotate_rows

TOKENS, IN, OUT = 11, 37, 19
IN_8_BITS = {
    **dict.fromkeys(("fp6_e2m3", "fp6_e3m2", "fp4_e2m1"), "fp8_e4m3"),
    **dict.fromkeys(("mxfp6", "mxfp4", "nvfp4"), "mxfp8"),
    "nvint4": "mxint8",
}
W8A8G8_INT8 = {
    "weight": {"bits": 8},
    "activation": {"bits": 8},
    "gradient": {"bits": 8, "rounding": "stochastic"},
    "backend": "int8",
}


class Side:
    """One operand of a product as a matrix [free, contracted]: values in float64, and whether its scale may wait."""

    def __init__(self, steps, scale, contracted_scale, is_plain=False):
        self.steps, self.scale, self.contracted_scale, self.is_plain = steps, scale, contracted_scale, is_plain

    @classmethod
    def plain(cls, x):
        return cls(x.double(), torch.ones((), dtype=torch.float64), False, is_plain=True)

    @classmethod
    def quantized(cls, x, config, granularity, *, transposed=False):
        """Quantize x [rows, features]; contracted over the features, or over the rows if transposed."""
        block = config.get("block_size", 128)
        array = x.float().numpy()
        if "format" in config:
            rows, rule = config.get("block_rows", 1), config.get("scale_rule", "floor")
            steps, scales = (
                torch.from_numpy(found).double()
                for found in format_oracle.quantize(
                    array, config["format"], granularity=granularity, block_size=block, rows=rows, rule=rule
                )
            )
            contracted = granularity == "block" or granularity == ("column" if not transposed else "row")
            if granularity == "tensor":
                scales = scales[:1, :1]
            if granularity == "row":
                scales = scales[:, :1]
            elif granularity == "column":
                scales = scales[:1]
            return cls(steps.t(), scales.t(), contracted) if transposed else cls(steps, scales, contracted)
        codes, scale, zero = oracle.quantize(
            array,
            config["bits"],
            granularity=granularity,
            block_size=block,
            symmetric=config.get("symmetric", True),
            full_range=config.get("range") == "full",
        )
        zeros = oracle.expand(zero, array.shape, granularity, block)
        scales = torch.from_numpy(oracle.expand(scale, array.shape, granularity, block)).double()
        steps = torch.from_numpy(codes.astype(np.float32) - zeros).double()
        contracted = granularity == "block" or granularity == ("column" if not transposed else "row")
        return cls(steps.t(), scales.t(), contracted) if transposed else cls(steps, scales, contracted)

    @classmethod
    def with_outliers(cls, x, config, granularity, *, transposed=False):
        """As `quantized`, with the features of the largest magnitudes apart, in 8 bits."""
        config = dict(config)
        kept = math.ceil(round(config.pop("outlier_share") * x.shape[1], 9))
        largest = x.float().abs().amax(0).tolist()
        channels = sorted(sorted(range(x.shape[1]), key=lambda j: (-largest[j], j))[:kept])
        eight = {**config, "bits": 8}
        if "format" in config:
            eight = {**config, "format": IN_8_BITS[config["format"]]}
            if config.get("scale_rule") == "four_six":
                del eight["scale_rule"]
        rest = x.clone()
        rest[:, channels] = 0
        values = cls.quantized(rest, config, granularity).values().expand(x.shape).clone()
        values[:, channels] = cls.quantized(x[:, channels], eight, granularity).values()
        return cls(values.t() if transposed else values, torch.ones((), dtype=torch.float64), True)

    def values(self):
        return self.steps * self.scale


def _of_rows(scale):
    """Of each row, where it does not vary along the row."""
    return scale if scale.dim() == 0 else scale[:, :1]


def product(a, b, dtype, bias=None, *, integer=False):
    """(float64 result of a b^T + bias, bound of the rounding error that an fp32 accumulation to dtype may make).

    With `integer` two quantized operands are multiplied without any error, and a lone one is dequantized.
    """
    left, right = a.values(), b.values()
    operands_round = a.contracted_scale or b.contracted_scale
    if integer and not (a.is_plain or b.is_plain):
        assert not operands_round
        # Whole numbers first: they are exact, whereas sums of rounded values need not cancel.
        sums = (a.steps @ b.steps.t()) * _of_rows(a.scale) * _of_rows(b.scale).t()
        exact = sums
        if bias is not None:
            exact = exact + bias.double()
        # The sum to fp32, two scales and a bias; then one rounding to dtype.
        bound = 3 * 2.0**-24 * sums.abs() * (1 + 2.0**-20) + 2.0**-24 * exact.abs() * (1 + 2.0**-20)
        unit = torch.finfo(dtype).eps / 2 * (1 + 2.0**-20)
        return exact, bound + unit * (exact.abs() + bound) + torch.finfo(torch.float32).tiny
    operands_round = operands_round or (integer and a.is_plain != b.is_plain)
    if operands_round:
        # Each was rounded to the model's dtype once, from a product that was fp32.
        left, right = left.float().to(dtype).double(), right.float().to(dtype).double()
    exact = left @ right.t()
    magnitude = left.abs() @ right.abs().t()
    if bias is not None:
        exact = exact + bias.double()
        magnitude = magnitude + bias.double().abs()
    # Accumulating K terms in fp32, two scales and a bias: (K + 4) roundings of 2^-24; then one to dtype, whose unit
    # roundoff is eps / 2. An operand rounded to dtype from fp32 may land one unit off where fp32 hit a tie.
    unit = torch.finfo(dtype).eps / 2
    bound = (left.shape[1] + 4) * 2.0**-24 * magnitude + unit * exact.abs() * (1 + 2.0**-10)
    if operands_round and dtype != torch.float32:
        bound = bound + unit * magnitude * 2.0**-7
    return exact, bound + torch.finfo(torch.float32).tiny


def expected(x, w, bias, g, config, dtype):
    """(y, dX, dW), each with its bound. x [tokens, in], w [out, in], g [tokens, out], all in dtype."""
    names_w = {"tensor": "tensor", "channel": "row", "block": "block"}
    names_x = {"tensor": "tensor", "token": "row", "channel": "column", "block": "block"}
    weight, activation, gradient = config.get("weight"), config.get("activation"), config.get("gradient")
    integer = config.get("backend") == "int8"
    parts = (weight, activation, gradient)
    in_blocks = [bool(part and "format" in part and FORMATS[part["format"]].block_size) for part in parts]
    default_w, default_x = "block" if in_blocks[0] else "channel", "block" if in_blocks[1] else "token"

    def of_weight(transposed):
        if not weight:
            return Side.plain(w.t() if transposed else w)
        return Side.quantized(w, weight, names_w[weight.get("granularity", default_w)], transposed=transposed)

    def of_activation(transposed):
        if not activation:
            return Side.plain(x.t() if transposed else x)
        make = Side.with_outliers if "outlier_share" in activation else Side.quantized
        return make(x, activation, names_x[activation.get("granularity", default_x)], transposed=transposed)

    rotated = rotated_products(config)
    y = product(of_activation(False), of_weight(False), dtype, bias, integer=integer)
    if "output" in rotated:
        y = rotated_product((x, activation), (w, weight), config, dtype, bias)
    original = config.get("backward_operands") == "original"
    other_w = Side.plain(w.t()) if original else of_weight(True)
    other_x = Side.plain(x.t()) if original else of_activation(True)
    used = gradient.get("used_for", ("weight", "input")) if gradient else ()
    granularity = gradient.get("granularity", "block" if in_blocks[2] else "outer") if gradient else None

    def with_gradient(other, other_is_quantized, outer_name, transposed):
        """other [free, contracted]; g is contracted over its features, or over its rows if transposed."""
        folded = g.float()
        if granularity == "outer" and other_is_quantized:
            scale = other.scale[0].float()  # the same for every free index: it belongs to the contracted one
            folded = folded * (scale.reshape(-1, 1) if transposed else scale)
            other = Side(other.steps, torch.ones((), dtype=torch.float64), False)
        if granularity == "block":  # of what is contracted
            side = Side.quantized(folded.t().contiguous() if transposed else folded, gradient, "block")
            return product(side, other, dtype, integer=integer)
        name = outer_name if granularity == "outer" else names_x[granularity]
        return product(Side.quantized(folded, gradient, name, transposed=transposed), other, dtype, integer=integer)

    if "input" in rotated:
        how = gradient if "input" in used else None, None if original else weight
        dx = rotated_product((g, how[0]), (w.t(), how[1]), config, dtype)
    elif "input" in used:
        dx = with_gradient(other_w, bool(weight) and not original, "row", False)
    else:
        dx = product(Side.plain(g), other_w, dtype, integer=integer)
    if "weight" in rotated:
        how = gradient if "weight" in used else None, None if original else activation
        dw = rotated_product((g.t(), how[0]), (x.t(), how[1]), config, dtype)
    elif "weight" in used:
        dw = with_gradient(other_x, bool(activation) and not original, "column", True)
    else:
        dw = product(Side.plain(g.t()), other_x, dtype, integer=integer)
    return y, dx, dw


def rotated_products(config):
    """Names as in rotation.used_for."""
    if "rotation" not in config:
        return ()
    return config["rotation"].get("used_for", ("output", "input", "weight"))


def rotated_product(left, right, config, dtype, bias=None):
    """Of two pairs (matrix [free, contracted], its configuration or None), which are rotated and then quantized."""
    sides = []
    for matrix, how in (left, right):
        if not how:
            rotated = rotate_rows(matrix.float(), config["rotation"].get("block_size", 16))
            sides.append(Side.plain(rotated.to(matrix.dtype)))
            continue
        in_blocks = "format" in how and FORMATS[how["format"]].block_size
        granularity = how.get("granularity", "block" if in_blocks else "row")
        granularity = granularity if granularity in ("block", "tensor") else "row"
        # Rotated in fp32 by what tests/numerics/test_rotation_of_rows.py holds to dense matrices.
        rotated = rotate_rows(matrix.float(), config["rotation"].get("block_size", 16))
        sides.append(Side.quantized(rotated, how, granularity))
    return product(*sides, dtype, bias)


def run(config, x, w, bias, g, layout):
    """(y, dX, dW as [out, in], db) of the module."""
    if layout == "linear":
        module = ds_quant.QuantLinear(IN, OUT, dtype=x.dtype, config=config)
    else:
        module = ds_quant.QuantConv1D(OUT, IN, config=config).to(x.dtype)
    with torch.no_grad():
        module.weight.copy_(w if layout == "linear" else w.t())
        module.bias.copy_(bias)
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(g)
    dw = module.weight.grad if layout == "linear" else module.weight.grad.t()
    return y.detach(), x.grad, dw, module.bias.grad


def assert_within(got, want, what):
    exact, bound = want
    excess = ((got.double() - exact).abs() - bound).max()
    assert excess <= 0, f"{what}: off by {(got.double() - exact).abs().max():.3e}, {excess:.3e} above the bound"


def assert_compiles_to_the_same_bits(module, x, backend="inductor"):
    """As one graph, in two steps whose stochastic rounding differs: outputs and gradients."""
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for step in (1, 2):
        results = []
        for call in (module, compiled):
            step_key_of(module).set(step)
            module.weight.grad = None
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad, module.weight.grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def random_case(dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        rows = torch.exp(torch.randn(shape[0], 1, generator=generator))
        return (torch.randn(*shape, generator=generator) * rows).to(dtype)

    return draw(TOKENS, IN), draw(OUT, IN), draw(OUT, 1).flatten(), draw(TOKENS, OUT)


def check_products(config, dtype, layout):
    """Y, dX, dW and db of a random layer against `expected`."""
    seed = int(torch.randint(2**31, ()).item())
    x, w, bias, g = random_case(dtype, seed)
    wanted = expected(x, w, bias, g, config, dtype)
    y, dx, dw, db = run(config, x, w, bias, g, layout)
    for got, want, what in zip((y, dx, dw), wanted, "y dX dW".split(), strict=True):
        assert got.dtype == dtype
        assert_within(got, want, f"{what} of {config} {dtype} {layout} seed {seed}")
    assert torch.equal(db, g.sum(0))
