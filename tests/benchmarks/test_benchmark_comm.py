"""`benchmark.py comm` and `comm-step`, with real ranks, and the links that they run over."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import benchmark
import pytest
import torch
from benchmark_files import read
from conftest import ROOT

from benchmarks import comm, comm_contenders, comm_step, links, slow_link, timing
from benchmarks.ranks import run_ranks
from ds_quant.cli.shared.errors import CommandError

WHY_NOT = slow_link.unavailable()
needs_link = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
SCRIPT = ROOT / "benchmarks" / "slow_link.py"
NAMES = [contender.name for contender in comm_contenders.ALL]
HOLD = """
import sys, time
from benchmarks.slow_link import slow_link
with slow_link("1gbit", 2) as link:
    print(*link.namespaces, flush=True)
    time.sleep(100)
"""


def namespaces():
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=100, check=True)
    return {line.split()[0] for line in done.stdout.splitlines() if line.strip()}


def heed_signals():
    """What a background job ignores, its children would."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def holder():
    """A process that has a link, and its namespaces."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={**os.environ, "PYTHONPATH": str(ROOT / "launchers")},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    return process, set(process.stdout.readline().split())


def test_what_is_called_before_does_not_count():
    called = []

    def before(name):
        called.append(name)
        time.sleep(0.05)

    seconds = timing.take_turns(
        {"a": lambda: None, "b": lambda: None}, rounds=2, warm_up=1, device=torch.device("cpu"), before=before
    )
    assert "".join(called) == "abbaab"
    assert max(map(max, seconds.values())) < 0.04


@pytest.mark.parametrize("numel", [1, 2, 3, 100, 5000, 1024**2, 25_000_192])
def test_parameters_of_the_module_have_all_elements(numel):
    shapes = comm_contenders.matrices(numel)
    assert sum(math.prod(shape) for shape in shapes) == numel
    assert max(max(shape) for shape in shapes) <= 1024


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("fp32 all-reduce", 2, 4.0),
        ("fp32 all-reduce", 4, 6.0),
        ("bf16 all-reduce", 2, 2.0),
        ("8 bits all-reduce", 2, 1 + 4 / 256),
        ("4 bits hadamard all-reduce", 4, 1.5 * (0.5 + 4 / 256)),
        ("bf16 reduce-scatter a2a", 4, 1.5),
        ("4 bits reduce-scatter", 2, 0.5 * (0.5 + 4 / 256)),
        ("DDP PowerSGD rank 1", 2, 4 * 2048 / 1024**2),
    ],
)
def test_bytes_by_formula(name, ranks, expected):
    found = {contender.name: contender for contender in comm_contenders.ALL}[name].sent(1024**2, ranks)
    assert found == expected * 1024**2


@pytest.mark.parametrize(("rate", "expected"), [("1gbit", 1e9), ("100mbit", 1e8), ("2.5gbit", 2.5e9), ("56kbit", 56e3)])
def test_rates(rate, expected):
    assert slow_link.bits_per_second(rate) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["comm", "--rounds", "1"], "--rounds: got 1; allowed: 2 or more"),
        (["comm", "--ranks", "1"], "--ranks: got 1; allowed: 2 or more"),
        (["comm", "--only", "horovod"], "--only: got 'horovod'; allowed: parts of fp32 all-reduce;"),
        (["comm", "--sizes", "big"], "--sizes: got 'big'"),
        (["comm", "--sizes", "2x100"], "--sizes: got '2x100'; allowed: elements"),
        (["comm", "--links", "fast"], "link: got 'fast'; allowed: loopback, or a rate such as 1gbit"),
        (["comm", "--links", "0mbit"], "link: got '0mbit'"),
        (["comm-step", "--ranks", "1"], "--ranks: got 1"),
        (["comm-step", "--steps", "4"], "--steps: got 4; allowed: 2 more than --warm-up (3)"),
        (["comm-step", "--rounds", "0"], "--rounds: got 0"),
        (["comm-step", "--stages", "1,4"], "--stages: got '1,4'; allowed: 0 to 3"),
        (["comm-step", "--configs", "nowhere.json"], "--configs: got nowhere.json"),
    ],
)
def test_wrong_arguments_end_with_a_line(arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_bases_are_always_measured():
    assert [contender.name for contender in comm._choose("4 bits reduce,powersgd")] == [
        "fp32 all-reduce",
        "4 bits reduce-scatter",
        "DDP without hook",
        "DDP PowerSGD rank 1",
    ]


def test_links_that_cannot_be_set_up_are_left_out_or_refused(monkeypatch, capsys):
    monkeypatch.setattr(slow_link.shutil, "which", lambda name: None if name == "tc" else f"/sbin/{name}")
    assert links.choose(None) == ["loopback"]
    fix = "tc not found: apt-get install -y --no-install-recommends iproute2"
    assert f"left out: 1gbit, 100mbit: {fix}" in capsys.readouterr().out
    assert links.choose("loopback") == ["loopback"]
    with pytest.raises(CommandError, match=f"--links: got '1gbit'; allowed here: loopback, since {fix}"):
        links.choose("1gbit")
    monkeypatch.undo()
    monkeypatch.setattr(slow_link.shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(slow_link.os, "geteuid", lambda: 1000)
    assert "need root" in str(slow_link.unavailable())


def test_configurations_are_put_together_by_stage(tmp_path):
    files = []
    for name in ("first", "second"):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": False}}))
    text = ",".join(map(str, files))
    assert [(job.name, job.stage) for job in comm_step._jobs(text, None)] == [("first", 2), ("second", 2)]
    jobs = comm_step._jobs(text, "1,0")
    assert [(job.name, job.stage) for job in jobs] == [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    assert jobs[2].content == {"zero_optimization": {"stage": 1, "overlap_comm": False}}


def test_configurations_that_a_stage_refuses_are_left_out(capsys):
    jobs = comm_step._jobs(None, "1,3")
    assert [job.name for job in jobs if job.stage == 1] == ["baseline", "comm8", "comm4", "full_int8", "wire8", "wire4"]
    assert [job.name for job in jobs if job.stage == 3] == ["baseline", "comm8", "comm4", "full_int8", "wire8"]
    assert "left out: wire4 at stage 3: zero_optimization.stage: got 3" in capsys.readouterr().out


def test_a_rank_that_fails_or_hangs_ends_all_of_them():
    program = (
        "import os, sys, time; rank = os.environ['RANK']; print('rank', rank)\n"
        "time.sleep({}) if rank != '{}' else sys.exit(3)"
    )
    begin = time.monotonic()
    with pytest.raises(CommandError, match=r"(?s)rank 1 ended with 3:\nrank 1"):
        run_ranks(["-c", program.format(100, 1)], ranks=2, link=None, environment={}, timeout=60)
    with pytest.raises(CommandError, match="rank 0 still ran after 1 s"):
        run_ranks(["-c", program.format(100, "none")], ranks=2, link=None, environment={}, timeout=1)
    assert time.monotonic() - begin < 50


@pytest.mark.distributed
@pytest.mark.timeout(290)
def test_comm_over_loopback_and_a_link(tmp_path, capsys):
    output = tmp_path / "folder" / "comm.csv"
    chosen = "loopback" if WHY_NOT else "loopback,100mbit"
    arguments = ["--sizes", "200k", "--rounds", "2", "--warm-up", "0", "--threads", "1", "--links", chosen]
    assert benchmark.main(["comm", *arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    rows = read(output)
    assert [(row["link"], row["contender"]) for row in rows] == [
        (link, name) for link in chosen.split(",") for name in NAMES
    ], printed
    for row in rows:
        assert float(row["seconds_p50"]) > 0
        assert float(row["ratio_p20"]) <= float(row["ratio_p50"]) <= float(row["ratio_p80"])
        assert (row["ranks"], row["elements"], row["threads"], row["rounds"]) == ("2", "200192", "1", "2")
        assert row["torch"] == torch.__version__
        # Nothing that is measured may be wrong; a matrix of rank 1 holds little of noise.
        limit = 1.1 if "PowerSGD" in row["contender"] else 0.25 if row["contender"].find("4 bits") >= 0 else 0.02
        assert float(row["relative_error"]) < limit
        if row["contender"] == row["ratio_to"]:
            assert row["ratio_p50"] == row["times_faster_than_fp32"] == "1.0"
        if row["link"] == "loopback":
            assert row["bytes_sent_read"] == row["fraction_of_link_floor"] == ""
            continue
        # Headers, acknowledgements and what the ranks say beside it; PowerSGD sends little else.
        formula, counted = int(row["bytes_sent_by_formula"]), int(row["bytes_sent_read"])
        assert formula * 0.99 < counted < formula * 1.1 + 20_000, row["contender"]
        # The link lets a burst of 128 KiB through at once, which is all of the shortest messages.
        fraction, burst = float(row["fraction_of_link_floor"]), 128 * 1024
        assert fraction > 0
        if formula > 2 * burst:
            assert fraction < 1.05 * formula / (formula - burst), row["contender"]
    assert printed.count("200k fp32 gradients, 2 ranks") == len(chosen.split(","))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(290)
def test_a_training_step(tmp_path, capsys):
    output = tmp_path / "comm_step.csv"
    small = "--config_overrides num_hidden_layers=1,hidden_size=32,intermediate_size=64 --vocab_size 512"
    chosen = "loopback" if WHY_NOT else "1gbit"
    arguments = ["--configs", str(ROOT / "ds_configs/baseline.json"), "--links", chosen, "--output", str(output)]
    arguments += ["--steps", "4", "--warm-up", "1", "--rounds", "1", "--arguments", small, "--timeout", "200"]
    assert benchmark.main(["comm-step", *arguments]) == 0
    (row,) = read(output)
    assert (row["link"], row["config"], row["zero_stage"], row["steps"]) == (chosen, "baseline", "1", "3")
    assert float(row["seconds_p50"]) > 0
    assert float(row["ratio_p50"]) == 1.0
    if not WHY_NOT:
        # Stage 1 sends 2 bytes a gradient at the least, and gathers 2 a parameter.
        assert 60_000 < float(row["bytes_sent_per_step"]) < 600_000
    assert f"a training step, 2 ranks, {chosen}" in capsys.readouterr().out


@needs_link
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_link_joins_its_ranks_and_goes(ranks):
    before = namespaces()
    script = "import socket; s = socket.create_connection(('{}', 5000), timeout=20); print(s.recv(9).decode())"
    server = (
        "import socket; s = socket.create_server(('', 5000)); print('up', flush=True); s.accept()[0].sendall(b'hello')"
    )
    with slow_link.slow_link("10mbit", ranks) as link:
        assert len(namespaces() - before) == ranks + (ranks > 2)
        listening = subprocess.Popen(link.within(0, [sys.executable, "-c", server]), stdout=subprocess.PIPE, text=True)
        assert listening.stdout.readline() == "up\n"
        command = link.within(ranks - 1, [sys.executable, "-c", script.format(link.environment()["MASTER_ADDR"])])
        assert subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout == "hello\n"
        listening.wait(timeout=100)
        shown = subprocess.run(
            ["tc", "-n", link.namespaces[1], "qdisc", "show", "dev", "wire"],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert "rate 10Mbit" in shown.stdout
    assert namespaces() == before


@needs_link
def test_a_link_goes_with_what_runs_in_it_after_an_exception():
    before = namespaces()

    def fail():
        with slow_link.slow_link("1gbit", 2) as link:
            running.append(subprocess.Popen(link.within(0, ["sleep", "100"])))
            time.sleep(0.3)
            raise RuntimeError("broken")

    running = []
    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert namespaces() == before
    assert running[0].wait(timeout=100) == -signal.SIGKILL


@needs_link
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_link_goes_when_its_process_is_told_to_end(number):
    process, own = holder()
    assert len(own) == 2
    assert own <= namespaces()
    process.send_signal(number)
    assert process.wait(timeout=200) != 0
    assert not own & namespaces()


@needs_link
def test_clean_removes_what_a_killed_run_left_and_nothing_else():
    process, own = holder()
    process.kill()
    process.wait(timeout=100)
    with slow_link.slow_link("1gbit", 2) as link:
        done = subprocess.run([sys.executable, SCRIPT, "--clean"], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert {f"removed: {name}" for name in own} <= set(done.stdout.splitlines())
        assert not own & namespaces()
        assert set(link.namespaces) <= namespaces()
