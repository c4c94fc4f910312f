"""Step 6: int8 Linear and Conv1D against `simulated`; times, launches and host waits of a layer; products of fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import linear_contenders, recipes, roofline, step_profile
from benchmarks.device_timing import Timer, host_waits, launches
from benchmarks.gpu_check import fp8, fusion
from benchmarks.gpu_check.recording import Record
from benchmarks.linear_contenders import Layer, Operands
from benchmarks.single_layers import as_in_a_model
from ds_quant import QuantConv1D, QuantLinear
from ds_quant.cli.shared import process_memory

_ROUNDS = 5
# tokens, in, out: odd tokens, a vocabulary, more.
_CASES = ((1021, 768, 3072), (333, 768, 50_257), (2048, 3072, 768))
_SMALL_CASES = ((33, 40, 50),)
_NEAREST, _STOCHASTIC = recipes.w8a8g8("int8"), recipes.w8a8g8("int8", rounding="stochastic")


def run(record: Record) -> None:
    """Numbers first, times after."""
    parts = {"numbers": _numbers, "launches and waits": _launches, "memory": _memory, "times": _times}
    for name, part in {**parts, "simulated": _simulated, "fusion": fusion.run, "fp8": fp8.run}.items():
        with record.part(name):
            part(record)


def _numbers(record: Record) -> None:
    worst = 0.0
    for tokens, in_features, out_features in record.pick(_CASES, _SMALL_CASES):
        for kind in ("linear", "conv1d"):
            for dtype, section in (
                (torch.bfloat16, _NEAREST),
                (torch.float16, _NEAREST),
                (torch.bfloat16, _STOCHASTIC),
            ):
                operands = Operands.draw(tokens, in_features, out_features, bias=True, device=record.device)
                # Both draw the same bits: those of a first forward with the same seed.
                got = _results(kind, operands, dtype, section)
                want = _results(kind, operands, dtype, {**section, "backend": "simulated"})
                # One rounding at the end of each, of sums that are exact in the one and close to it in the other.
                errors = [
                    float((a.double() - b.double()).norm() / b.double().norm()) / torch.finfo(dtype).eps
                    for a, b in zip(got, want, strict=True)
                ]
                worst = max(worst, *errors)
                record.row(
                    "int8 less simulated, in roundings",
                    layer=kind,
                    tokens=tokens,
                    size=f"{in_features} to {out_features}",
                    dtype=str(dtype).removeprefix("torch."),
                    rounding="stochastic" if section is _STOCHASTIC else "nearest",
                    **dict(zip(("Y", "dX", "dW"), errors, strict=True)),
                )
    record.measure("layer_errors", worst)


def _results(kind: str, operands: Operands, dtype: torch.dtype, section: recipes.Section) -> tuple[Tensor, ...]:
    module = _layer(kind, operands, dtype, section)
    x = operands.x.to(dtype).requires_grad_()
    y = module(x)
    y.backward(operands.grad.to(dtype))
    assert x.grad is not None
    assert isinstance(module.weight.grad, Tensor)
    return y.detach(), x.grad, module.weight.grad


def _layer(kind: str, operands: Operands, dtype: torch.dtype, section: recipes.Section) -> nn.Module:
    out_features, in_features = operands.weight.shape
    module: Any
    if kind == "linear":
        has_bias = operands.bias is not None
        module = QuantLinear(in_features, out_features, bias=has_bias, config=section)
    else:
        module = QuantConv1D(out_features, in_features, config=section)
    module = as_in_a_model(module).to(device=operands.x.device, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(operands.weight if kind == "linear" else operands.weight.t())
        if operands.bias is not None:
            module.bias.copy_(operands.bias)
    return module


def _launches(record: Record) -> None:
    tokens, in_features, out_features = record.pick((2048, 768, 3072), (32, 40, 48))
    waits = 0
    for kind, bias in (("linear", False), ("linear", True), ("conv1d", True)):
        for rounding, section in (("nearest", _NEAREST), ("stochastic", _STOCHASTIC)):
            operands = Operands.draw(tokens, in_features, out_features, bias=bias, device=record.device)
            layer = Layer(_layer(kind, operands, torch.bfloat16, section), operands, torch.bfloat16)
            for _ in range(3):
                layer.clear()
                layer.forward_backward()
            layer.clear()
            found = launches(layer.forward_backward, record.device)
            layer.clear()
            waited = host_waits(layer.forward_backward, record.device)
            waits += bool(waited)
            number = sum(found.values())
            record.row("launches", layer=kind, bias=bias, rounding=rounding, launches=number, host_waits=waited)
            table = f"launches: {kind}, {'bias' if bias else 'no bias'}, {rounding}"
            for name, count in found.items():
                record.row(table, name=name[:100], times=count)
            if kind == "linear" and not bias:
                record.measure(f"launches_{rounding}", number)
    record.measure("host_waits", waits)


def _memory(record: Record) -> None:
    """The forward of a head: what it takes beside its result."""
    tokens, in_features, out_features = record.pick((8192, 768, 50_257), (64, 40, 5000))
    operands = Operands.draw(tokens, in_features, out_features, bias=False, device=record.device)
    module = _layer("linear", operands, torch.bfloat16, _NEAREST)
    x = operands.x.bfloat16()

    def forward() -> None:
        with torch.no_grad():
            module(x)

    forward()
    peak = process_memory.peak_bytes(forward, record.device)
    if peak is None:
        record.not_measured("int32_in_memory", "this system does not tell a process its peak memory")
        return
    elements = tokens * out_features
    sizes = {"peak_mb": peak / 1e6, "result_mb": 2e-6 * elements}
    record.row("memory of a head's forward", tokens=tokens, outputs=out_features, **sizes)
    record.measure("int32_in_memory", (peak - 2 * elements) / (4 * elements))


def _times(record: Record) -> None:
    contenders = {contender.name: contender.make for contender in linear_contenders.contenders("int8", record.device)}
    ours = ("ds_quant W8A8", "ds_quant W8A8G8", "ds_quant W8A8G8, stochastic G")
    keys = {(4096, 4096, 8192): "speed_up_4096", (768, 3072, 8192): "speed_up_768"}
    if record.dry_run:
        keys = {(64, 64, 32): "speed_up_4096", (32, 64, 32): "speed_up_768"}
    # Those that promises are about come first.
    for layer in [*keys, *(() if record.dry_run else [each for each in roofline.LAYERS if each not in keys])]:
        in_features, out_features, tokens = layer
        operands = Operands.draw(tokens, in_features, out_features, bias=False, device=record.device)
        names = (linear_contenders.BASE, *ours)
        made = {name: contenders[name](operands) for name in names}
        base: float | None = None
        for name in names:
            timer = Timer(made[name].forward_backward, record.device, before=made[name].clear, iterations=5)
            timed = timer.measure(_ROUNDS)
            made[name].clear()
            base = base or timed.device
            record.row(
                "layers, forward and backward",
                layer=f"{in_features} to {out_features}",
                tokens=tokens,
                what=name,
                device_us=timed.device * 1e6,
                host_us=timed.host * 1e6,
                speed_up=base / timed.device,
                predicted=_predicted(name, layer),
                timed_by=timed.how,
                why_no_graph=timer.why_no_graph,
            )
            if name == "ds_quant W8A8G8" and layer in keys:
                record.measure(keys[layer], base / timed.device)


def _predicted(name: str, layer: tuple[int, int, int]) -> float | None:
    """The speed-up that the roofline has for it."""
    if "W8A8G8" not in name:
        return None
    return roofline.predict(roofline.AFTER, *layer, stochastic="stochastic" in name).speed_up


def _simulated(record: Record) -> None:
    """The floating-point products' share of the time, not that of its quantizers."""
    in_features, out_features, tokens = record.pick((4096, 4096, 8192), (64, 64, 32))
    operands = Operands.draw(tokens, in_features, out_features, bias=False, device=record.device)
    section = recipes.w8a8g8("simulated")
    all_of_them = {each.name: each.make for each in linear_contenders.contenders("int8", record.device)}
    makes: dict[str, Callable[[Operands], Layer]] = {
        linear_contenders.BASE: all_of_them[linear_contenders.BASE],
        "simulated": lambda o: Layer(_layer("linear", o, torch.bfloat16, section), o, torch.bfloat16),
    }
    seconds = {}
    for name, make in makes.items():
        layer = make(operands)
        for _ in range(2):
            layer.clear()
            layer.forward_backward()
        layer.clear()
        found = step_profile.self_seconds(layer.forward_backward, record.device)
        seconds[name] = found[step_profile.FLOATING]
        record.row(
            "simulated, under the profiler",
            what=name,
            gemm_us=seconds[name] * 1e6,
            all_us=sum(found.values()) * 1e6,
        )
    record.measure("simulated_gemm_time", seconds["simulated"] / seconds[linear_contenders.BASE])
