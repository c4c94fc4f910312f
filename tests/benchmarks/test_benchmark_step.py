from __future__ import annotations

import types

import benchmark
import pytest
import torch
from benchmark_files import PNG, TIMED, read
from torch import nn

from benchmarks import recipes, step_contenders, step_models, step_profile
from ds_quant import QuantLinear, convert

CPU = torch.device("cpu")


# ---- models and contenders


def test_conv1d_becomes_linear_and_computes_the_same():
    model = step_models.build("tiny-gpt2", dropout=0.0, device=CPU)
    tokens = torch.arange(32).reshape(2, 16)
    expected = model(input_ids=tokens).logits
    converted = step_models.with_linears(model)
    assert sum(type(module) is nn.Linear for module in converted.modules()) == 9
    assert torch.allclose(converted(input_ids=tokens).logits, expected, atol=1e-5)
    assert converted.lm_head.weight is converted.transformer.wte.weight


def test_presets_are_the_models_that_they_say():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in step_models.build(name, dropout=None, device="meta").parameters())
            for name in ("gpt2", "llama")
        }
    assert sizes == {"gpt2": 124_439_808, "llama": 109_529_856}


def test_lm_head_is_quantized_only_where_it_says_so():
    model = step_models.build("tiny-llama", dropout=None, device=CPU)
    batch = torch.zeros(1, 8, dtype=torch.int64)
    for contender in step_contenders.contenders("int8", CPU):
        if contender.name.startswith("ds_quant"):
            head = contender.make(model, batch, with_optimizer=False).model.lm_head
            assert isinstance(head, QuantLinear) == ("lm_head too" in contender.name)
    assert type(model.lm_head) is nn.Linear


# ---- groups of the profiler's names


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::_int_mm", "integer GEMM"),
        ("ds_quant::scaled_matmul", "integer GEMM"),
        ("aten::mm", "floating GEMM"),
        ("aten::addmm", "floating GEMM"),
        ("aten::linear", "floating GEMM"),
        ("aten::bmm", "floating GEMM"),
        ("mkldnn::_linear_pointwise", "floating GEMM"),
        ("ds_quant::quantize_rows", "quantize"),
        ("ds_quant::dequantize", "quantize"),
        ("ds_quant::epilogue", "epilogue"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::mul", None),
        ("AddmmBackward0", None),
        ("autograd::engine::evaluate_function: MmBackward0", None),
        ("aten::add_", None),
    ],
)
def test_groups_of_names(name, group):
    assert step_profile.group_of(name) == group


def event(name, microseconds, parent=None, sequence_nr=-1, kind="CPU"):
    return types.SimpleNamespace(
        name=name,
        self_cpu_time_total=microseconds,
        self_device_time_total=2 * microseconds,
        cpu_parent=parent,
        sequence_nr=sequence_nr,
        device_type=types.SimpleNamespace(name=kind),
    )


def test_the_outermost_group_counts_and_backward_nodes_follow_their_forward():
    attention = event("aten::scaled_dot_product_attention", 1e6, sequence_nr=5)
    inner = event("aten::bmm", 2e6, attention, sequence_nr=6)
    node = event("autograd::engine::evaluate_function: BmmBackward0", 4e6, sequence_nr=6)
    backward = event("aten::bmm", 8e6, node)
    other = event("autograd::engine::evaluate_function: MmBackward0", 16e6, sequence_nr=7)
    product = event("aten::mm", 32e6, other)
    span = event("ds_quant::quantize_rows", 64e6)
    within = event("aten::mm", 128e6, span)
    kernel = event("a kernel of the GPU", 1e9, kind="CUDA")
    events = [attention, inner, node, backward, other, product, span, within, kernel]
    found = step_profile.split(events, on_gpu=False)
    assert found["attention"] == pytest.approx(1 + 2 + 4 + 8)
    assert found["floating GEMM"] == pytest.approx(32)
    assert found["quantize"] == pytest.approx(64 + 128)
    assert found["rest"] == pytest.approx(16)
    assert sum(step_profile.split(events, on_gpu=True).values()) == pytest.approx(2 * sum(found.values()))


def test_a_real_profile_finds_what_was_done(with_integer_units):
    query = torch.randn(1, 2, 64, 32, requires_grad=True)
    weight = torch.randn(64, 64)
    layer = nn.Linear(512, 512)
    x = torch.randn(512, 512)
    convert(nn.Sequential(layer), recipes.w8a8g8("int8"))

    def call():
        # With dropout attention is made of plain operators, products among them.
        (torch.nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.1).sum()).backward()
        layer(x).sum().backward()

    found = step_profile.self_seconds(call, CPU)
    assert set(found) == set(step_profile.GROUPS)
    assert found["attention"] > 0
    assert found["floating GEMM"] == 0
    assert found["rest"] > 0
    assert step_profile.self_seconds(lambda: weight @ weight, CPU)["floating GEMM"] > 0


# ---- the subcommand


def test_step_from_end_to_end(tmp_path, capsys, with_integer_units):
    output = tmp_path / "step.csv"
    arguments = ["--models", "tiny-gpt2,tiny-llama", "--batch", "2", "--sequence", "32", "--rounds", "2"]
    arguments += ["--warm-up", "0", "--threads", "1", "--only", "fp32,autocast,stochastic,lm_head", "--device", "cpu"]
    arguments += ["--profile", "--optimizer", "--output", str(output)]
    assert benchmark.main(["step", *arguments]) == 0
    rows = read(output)
    base = step_contenders.BASE
    names = ["fp32", "bf16 autocast", base]
    ours = [c.name for c in step_contenders.contenders("int8", CPU) if "stochastic" in c.name or "lm_head" in c.name]
    assert len(ours) == 3
    names += ours
    assert [(row["model"], row["contender"]) for row in rows] == [
        (model, name) for model in ("tiny-gpt2", "tiny-llama") for name in names
    ]
    columns = {"model", "batch", "sequence", "dropout", "optimizer", "backend", "contender", "saved_bytes"}
    columns |= {"saved_bytes_of_linears", "kept_bytes", "peak_extra_bytes", "first_step_seconds", "commit"}
    for row in rows:
        assert TIMED | columns <= set(row)
        assert (row["optimizer"], row["dropout"]) == ("True", "configuration")
        assert row["contender"] != base or row["ratio_p50"] == "1.0"
        of_base = next(r for r in rows if (r["model"], r["contender"]) == (row["model"], base))
        if row["contender"].startswith("ds_quant"):
            assert float(row["saved_bytes_of_linears"]) < float(of_base["saved_bytes_of_linears"])
    profiled = read(tmp_path / "step-profile.csv")
    assert [(row["model"], row["contender"]) for row in profiled] == [(row["model"], row["contender"]) for row in rows]
    for row in profiled:
        shares = {key: float(value) for key, value in row.items() if key.startswith("share_")}
        assert len(shares) == len(step_profile.GROUPS)
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["share_attention"] > 0
        assert shares["share_optimizer"] > 0
        assert (shares["share_floating_gemm"] > 0) == ("lm_head too" not in row["contender"])
    for name in ("step.png", "step-profile.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert "tiny-llama: 2 x 32 tokens, forward, loss, backward, optimizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt5"], "--models: got 'gpt5'; allowed: gpt2, llama"),
        (["--batch", "0"], "--batch: got 0; allowed: 1 or more"),
        (["--sequence", "1025"], "--sequence: got 1025; allowed: 2 to 1024 for gpt2"),
        (["--sequence", "1"], "--sequence: got 1; allowed: 2 to 1024 for gpt2"),
        (["--dropout", "1"], "--dropout: got 1.0; allowed: 0 up to, but not, 1"),
        (["--only", "sgd"], "--only: got 'sgd'; allowed: parts of fp32; bf16 autocast"),
    ],
)
def test_wrong_arguments_end_with_a_line(arguments, message, capsys):
    assert benchmark.main(["step", *arguments]) == 2
    assert message in capsys.readouterr().err
