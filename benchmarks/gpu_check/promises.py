"""What is promised of a GPU, and the verdict on each promise from what a step has measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

HELD, MISSED, NOT_MEASURED, DRY_RUN = "held", "missed", "not measured", "dry run"
AT_LEAST, AT_MOST = "at least", "at most"


class Promise(NamedTuple):
    """A measure of a step that must reach, or stay within, its goal."""

    step: int
    measure: str
    """Its key among those that the step records."""
    text: str
    kind: str
    """AT_LEAST or AT_MOST."""
    goal: float


class Verdict(NamedTuple):
    promise: Promise
    outcome: str
    """HELD, MISSED, NOT_MEASURED or DRY_RUN."""
    measured: float | None
    why: str
    """Why nothing was measured; else empty."""


PROMISES = (
    Promise(1, "copy_tb_per_s", "copies reach the TB/s that predictions take for an H100", AT_LEAST, 2.6),
    Promise(1, "bf16_tflops", "bf16 GEMMs reach the TF/s that predictions take for an H100", AT_LEAST, 620),
    Promise(2, "tn_failures", "multiples of 16 at which _int_mm of layout TN raises or is wrong", AT_MOST, 0),
    Promise(2, "wrong_products", "layouts and sizes at which _int_mm gives wrong sums", AT_MOST, 0),
    Promise(3, "quantizer_differences", "elements that quantizers give other than their definitions", AT_MOST, 0),
    Promise(3, "key_differences", "subkeys on the device other than on the host", AT_MOST, 0),
    # As of what is compiled for CPUs: kernels/wire promises no more.
    Promise(3, "wire_share_different", "share of a message's bytes other than by definition", AT_MOST, 1e-3),
    # A sum of ranks is rounded once a rank, and twice besides.
    Promise(3, "wire_sum_roundings", "error of a sum of ranks, in that of its fp32 roundings", AT_MOST, 1),
    Promise(3, "wire_compile_growth", "first reduction of 64 ranks over that of 8: none compiled", AT_MOST, 1),
    Promise(3, "wire_host_ms", "host ms of an all-reduce of 124M elements among 8 ranks", AT_MOST, 1.0),
    Promise(4, "gemm_differences", "results of Triton's GEMM other than by definition", AT_MOST, 0),
    Promise(4, "gemm_tn_tops", "TN TOPS at 4096^3 that predictions take for an H100", AT_LEAST, 1150),
    Promise(4, "adamw_differences", "results of Triton's AdamW other than by definition", AT_MOST, 0),
    # As in tests/kernels: products fused into sums may round to the next code.
    Promise(5, "codes_different", "largest share of a format's codes other than by definition", AT_MOST, 0.02),
    Promise(5, "parameters_off", "parameters off by more than roundings, with weight decay", AT_MOST, 0),
    Promise(5, "nonfinite_off", "formats that treat Inf and NaN in gradients other than the definition", AT_MOST, 0),
    Promise(5, "launches_148", "launches of a step over GPT-2's 148 tensors: fewer than tensors", AT_MOST, 147),
    Promise(6, "layer_errors", "int8 less simulated, in roundings of the results' dtype", AT_MOST, 1),
    Promise(6, "launches_nearest", "launches of a layer, forward and backward", AT_MOST, 8),
    Promise(6, "launches_stochastic", "the same with gradients rounded stochastically", AT_MOST, 8),
    Promise(6, "host_waits", "layers in which the host waits for the device", AT_MOST, 0),
    Promise(6, "int32_in_memory", "extra memory of a head of 50257 outputs over that of an int32 result", AT_MOST, 1),
    Promise(6, "speed_up_4096", "4096 to 4096, 8192 tokens: times as fast as bf16", AT_LEAST, 1.5),
    Promise(6, "speed_up_768", "768 to 3072, 8192 tokens: times as fast as bf16", AT_LEAST, 1.0),
    Promise(6, "simulated_gemm_time", "simulated's GEMMs over bf16's, 4096 to 4096", AT_MOST, 1.5),
    Promise(6, "fused_codes", "codes fused into a norm: times as fast as by the operator", AT_LEAST, 1.0),
    Promise(6, "fp8_differences", "results of fp8 products other than exact, of small whole numbers", AT_MOST, 0),
    Promise(7, "block_2048", "block of 2048, 8k tokens: times as fast as bf16, both compiled", AT_LEAST, 1.0),
    Promise(7, "block_4096", "block of 4096, 8k tokens: times as fast as bf16, both compiled", AT_LEAST, 1.0),
    Promise(8, "failed_runs", "runs of pretrain.py that fail", AT_MOST, 0),
    Promise(8, "worst_loss_gap", "largest distance of a run's loss from the CPU's, nats", AT_MOST, 0.03),
    Promise(8, "nccl_loss_gap", "the same over NCCL, on two ranks", AT_MOST, 0.03),
)


def judge(promise: Promise, result: Mapping[str, Any] | None) -> Verdict:
    """The verdict from what the promise's step has left behind; None where it did not run."""
    if result is None:
        return Verdict(promise, NOT_MEASURED, None, "the step was not run")
    measured = result.get("measures", {}).get(promise.measure)
    if measured is None:
        why = result.get("not_measured", {}).get(promise.measure) or f"the step {result['state']}"
        return Verdict(promise, NOT_MEASURED, None, why)
    if result["dry_run"]:
        return Verdict(promise, DRY_RUN, measured, "")
    # No comparison with a NaN is true: it holds nothing.
    held = measured >= promise.goal if promise.kind == AT_LEAST else measured <= promise.goal
    return Verdict(promise, HELD if held else MISSED, measured, "")


def judge_all(results: Mapping[int, Mapping[str, Any]]) -> list[Verdict]:
    """One verdict for each promise, from the results by number of step."""
    return [judge(promise, results.get(promise.step)) for promise in PROMISES]


def exit_status(verdicts: Iterable[Verdict], results: Mapping[int, Mapping[str, Any]]) -> int:
    """0 where nothing was missed and every step that ran ended well, else 1."""
    missed = any(verdict.outcome == MISSED for verdict in verdicts)
    return int(missed or any(result["state"] != "done" for result in results.values()))


def of_step(number: int) -> list[Promise]:
    """The promises that a step measures."""
    return [promise for promise in PROMISES if promise.step == number]
