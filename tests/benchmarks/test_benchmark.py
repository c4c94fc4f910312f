from __future__ import annotations

import csv
import time

import benchmark
import pytest
import torch

from benchmarks import contenders, timing
from benchmarks.optimizer import parse_size
from ds_quant import QuantAdamW
from ds_quant.cli.shared import process_memory
from ds_quant.cli.shared.errors import CommandError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50M", (1, 50_000_128)),
        ("1.5k", (1, 1536)),
        ("7", (1, 7)),
        ("2000x1000", (2000, 1000)),
        ("3x2M", (3, 2_000_128)),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "M", "0", "0x5", "5x", "-3", "1T", "2x3x4"])
def test_wrong_sizes_are_refused(text):
    with pytest.raises(CommandError, match=r"--sizes: got .*; allowed: elements \(50M\)"):
        parse_size(text)


def test_contenders_take_turns_and_warm_up_does_not_count():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.take_turns(contenders, rounds=3, warm_up=1, device=CPU)
    assert "".join(calls) == "abcbcacababc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_taken_round_by_round():
    seconds = {"base": [1.0, 10.0, 2.0], "twice": [2.0, 20.0, 4.0]}
    assert timing.ratios(seconds, "base")["twice"] == (2.0, 2.0, 2.0)
    assert timing.spread([float(value) for value in range(11)]) == (2.0, 5.0, 8.0)


def test_what_is_timed_is_the_call():
    seconds = timing.take_turns({"sleep": lambda: time.sleep(0.02)}, rounds=2, warm_up=0, device=CPU)
    assert all(value >= 0.02 for value in seconds["sleep"])


def test_peak_memory_sees_a_temporary():
    def call():
        torch.ones(40_000_000).sum()

    found = process_memory.peak_extra_bytes(call, CPU)
    if found is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 150_000_000 < found < 250_000_000
    kept = torch.ones(1000)
    assert process_memory.peak_extra_bytes(lambda: kept.add_(1), CPU) < 20_000_000


def test_bytes_of_a_state():
    param = torch.nn.Parameter(torch.zeros(256 * 40))
    param.grad = torch.ones_like(param)
    for exp_avg, expected in (
        ({"bits": 8}, 2 * (1 + 4 / 256)),
        ({"bits": 4}, 0.5 + 4 / 128 + 1 + 4 / 256),
        (None, 5 + 4 / 256),
    ):
        optimizer = QuantAdamW([param], exp_avg=exp_avg, exp_avg_sq={"bits": 8})
        optimizer.step()
        assert contenders.state_bytes(optimizer) == expected * param.numel() == optimizer.state_bytes()
    plain = torch.optim.AdamW([param])
    plain.step()
    assert contenders.state_bytes(plain) == 8 * param.numel()


def test_the_whole_benchmark(tmp_path, capsys):
    output = tmp_path / "folder" / "optimizer.csv"
    before = torch.get_num_threads()
    try:
        arguments = [
            "--sizes",
            "1000,3x100",
            "--rounds",
            "2",
            "--warm-up",
            "0",
            "--threads",
            "1",
            "--only",
            "quant,foreach",
        ]
        assert benchmark.main(["optimizer", *arguments, "--device", "cpu", "--output", str(output)]) == 0
    finally:
        torch.set_num_threads(before)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    names = [contenders.BASE, "torch AdamW, foreach"]
    names += [contender.name for contender in contenders.ALL if contender.name.startswith("Quant")]
    assert [(row["size"], row["optimizer"]) for row in rows] == [
        (size, name) for size in ("1000", "3x100") for name in names
    ]
    for row in rows:
        assert float(row["seconds_p50"]) > 0
        assert float(row["ratio_p20"]) <= float(row["ratio_p50"]) <= float(row["ratio_p80"])
        assert row["torch"] == torch.__version__
        assert row["threads"] == "1"
        assert row["processor"]
        assert row["commit"]
    assert {row["ratio_p50"] for row in rows if row["optimizer"] == contenders.BASE} == {"1.0"}
    printed = capsys.readouterr().out
    assert "QuantAdamW is served by" in printed
    assert "8.000" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "--rounds: got 1; allowed: 2 or more"),
        (["--only", "adagrad"], "--only: got 'adagrad'; allowed: parts of torch AdamW, fused"),
        (["--sizes", "big"], "--sizes: got 'big'"),
    ],
)
def test_wrong_arguments_end_with_a_line(arguments, message, capsys):
    assert benchmark.main(["optimizer", *arguments]) == 2
    assert message in capsys.readouterr().err
