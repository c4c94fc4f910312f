"""The planner's parts: dry runs, the ledger of memory, bytes of collectives, models, configs, the search."""

import dataclasses
import gc
import json

import pytest
import torch
from torch import nn

from ds_quant.base.errors import ConfigError
from ds_quant.cli.plan import lines, parse_size
from ds_quant.cli.report import main
from ds_quant.numerics.codes import code_map
from ds_quant.optim.state import QuantizedState
from ds_quant.planning.configs import job_config, offloaded_roles
from ds_quant.planning.dry_run import KNOWN_BYTES, DryRun
from ds_quant.planning.job import Job, Outcome
from ds_quant.planning.ledger import Ledger
from ds_quant.planning.models import causal_model, resolve_model
from ds_quant.planning.plan import Planner, Request, Setting, divisors, world_sizes
from ds_quant.planning.traffic import Collective, totals

MiB = 2**20
TINY = "model_type=llama,hidden_size=16,intermediate_size=32,num_hidden_layers=6,num_attention_heads=2,vocab_size=64"


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class TestDryRun:
    def test_large_memory_is_asked_for_and_never_written(self):
        before = resident_bytes()
        with DryRun():
            x = torch.randn(64 * 1024, 64 * 1024)  # 16 GiB
            y = (x @ x.t()).relu_()
            y.add_(x)
        assert y.shape == (64 * 1024, 64 * 1024)
        assert y.untyped_storage().nbytes() == 16 * 2**30
        assert resident_bytes() - before < 64 * MiB

    def test_shapes_strides_and_dtypes_are_those_of_a_real_run(self):
        def program():
            x = torch.randn(4, 8, 16, requires_grad=True)
            y = nn.functional.scaled_dot_product_attention(x, x, x).transpose(0, 1).to(torch.bfloat16)
            z = torch.cat([y, y], dim=-1).float().softmax(-1)
            z.sum().backward()
            return [x.grad, y, z, z.max(-1).indices]

        with DryRun():
            dry = program()
        for got, want in zip(dry, program(), strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)

    def test_what_is_known_stays_exact(self):
        with DryRun() as run:
            positions = torch.arange(10).cumsum(0)
            buffer = torch.empty(3)
            buffer.copy_(torch.tensor([1.0, 2.0, 3.0]))
            assert positions[-1].item() == 45
            assert not run.is_hollow(buffer)
            assert buffer.tolist() == [1.0, 2.0, 3.0]
            assert not (positions > 45).any()

    def test_what_is_hollow_answers_one_and_is_finite(self):
        with DryRun() as run:
            x = torch.randn(100)
            known = torch.zeros(100)
            known.add_(x)
            assert run.is_hollow(x)
            assert run.is_hollow(known)
            assert run.is_hollow(torch.zeros(KNOWN_BYTES // 4 + 1))
            assert x.norm().item() == 1.0
            assert torch.isfinite(x.amax())
            assert not (x > 0).any()

    def test_known_shapes_change_nothing(self, monkeypatch):
        """Of a model whose layers are alike, in a forward, a backward and a step: every change of memory, in order."""

        def changes():
            ledger = Ledger()
            with DryRun(), ledger:
                model = causal_model(resolve_model(TINY, length=8)[0])
                optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
                ids = torch.arange(16).view(2, 8)
                for _ in range(2):
                    model(input_ids=ids, labels=ids).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            return ledger._events, ledger._sizes

        computed = []
        original = DryRun._computed_shapes
        monkeypatch.setattr(DryRun, "_computed_shapes", lambda *a: computed.append(a[1]) or original(*a))
        found, few = changes(), len(computed)
        monkeypatch.setattr(DryRun, "_shapes", DryRun._computed_shapes)
        assert changes() == found
        assert 0 < few < (len(computed) - few) / 4

    def test_shapes_are_known_by_what_decides_them(self):
        with DryRun():
            x = torch.randn(2, 3)
            made = [x + 1, x.t() + 1, x.half() + 1, torch.cat([x, x]), torch.cat([x]), x.sum(0), x.sum(1)]
            whole = torch.full((2,), 1, device="cpu"), torch.full((2,), 1.0), torch.full((2,), True)
        assert [(tuple(t.shape), t.stride(), t.dtype) for t in made] == [
            ((2, 3), (3, 1), torch.float32),
            ((3, 2), (1, 3), torch.float32),
            ((2, 3), (3, 1), torch.float16),
            ((4, 3), (3, 1), torch.float32),
            ((2, 3), (3, 1), torch.float32),
            ((3,), (1,), torch.float32),
            ((2,), (1,), torch.float32),
        ]
        assert [t.dtype for t in whole] == [torch.int64, torch.float32, torch.bool]

    def test_views_share_memory_and_data_may_be_replaced(self):
        with DryRun():
            weight = nn.Parameter(torch.randn(8, 8))
            flat = torch.randn(64)
            weight.data = flat.view(8, 8)
        assert weight.data_ptr() == flat.data_ptr()

    def test_sizes_that_depend_on_values_are_refused(self):
        with DryRun(), pytest.raises(ConfigError, match=r"aten.nonzero.default: got .*memory does not depend on the"):
            torch.randn(100).nonzero()


class TestLedger:
    def test_a_known_program(self):
        with Ledger() as ledger:
            kept = torch.ones(1000)  # 4000 bytes
            ledger.assign("weights", [kept])
            ledger.mark("begin")
            ledger.mark("forward")
            saved = kept * 2
            ledger.assign_born_since("activations", "forward")
            ledger.mark("backward")
            gone = saved + 1
            del gone
            result = saved.sum()
            del saved
            ledger.mark("end")
        peak = ledger.peak("begin", "end")
        assert peak.bytes == 12_000
        assert (peak.parts["weights"], peak.parts["activations"], peak.parts["temporaries"]) == (4000, 4000, 4000)
        assert peak.phase == "backward"
        assert ledger.phase_peaks() == {"forward": 8000, "backward": 12_000}
        assert ledger.rest("begin") == 4000
        assert ledger.peak("begin", "end", ["activations"]).bytes == 4000
        assert ledger.live_bytes == 4000 + result.nbytes

    def test_views_count_once_and_resizing_counts(self):
        with Ledger() as ledger:
            ledger.mark("begin")
            x = torch.empty(100)
            views = [x[:50], x.view(10, 10), x.t()]
            x.resize_(200)
            ledger.mark("end")
        assert ledger.live_bytes == 800
        assert ledger.peak("begin", "end").bytes == 800
        del views

    def test_roles_of_higher_rank_win(self):
        with Ledger() as ledger:
            ledger.mark("begin")
            x = torch.ones(10)
            ledger.assign("communication", [x])
            ledger.assign("gradients", [x])
            ledger.assign("activations", [x])
            ledger.mark("end")
        assert ledger.peak("begin", "end").parts["gradients"] == 40

    def test_quantized_moments_are_their_codes_and_scales(self):
        with Ledger() as ledger:
            ledger.mark("begin")
            moment = QuantizedState.zeros((1024,), code_map("power", 8, signed=True), 256, torch.device("cpu"), 0)
            ledger.assign("moments", [moment])
            ledger.mark("end")
        assert ledger.peak("begin", "end").parts["moments"] == 1024 + 4 * 4

    def test_it_agrees_with_the_allocator(self):
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        gc.collect()
        with profile, Ledger() as ledger:
            ledger.mark("begin")
            x = torch.randn(32, 64)
            model(x).square().mean().backward()
            ledger.mark("end")
        total = peak = 0
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            peak = max(peak, total)
        weights = sum(p.nbytes for p in model.parameters())  # made before the profile
        assert ledger.peak("begin", "end").bytes - weights == peak


class TestTraffic:
    def test_what_leaves_a_node(self):
        ring = Collective("step", "all-gather", "bfloat16", 700, tuple(range(8)))
        assert ring.leaves_node(0, 8) == 0
        assert ring.leaves_node(0, 4) == 700  # one rank of the node sends to the next node
        assert ring.leaves_node(0, 1) == 700
        inside = Collective("step", "all-gather", "bfloat16", 300, (0, 1, 2, 3))
        assert inside.leaves_node(0, 4) == 0
        between = Collective("backward", "all-reduce", "float32", 100, (0, 4))
        assert between.leaves_node(0, 4) == 400  # the node's other ranks have groups of their own

    def test_all_to_all(self):
        one = Collective("backward", "all-to-all", "uint8", 70, tuple(range(8)), (0, *[10] * 7))
        assert one.leaves_node(0, 4) == 4 * 10 * 4
        assert one.leaves_node(0, 8) == 0

    def test_totals(self):
        rows = [Collective("step", "all-gather", "bfloat16", 7, (0, 1))] * 3
        assert totals(rows, 0, 1) == [
            {"phase": "step", "operation": "all-gather", "dtype": "bfloat16", "ranks": 2, "calls": 3}
            | {"sent_bytes": 21, "node_bytes": 21}
        ]


class TestModels:
    def test_ways_to_name_one(self, tmp_path):
        preset, length = resolve_model("tiny")
        assert (preset["model_type"], preset["vocab_size"], length) == ("llama", 2048, 128)
        described, length = resolve_model("model_type=opt,hidden_size=64,ffn_dim=128,num_hidden_layers=2", length=32)
        assert (described["hidden_size"], described["num_hidden_layers"], length) == (64, 2, 32)
        (tmp_path / "config.json").write_text(json.dumps(preset))
        loaded, length = resolve_model(str(tmp_path))
        assert (loaded["hidden_size"], length) == (128, 128)
        with torch.device("meta"):
            assert sum(p.numel() for p in causal_model(preset).parameters()) == 1_328_256

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("tinny", {}, 'did you mean "tiny"'),
            ("model_type=llama,hidden_sise=64", {}, 'did you mean "hidden_size"'),
            ("model_type=llamma", {}, "--model"),
            ("hidden_size=4,layers", {}, "name=value"),
            ("hidden_size=4", {}, "add model_type="),
            ("model_type=t5", {}, "causal language models"),
            ("model_type=gpt2", {"length": 4096}, "at most 1024"),
            ("tiny", {"length": 1}, "at least 2"),
            ("model_type=gpt2", {"vocabulary": 100}, "presets' only"),
        ],
    )
    def test_those_that_make_no_sense(self, name, options, message):
        with pytest.raises(ConfigError, match=message) as caught:
            resolve_model(name, **options)
        assert "fix: " in str(caught.value)


class TestConfigs:
    def test_autos_are_filled(self, root):
        config = job_config(str(root / "ds_configs" / "all4.json"), world_size=4, rows=2, accumulation=3, stage=2)
        assert config["train_batch_size"] == 24
        assert config["zero_optimization"]["stage"] == 2
        assert config["bf16"]["enabled"] is True

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"fp16": {"enabled": True}}, "fp16: got"),
            ({"optimizer": {"type": "Lamb"}}, "optimizer.type"),
            ({"optimizer": {"type": "AdEMAMix"}}, "optimizer.type: .*others without ds_quant.optimizer"),
            ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer"),
            ({"pipeline": {"stages": 2}}, "pipeline"),
            ({"train_batch_size": 7}, "train_batch_size"),
            ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, "sub_group_size"),
        ],
    )
    def test_what_cannot_be_predicted_is_refused(self, root, change, message):
        raw = json.loads((root / "ds_configs" / "baseline.json").read_text()) | change
        with pytest.raises(ConfigError, match=message):
            job_config(raw, world_size=2, rows=1)

    def test_offloading(self):
        assert offloaded_roles({}) == ()
        zero = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        assert offloaded_roles({"zero_optimization": zero}) == ("masters", "moments", "weights")


class Formula:
    """Stands for dry runs where the search is tested: a peak that is known."""

    def __init__(self):
        self.jobs = []

    def predict(self, job: Job, **options):
        self.jobs.append(job)
        stage = job.config["zero_optimization"]["stage"]
        shared = 1000 if stage == 0 else 400 + 600 / job.world_size if stage < 3 else 1000 / job.world_size
        micro = [Collective("backward", "all-reduce", "float32", 10 + n, (0, 1)) for n in range(3)]
        count = job.config["gradient_accumulation_steps"]
        end = Collective("step", "all-gather", "bfloat16", 5, (0, 1))
        return Outcome(
            int(shared + 100 * job.rows), {}, "backward", {}, 0, 0, 1, [*micro[:count], end], list(range(count))
        )


@pytest.fixture
def request_of_plan(root):
    raw = json.loads((root / "ds_configs" / "baseline.json").read_text())
    return Request(raw, {"vocab_size": 8}, 16, 64, 4)


class TestSearch:
    def test_least_hardware(self, request_of_plan):
        planner = Planner(request_of_plan, Formula())
        # Stage 3 on 2 ranks takes 500 + 100 a sequence, the other stages 700 + 100 and more.
        assert planner.least_hardware(750, 64) == Setting(2, 3, 2)
        # On 2 ranks stage 1 takes 800, too.
        assert planner.least_hardware(800, 64) == Setting(2, 1, 1)
        assert planner.least_hardware(1100, 64) == Setting(1, 0, 1)
        assert planner.least_hardware(99, 64) is None
        assert planner.least_hardware(130, 8) is None
        assert planner.least_hardware(132, 64) == Setting(32, 3, 1)

    def test_largest_micro_batch(self, request_of_plan):
        planner = Planner(request_of_plan, Formula())
        assert planner.largest_rows(1, 0, 1000 + 6400) == 64
        assert planner.largest_rows(1, 0, 1000 + 900) == 8
        assert planner.largest_rows(1, 0, 1050) is None

    def test_many_micro_steps_are_counted_but_not_run(self, request_of_plan):
        formula = Formula()
        found = Planner(request_of_plan, formula).outcome(Setting(1, 0, 4))
        assert formula.jobs[0].config["gradient_accumulation_steps"] == 3
        assert [one.sent for one in found.collectives] == [10, 11, *[11] * 13, 12, 5]

    def test_sizes(self):
        assert divisors(12) == [1, 2, 3, 4, 6, 12]
        assert world_sizes(96, 8, 48) == [1, 2, 4, 8, 16, 32, 48]
        assert world_sizes(24, 6, 12) == [1, 2, 4, 6, 12]


class TestCommand:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--nodes", "0"], "--nodes: got 0"),
            (["--nodes", "9999", "--batch", "159984"], "at most 16384 ranks"),
            (["--batch", "7"], "--batch: got 7; allowed: multiples of the 2 ranks"),
            (["--micro-batch", "3"], "--micro-batch: got 3; allowed: divisors of the 4"),
            (["--gpu-memory", "80 apples"], "--gpu-memory"),
            (["--gpu-memory", "1GiB"], "--reserve"),
            (["--model", "no/such/model"], "--model"),
            (["--context", "4096"], "at most"),
            (["--config", "no.json"], "no.json"),
        ],
    )
    def test_bad_input_is_one_clear_error(self, root, change, message, capsys, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        config = str(root / "ds_configs" / "baseline.json")
        given = ["plan", "--config", config, "--model", "model_type=gpt2,n_positions=64", "--nodes", "1"]
        assert main([*given, "--gpus-per-node", "2", "--batch", "8", *change]) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert "fix: " in shown.err
        assert not shown.out

    def test_sizes(self):
        assert parse_size("x", "80GiB") == 80 * 2**30
        assert parse_size("x", "1.5 GB") == 1_500_000_000
        assert parse_size("x", "512") == 512

    @pytest.mark.timeout(180)
    def test_a_whole_plan(self, root, capsys):
        """A thousand ranks: what stage 3 shares out shrinks with their number, and the wire bytes are DeepSpeed's."""
        config = str(root / "ds_configs" / "adam8.json")
        model = "model_type=gpt2,n_embd=64,n_layer=2,n_head=2,vocab_size=512,n_positions=32"
        given = ["plan", "--config", config, "--model", model, "--nodes", "128", "--gpus-per-node", "8"]
        given += ["--batch", "1024", "--stage", "1", "--json"]
        assert main(given) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["ranks"], report["nodes"], report["micro_steps"]) == (1024, 128, 1)
        numel = report["parameters"]
        # Stage 1 aligns a partition to 2 elements (4 bytes).
        share = -(-numel // 2048) * 2
        assert report["at_peak"]["masters"] == 4 * share
        blocks = -(-share // 256)
        assert report["at_peak"]["moments"] == pytest.approx(2 * (share + 4 * blocks), abs=64)
        gathered = next(row for row in report["wire"] if row["phase"] == "step" and row["dtype"] == "bfloat16")
        assert gathered["sent_bytes"] == 2 * share * 1023
        assert any("a node sends" in line for line in lines(report))

    @pytest.mark.slow
    @pytest.mark.timeout(180)
    def test_weights_cross_between_nodes_once(self, root, capsys, tmp_path):
        """A message goes to each other node, and inside the node what came is passed on: two messages to one rank."""
        given = ["plan", "--model", "model_type=gpt2,n_embd=64,n_layer=1,n_head=2,vocab_size=64,n_positions=32"]
        given += ["--nodes", "2", "--gpus-per-node", "2", "--batch", "4", "--stage", "1", "--json", "--config"]
        gathers = {}
        for level in (False, True):
            raw = json.loads((root / "ds_configs" / "comm8.json").read_text())
            weight = {"mode": "difference", "bits": 8, "hierarchical": level}
            raw["ds_quant"]["communication"] = {"weight": weight}
            path = tmp_path / "config.json"
            path.write_text(json.dumps(raw))
            assert main([*given, str(path)]) == 0
            rows = json.loads(capsys.readouterr().out)["wire"]
            rows = [row for row in rows if row["operation"] == "all-gather" and row["dtype"] == "uint8"]
            gathers[level] = [sum(row[key] for row in rows) for key in ("sent_bytes", "node_bytes")]
        message = gathers[False][0] // 3
        assert gathers[False][0] == 3 * message > 0
        assert gathers[True] == [message + 2 * message, 2 * message]

    @pytest.mark.timeout(180)
    def test_codes_that_layers_hold_count(self, root, capsys, tmp_path):
        """At stage 3, of each weight that came as codes: a byte an element, and a scale for each output."""
        given = ["plan", "--model", "model_type=gpt2,n_embd=64,n_layer=1,n_head=2,vocab_size=64,n_positions=32"]
        given += ["--nodes", "1", "--gpus-per-node", "2", "--batch", "2", "--stage", "3", "--json", "--config"]
        raw = json.loads((root / "ds_configs" / "wire8.json").read_text())
        weights = {}
        for mode in ("codes", "none"):
            raw["ds_quant"]["communication"] = (
                {"weight": {"mode": mode}} if mode == "codes" else {"gradient": {"bits": 8}}
            )
            path = tmp_path / f"{mode}.json"
            path.write_text(json.dumps(raw))
            assert main([*given, str(path)]) == 0
            weights[mode] = json.loads(capsys.readouterr().out)["at_peak"]["weights"]
        outputs = 3 * 64 + 64 + 4 * 64 + 64
        assert weights["codes"] - weights["none"] == (64 + 4) * outputs + 3 * 64 * 64

    @pytest.mark.timeout(180)
    def test_threads_do_not_make_it_hang(self, root, capsys, monkeypatch):
        """In most shells OMP_NUM_THREADS is not set; dry runs are forks, and torch's threads do not survive one."""
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        config = str(root / "ds_configs" / "adam8.json")
        given = ["plan", "--config", config, "--model", "tiny", "--nodes", "1", "--gpus-per-node", "2"]
        assert main([*given, "--batch", "16"]) == 0
        assert "peak of a rank" in capsys.readouterr().out

    @pytest.mark.timeout(180)
    def test_what_fits_and_the_least_hardware(self, root, capsys, tmp_path):
        """By real dry runs: the bucket of gradients decides, which counts as communication."""
        config = json.loads((root / "ds_configs" / "adam8.json").read_text())
        config["zero_optimization"] |= {"stage": 2, "reduce_bucket_size": 500_000_000}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        model = "model_type=gpt2,n_embd=64,n_layer=2,n_head=2,vocab_size=512,n_positions=32"
        given = ["plan", "--config", str(path), "--model", model, "--nodes", "1", "--gpus-per-node", "2"]
        given += ["--batch", "4", "--reserve", "0GiB", "--json"]
        assert main([*given, "--gpu-memory", "1.1GB"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["fits"]
        assert report["at_peak"]["communication"] == 2 * 500_000_000
        assert report["at_peak"]["temporaries"] < 10_000_000
        least = report["least_hardware"]
        assert (least["ranks"], least["stage"], least["micro_batch"]) == (1, 0, 4)
        assert least["peak_bytes"] <= 1_100_000_000

        assert main([*given, "--gpu-memory", "0.2MB"]) == 1
        report = json.loads(capsys.readouterr().out)
        assert not report["fits"]
        assert "least_hardware" not in report


def test_an_outcome_survives_json():
    from ds_quant.planning.predict import read_outcome

    one = Outcome(1, {"weights": 1}, "step", {"step": 1}, 0, 0, 3, [Collective("a", "b", "c", 4, (0, 1), (0, 4))], [0])
    assert read_outcome(json.loads(json.dumps(dataclasses.asdict(one)))) == one
