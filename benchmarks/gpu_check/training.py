"""Step 8: pretrain.py with full_int8.json on the GPU, by stage and with offload, beside the same run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_check.recording import Record
from benchmarks.gpu_check.running import ROOT
from ds_quant.base.process_group import free_port
from ds_quant.cli.shared.run_folder import read_metrics

_CONFIG = ROOT / "ds_configs" / "full_int8.json"
_RESERVE = 8
"""Seconds of the step's time for what is not a run."""
_TAIL = 1500
_END = "</s>"
_WORDS = "def return self value if else for in range print import None yield".split()


class Run(NamedTuple):
    """One run of pretrain.py."""

    name: str
    stage: int
    zero: dict[str, Any]
    """More of `zero_optimization`."""
    on_cpu: bool = False
    after: str | None = None
    """The run whose checkpoint of the middle it goes on from."""
    ranks: int = 1


class Ended(NamedTuple):
    """What a run has left."""

    status: int
    losses: dict[int, float]
    """Training losses by step."""
    eval_loss: float | None
    seconds: float
    tail: str


REFERENCE = Run("CPU, ZeRO 1", 1, {}, on_cpu=True)
REFERENCE_3 = Run("CPU, ZeRO 3", 3, {}, on_cpu=True)
"""Stage 3 initializes in parts, and so differently."""
_STOPPED = Run("ZeRO 1", 1, {})
_RESUMED = Run("ZeRO 1, resumed from the middle", 1, {}, after="ZeRO 1")
_RESUMED_ON_CPU = _RESUMED._replace(after=REFERENCE.name)
_RUNS = (
    REFERENCE,
    REFERENCE_3,
    _STOPPED,
    Run("ZeRO 2, overlap_comm", 2, {"overlap_comm": True}),
    Run("ZeRO 3", 3, {}),
    Run("ZeRO 2, optimizer offloaded", 2, {"offload_optimizer": {"device": "cpu", "pin_memory": True}}),
    _RESUMED,
)
_TWO_RANKS = Run("ZeRO 2, two ranks over NCCL", 2, {"overlap_comm": True}, ranks=2)


def run(record: Record) -> None:
    """All runs, several at a time: what they wait for is mostly imports."""
    gpus = 0 if record.dry_run else torch.cuda.device_count()
    runs = record.pick((*_RUNS, _TWO_RANKS) if gpus > 1 else _RUNS, (REFERENCE, _RESUMED_ON_CPU))
    steps = record.pick(20, 4)
    with tempfile.TemporaryDirectory() as folder:
        ended = _run_all(list(runs), Path(folder), steps, record)
    gaps = {
        each.name: loss_gap(ended[each.name], ended[reference_of(each).name])
        for each in runs
        if each is not reference_of(each)
    }
    for each in runs:
        own = ended[each.name]
        record.row(
            "runs of pretrain.py",
            run=each.name,
            exit_status=own.status,
            last_loss=own.losses.get(steps),
            eval_loss=own.eval_loss,
            largest_gap=gaps.get(each.name),
            seconds=own.seconds,
        )
        if own.status:
            record.row("failures", run=each.name, output=own.tail)
    record.measure("failed_runs", sum(own.status != 0 for own in ended.values()))
    if record.dry_run and any(own.status for own in ended.values()):
        # Nothing else would tell: a dry run is not judged.
        raise RuntimeError("; ".join(f"{name}: {own.tail[-500:]}" for name, own in ended.items() if own.status))
    found = [gap for name, gap in gaps.items() if gap is not None and name != _TWO_RANKS.name]
    if found:
        record.measure("worst_loss_gap", max(found))
    else:
        record.not_measured("worst_loss_gap", "no run has losses to compare")
    two_ranks = gaps.get(_TWO_RANKS.name)
    if two_ranks is not None:
        record.measure("nccl_loss_gap", two_ranks)
    else:
        record.not_measured("nccl_loss_gap", "two ranks over NCCL need two GPUs that train")


def reference_of(each: Run) -> Run:
    """The run on the CPU that it is compared with."""
    return REFERENCE_3 if each.stage == 3 else REFERENCE


def loss_gap(own: Ended, reference: Ended) -> float | None:
    """The largest distance of losses at the same step, that of the evaluation at the end included; None without any.

    A loss that is no number is infinitely far.
    """
    pairs = [(own.losses[step], reference.losses[step]) for step in own.losses.keys() & reference.losses.keys()]
    if own.eval_loss is not None and reference.eval_loss is not None:
        pairs.append((own.eval_loss, reference.eval_loss))
    if own.status or reference.status or not pairs:
        return None
    gaps = [abs(a - b) for a, b in pairs]
    return float("inf") if any(gap != gap for gap in gaps) else max(gaps)


def write_corpus(path: Path) -> list[str]:
    """Forty documents of Python-like text, as .jsonl; returns them."""
    texts = []
    for number in range(40):
        text = "".join(
            f"{' ' * 4 * (line % 3)}{_WORDS[(number + line) % 13]} {_WORDS[(number * line) % 13]}_{line % 7}:\n"
            for line in range(60)
        )
        texts.append(text)
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return texts


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """A BPE tokenizer of bytes, by a package that comes with transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "pad_token": _END}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


def _run_all(runs: list[Run], folder: Path, steps: int, record: Record) -> dict[str, Ended]:
    corpus = folder / "documents.jsonl"
    write_tokenizer(folder / "tokenizer", write_corpus(corpus))
    names = [each.name for each in runs]
    futures: dict[str, Future[Ended]] = {}
    with ThreadPoolExecutor(max(2, min(7, (os.cpu_count() or 1) // 2))) as pool:
        for number, each in enumerate(runs):
            own = folder / str(number)
            resume: Path | None = None
            if each.after is not None:
                # It must have ended: its checkpoint is of the middle, whole.
                futures[each.after].result()
                resume = folder / str(names.index(each.after)) / "run" / f"checkpoint-{steps // 2}"
            futures[each.name] = pool.submit(_run, each, own, corpus, steps, resume, record)
        return {name: future.result() for name, future in futures.items()}


def _run(each: Run, folder: Path, corpus: Path, steps: int, resume: Path | None, record: Record) -> Ended:
    folder.mkdir()
    content = json.loads(_CONFIG.read_text(encoding="utf-8"))
    content["zero_optimization"] |= {"stage": each.stage, **each.zero}
    config, out, log = folder / "config.json", folder / "run", folder / "log"
    config.write_text(json.dumps(content), encoding="utf-8")
    size = record.pick((256, 768, 128), (32, 64, 32))
    shape = f"num_hidden_layers=2,hidden_size={size[0]},intermediate_size={size[1]}"
    flags = {
        "deepspeed": config,
        "output_dir": out,
        "train_file": corpus,
        "validation_fraction": 0.2,
        "tokenizer_name": corpus.with_name("tokenizer"),
        "config_overrides": shape,
        "context_length": size[2],
        "global_batch_size": 4,
        "max_eval_sequences": 8,
        "max_steps": steps,
        "warmup_steps": 2,
        "logging_steps": 1,
        "eval_steps": steps,
        "eval_on_start": "false",
        "save_steps": steps // 2,
        "save_total_limit": 2,
        "disable_tqdm": "true",
    }
    if not record.dry_run:
        # Of both alike, whatever the processor is fast at.
        flags["bf16"] = "true"
    if resume is not None:
        flags["resume_from_checkpoint"] = resume
    words = [str(ROOT / "launchers" / "pretrain.py")]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    launcher = [sys.executable]
    if each.ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(each.ranks)]
        launcher += [*torchrun, "--master_port", str(free_port())]
    on_cpu = each.on_cpu or record.dry_run
    environment = {**os.environ, **({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})}
    begin = time.monotonic()
    with log.open("wb") as output:
        # Within the step's own process group: who kills that, kills it too.
        try:
            status = subprocess.run(
                [*launcher, *words],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, record.end - _RESERVE - time.monotonic()),
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    rows = read_metrics(out / "metrics.csv") if (out / "metrics.csv").exists() else []
    losses = {int(row["step"] or 0): row["train_loss"] for row in rows if row["train_loss"] is not None}
    evaluated = [row["eval_loss"] for row in rows if row["eval_loss"] is not None]
    tail = log.read_text(errors="replace")[-_TAIL:] if status else ""
    return Ended(status, losses, evaluated[-1] if evaluated else None, time.monotonic() - begin, tail)
