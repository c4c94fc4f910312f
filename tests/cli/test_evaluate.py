"""`ds_quant evaluate`: perplexity, quantizers, means, and what it leaves behind."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from corpora import packing
from evaluate_files import CONTEXT, W8A8, refused, section, write_json, write_model
from helpers.samples import write_corpus
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ds_quant.cli import evaluate
from ds_quant.cli.evaluating import arguments, perplexity, results, texts
from ds_quant.cli.shared import loaded_model, text_files

W4 = {"weight": {"bits": 4}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two W8A8 runs and two in full precision, a corpus, and JSONs of other quantizers."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_corpus(folder / "corpus.jsonl")
    write_json(folder / "w4.json", section(W4))
    for seed in (1, 2):
        write_model(folder / f"w8a8-s{seed}", W8A8, seed=seed)
        write_model(folder / f"baseline-s{seed}", None, seed=seed)
    return folder


@pytest.fixture
def evaluated(files, tmp_path, capsys):
    """Evaluates and returns what is in the JSON."""

    def run(*argv, models=("w8a8-s1",), text=True):
        output = tmp_path / f"{time.monotonic_ns()}.json"
        texts = ["--text_file", files / "corpus.jsonl", "--max_windows", 8] if text else []
        argv = [*(files / model for model in models), *texts, *argv, "--output", output]
        assert evaluate.main(list(map(str, argv))) == 0, capsys.readouterr().err
        return json.loads(output.read_text())

    return run


# ---- windows and losses


@given(tokens=st.integers(0, 200), length=st.integers(2, 40), data=st.data())
def test_every_token_that_something_predicts_is_scored_once(tokens, length, data):
    stride = data.draw(st.integers(1, length))
    found = perplexity.windows(tokens, length, stride)
    scored = [token for window in found for token in range(window.end - window.scored, window.end)]
    starts = set(range(0, tokens, length)) if stride == length else {0}
    assert scored == [token for token in range(tokens) if token not in starts]
    for window in found[1:]:
        # What the docs promise: a token has length - stride tokens in front of it, but where none overlap.
        assert window.end - window.scored - window.begin >= max(1, length - stride)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizers", ["trained", "off"])
def test_the_loss_is_that_of_transformers_on_the_same_windows(files, dtype, quantizers):
    loaded = loaded_model.load_model(files / "w8a8-s1", quantizers=quantizers, dtype=dtype)
    documents = [json.loads(line)["text"] for line in (files / "corpus.jsonl").read_text().splitlines()][:3]
    tokens = texts.Text("corpus", documents, "").tokens(loaded.tokenizer, texts.BLANK_LINES)
    ids = loaded.tokenizer("\n\n".join(documents), return_tensors="pt")["input_ids"]
    assert torch.equal(tokens.ids, ids[0])
    measured = perplexity.measure(loaded.model, tokens, length=CONTEXT, stride=CONTEXT, batch_size=3)
    total = scored = 0
    for begin in range(0, ids.shape[1], CONTEXT):
        window = ids[:, begin : begin + CONTEXT]
        if window.shape[1] > 1:
            with torch.no_grad():
                total += loaded.model(input_ids=window, labels=window).loss.double().item() * (window.shape[1] - 1)
            scored += window.shape[1] - 1
    assert ids.shape[1] % CONTEXT > 1  # the last window is a part of one, and counts
    assert measured.scored_tokens == scored
    assert measured.loss == pytest.approx(total / scored, rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(total / scored), rel=1e-5)
    per_byte = measured.loss / math.log(2) * ids.shape[1] / len("\n\n".join(documents).encode())
    assert measured.bits_per_byte == pytest.approx(per_byte, rel=1e-12)


def test_a_sliding_window_scores_each_token_in_its_own_context(files):
    loaded = loaded_model.load_model(files / "w8a8-s1", quantizers="off")
    ids = torch.randint(3, 300, (70,), generator=torch.Generator().manual_seed(0))
    tokens = texts.Tokens("random", ids, num_bytes=70, num_words=70)
    measured = perplexity.measure(loaded.model, tokens, length=CONTEXT, stride=8, batch_size=4)
    total = 0.0
    for token in range(1, 70):
        # The first window that has it, a stride after the other, until one reaches the end.
        begin = 8 * max(0, -(-(token - CONTEXT + 1) // 8))
        with torch.no_grad():
            logits = loaded.model(input_ids=ids[None, begin:token]).logits[0, -1].double()
        total -= torch.log_softmax(logits, -1)[ids[token]].item()
    assert measured.scored_tokens == 69
    assert measured.loss == pytest.approx(total / 69, rel=1e-5)  # other shapes: fp32 products sum in another order
    assert measured.loss != pytest.approx(
        perplexity.measure(loaded.model, tokens, length=CONTEXT, stride=CONTEXT, batch_size=4).loss, rel=1e-4
    )


def test_joined_by_eos_it_is_the_validation_of_the_training(files, evaluated):
    rows = evaluated("--join", "eos", "--max_windows", 8, text=True)["rows"]
    loaded = loaded_model.load_model(files / "w8a8-s1")
    held = text_files.read_files([str(files / "corpus.jsonl")], "text", "--text_file")
    tokenized = packing.tokenize(held, loaded.tokenizer, what="validation")
    packed = packing.EvenSubset(packing.PackedDataset(tokenized, CONTEXT), 8)
    batch = torch.stack([packed[index]["input_ids"] for index in range(8)])
    with torch.no_grad():
        loss = loaded.model(input_ids=batch, labels=batch).loss.item()
    assert rows[0]["perplexity"]["corpus.jsonl"]["loss"] == pytest.approx(loss, rel=1e-6)


def test_batches_change_nothing_where_scales_are_per_token(evaluated):
    one, many = (evaluated("--batch_size", size)["rows"][0]["perplexity"]["corpus.jsonl"] for size in (1, 8))
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)


# ---- quantizers


def test_on_off_and_other_are_three_reproducible_results(files, evaluated):
    argv = ("--quantizers", "trained", "off", files / "w4.json")
    first, second = evaluated(*argv), evaluated(*argv)
    assert first["rows"] == second["rows"]
    assert [row["quantizers"] for row in first["rows"]] == ["trained", "off", "w4"]
    assert [row["linear"] and row["linear"]["weight"]["bits"] for row in first["rows"]] == [8, None, 4]
    losses = [row["perplexity"]["corpus.jsonl"]["loss"] for row in first["rows"]]
    assert len(set(losses)) == 3
    assert abs(losses[2] - losses[1]) > 3 * abs(losses[0] - losses[1])  # four bits are coarser than eight
    assert all(row["step"] == 40 and row["trained"]["weight"]["bits"] == 8 for row in first["rows"])
    assert {row["weights"][0]["sha256"] for row in first["rows"]} == {first["rows"][0]["weights"][0]["sha256"]}


def test_a_baseline_has_one_row_without_quantizers(files, evaluated, capsys):
    found = evaluated("--quantizers", "trained", "off", files / "w4.json", models=["baseline-s1"])
    assert [row["quantizers"] for row in found["rows"]] == ["off", "w4"]
    assert "baseline-s1 was trained without quantizers" in found["notes"][0]


def test_settings_without_meaning_here_are_named(files, evaluated, tmp_path):
    linear = {**W4, "gradient": {"bits": 8}}
    both = write_json(tmp_path / "both.json", section(linear, optimizer={"exp_avg": {"bits": 8}}))
    found = evaluated("--quantizers", files / "w4.json", both)
    assert found["notes"] == [f"{both}: without meaning in an evaluation: optimizer, linear.gradient"]
    same = [row["perplexity"] for row in found["rows"]]
    assert same[0] == same[1]


def test_stochastic_rounding_repeats_itself_and_is_named(evaluated, tmp_path):
    linear = {"activation": {"bits": 4, "rounding": "stochastic"}}
    stochastic = write_json(tmp_path / "stochastic.json", section(linear))
    torch.manual_seed(1)
    first = evaluated("--quantizers", stochastic)
    torch.manual_seed(2)
    assert evaluated("--quantizers", stochastic)["rows"] == first["rows"]
    assert "rounded by a fixed key" in first["notes"][0]


def test_scales_shared_by_a_batch_are_named(evaluated, tmp_path):
    shared = write_json(tmp_path / "shared.json", section({"activation": {"bits": 8, "granularity": "tensor"}}))
    assert "share scales over a batch" in evaluated("--quantizers", shared)["notes"][0]


# ---- means and outputs


def test_means_over_seeds_and_paired_gaps(files, evaluated):
    models = ["w8a8-s1", "w8a8-s2", "baseline-s1", "baseline-s2"]
    found = evaluated("--quantizers", "trained", "off", "--baseline", "baseline", models=models)
    losses = {
        (row["config"], row["quantizers"], row["seed"]): row["perplexity"]["corpus.jsonl"]["loss"]
        for row in found["rows"]
    }
    means = {(mean["config"], mean["quantizers"]): mean for mean in found["means"]}
    assert set(means) == {("w8a8", "trained"), ("w8a8", "off"), ("baseline", "off")}
    own = [losses["w8a8", "trained", seed] for seed in (1, 2)]
    base = [losses["baseline", "off", seed] for seed in (1, 2)]
    mean = means["w8a8", "trained"]
    assert mean["seeds"] == [1, 2]
    assert mean["figures"]["corpus.jsonl: loss"]["mean"] == pytest.approx(sum(own) / 2)
    assert mean["figures"]["corpus.jsonl: loss"]["deviation"] == pytest.approx(abs(own[0] - own[1]) / math.sqrt(2))
    gaps = [own[0] - base[0], own[1] - base[1]]
    assert mean["gaps"]["corpus.jsonl: loss"]["mean"] == pytest.approx(sum(gaps) / 2)
    # Student's t of one degree of freedom, 12.706, times the standard error of two differences.
    width = 12.706 * abs(gaps[0] - gaps[1]) / 2
    assert mean["gaps"]["corpus.jsonl: loss"]["half_width"] == pytest.approx(width)
    assert means["baseline", "off"]["gaps"] == {}
    lonely = evaluated("--quantizers", "off", "--baseline", "baseline", models=models[:3])
    mean = next(mean for mean in lonely["means"] if mean["config"] == "w8a8")
    pair = losses["w8a8", "off", 1] - losses["baseline", "off", 1]
    assert mean["gaps"]["corpus.jsonl: loss"] == {"num_pairs": 1, "mean": pytest.approx(pair), "half_width": None}


def test_models_that_are_not_told_apart_are_named(files, evaluated, tmp_path):
    copied = shutil.copytree(files / "w8a8-s1", tmp_path / "again" / "w8a8-s1")
    found = evaluated(models=["w8a8-s1", copied])
    assert [row["name"] for row in found["rows"]] == [str(files / "w8a8-s1"), str(copied)]
    assert found["notes"] == ["2 models are w8a8 with seed 1: means take the first"]


def test_checkpoints_of_a_run_are_configs_of_their_own(files, evaluated, tmp_path):
    for step in (20, 40):
        shutil.copytree(files / "w8a8-s1" / "model", tmp_path / "w8a8-s1" / f"checkpoint-{step}")
    models = [tmp_path / "w8a8-s1" / f"checkpoint-{step}" for step in (20, 40)]
    rows = evaluated(models=models)["rows"]
    assert [(row["name"], row["config"], row["seed"]) for row in rows] == [
        ("w8a8-s1/checkpoint-20", "w8a8/checkpoint-20", 1),
        ("w8a8-s1/checkpoint-40", "w8a8/checkpoint-40", 1),
    ]


def test_both_tables_are_written(files, tmp_path, capsys):
    outputs = [tmp_path / "r.json", tmp_path / "r.md"]
    command = [files / "w8a8-s1" / "model", files / "w8a8-s2"]
    command += ["--text_file", files / "corpus.jsonl", "--max_windows", 4, "--output", *outputs]
    assert evaluate.main([str(word) for word in command]) == 0
    said = capsys.readouterr().out
    found = json.loads(outputs[0].read_text())
    page = outputs[1].read_text()
    assert [row["name"] for row in found["rows"]] == ["w8a8-s1", "w8a8-s2"]
    assert found["settings"]["context_length"] == CONTEXT
    assert found["versions"]["torch"]
    loss = f"{found['rows'][0]['perplexity']['corpus.jsonl']['loss']:.5f}"
    assert loss in page
    assert loss in said
    assert found["command"] in page
    assert "± " in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]


def test_figures_that_are_not_finite_are_null():
    nan = perplexity.Perplexity(math.nan, math.nan, math.nan, math.inf, 10, 9, 1)
    row = results.Row("m", "m", None, "off", {"linear": None, "exported": False}, {"text": nan})
    content = results.to_json([row], [], {})
    assert content["rows"][0]["perplexity"]["text"]["loss"] is None
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_a_wide_table_fits_the_terminal(capsys):
    measured = perplexity.Perplexity(1.5, 4.48, 1.0, 9.0, 10, 9, 1)
    row = results.Row("model", "model", None, "off", {"linear": None, "exported": False})
    row.perplexity = {f"text-{number}": measured for number in range(9)}
    results.show([row], [])
    said = capsys.readouterr().out
    assert said.count("1.50000") == said.count("4.48") == 9
    assert said.count("model") == 2 * 5  # in each part, a head and a row
    assert max(map(len, said.splitlines())) <= 130


def test_an_interrupted_run_writes_nothing(files, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text((files / "corpus.jsonl").read_text() * 40)
    output = tmp_path / "r.json"
    output.write_text("{}")
    command = [sys.executable, "launchers/evaluate.py", str(files / "w8a8-s1"), "--text_file", str(long)]
    command += ["--batch_size", "1", "--output", str(output), "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert "1 of 1" in process.stdout.readline()
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=200) == -signal.SIGTERM
    finally:
        process.kill()
        process.stdout.close()
    assert output.read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt", "r.json"]


# ---- bad input


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "nothing to measure"),
        (["--dataset", "wikitext"], "'wikitext'; allowed: wikitext2"),
        (["--text_file", "nowhere.txt"], "got nowhere.txt, but there is no such file"),
        (["--text_file", "{files}/w8a8-s1/model/config.json"], "got no column 'text'"),
        (["--dataset", "python-source", "--context_length", "64"], "at most the 32 positions of w8a8-s1"),
        (["--dataset", "python-source", "--context_length", "1"], "--context_length: got 1"),
        (["--dataset", "python-source", "--stride", "33"], "--stride: got 33; allowed: 1 to the context length of 32"),
        (["--dataset", "python-source", "--batch_size", "0"], "--batch_size: got 0"),
        (["--dataset", "python-source", "--validation_fraction", "2"], "between 0 and 1"),
        (["--dataset", "python-source", "--quantizers", "on"], "on"),
        (["--dataset", "python-source", "--quantizers", "ds_configs/adam8.json"], "no linear.weight and no linear.act"),
        (["--dataset", "python-source", "--baseline", "baseline"], "--baseline: got 'baseline'"),
        (["--dataset", "python-source", "--device", "gpu"], "a device that is there"),
        (["--dataset", "python-source", "--output", "{files}/w4.json"], "which exists"),
        (["--dataset", "python-source", "--output", "r.csv"], ".json or .md"),
        (["--dataset", "python-source", "--output", "{files}/no/r.json"], "a folder that exists"),
        (["--dataset", "python-source", "--output", "r.json", "r.json"], "--output: got r.json twice"),
        (["--dataset", "python-source", "--quantizers", "off", "off"], "--quantizers: got off twice"),
        (["--dataset", "python-source", "--contextlength", "8"], "--contextlength"),
        (["--tasks", "x", "--include_path", "nowhere"], "--include_path: got 'nowhere'"),
        (["--tasks", "x", "--limit", "0"], "--limit: got 0"),
    ],
)
def test_what_is_refused(files, capsys, argv, said):
    before = sorted(files.rglob("*"))
    argv = [word.format(files=files) for word in argv]
    assert said in refused([files / "w8a8-s1", *argv], capsys)
    assert sorted(files.rglob("*")) == before


def test_too_few_tokens_are_refused(files, capsys, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("x")
    assert "short.txt: got 1 tokens" in refused([files / "w8a8-s1", "--text_file", short], capsys)


def remove_tokenizer(model):
    for path in model.glob("tokenizer*"):
        path.unlink()


def remove_eos(model):
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"eos_token": None}
    write_json(model / "tokenizer_config.json", config)


def add_token(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["value"])  # a word of the corpus
    tokenizer.save_pretrained(model)


@pytest.mark.parametrize(
    ("change", "argv", "said"),
    [
        (remove_tokenizer, [], "got no tokenizer"),
        (remove_eos, ["--join", "eos"], "without an end-of-sequence"),
        (add_token, [], "with the id 320 and a model of 320 ids"),
    ],
)
def test_a_tokenizer_that_does_not_go_with_it_is_refused(files, capsys, tmp_path, change, argv, said):
    model = shutil.copytree(files / "w8a8-s1" / "model", tmp_path / "model")
    change(model)
    assert said in refused([model, "--text_file", files / "corpus.jsonl", *argv], capsys)


def test_two_texts_of_one_name_are_refused(files, capsys, tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    argv = [files / "w8a8-s1", "--text_file", tmp_path / "corpus.jsonl", files / "corpus.jsonl"]
    assert "two texts named corpus.jsonl" in refused(argv, capsys)


@pytest.mark.parametrize("name", sorted(texts.HUB))
def test_without_the_hub_the_error_names_the_other_way(files, capsys, name, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    said = refused([files / "w8a8-s1", "--dataset", name], capsys)
    assert said.startswith(
        f"error: --dataset {name}: got a test part of {texts.HUB[name].name} that could not be loaded"
    )
    assert said.endswith("give it with --text_file\n")


def test_paper_is_the_papers_list():
    asked = arguments.parse(["m", "--dataset", "paper", "--tasks", "paper"], prog="evaluate", description="")
    assert asked.dataset == ["wikitext103", "wikitext2", "ptb", "1bw"]
    assert len(asked.tasks) == 10
    assert (asked.num_fewshot, asked.seeds) == (5, [0, 1, 2, 3, 4])
    asked = arguments.parse(
        ["m", "--tasks", "paper", "--num_fewshot", "0", "--seeds", "7"], prog="evaluate", description=""
    )
    assert (asked.num_fewshot, asked.seeds) == (0, [7])
