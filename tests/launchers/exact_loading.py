"""Two ranks of a Trainer on a stream and on shards, once without a stop and once resumed; writes their losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpora import document_stream, shards
from corpora.loading import ExactLoading
from corpora.streaming import LaneStream, Plan
from survival.errors import LaunchError
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

CONTEXT = 8


def encode(texts: list[str]) -> list[list[int]]:
    return [[*([int(text)] * (int(text) * 7 % 19)), 1] for text in texts]


def stream(folder: str, training: TrainingArguments) -> LaneStream:
    opened = document_stream.from_hub(folder, None, "text")["train"]
    plan = Plan("here", opened.num_parts, 4, CONTEXT, 3, 4, {}, "t")
    return LaneStream(opened, encode, plan, global_batch=8, rank=training.process_index, world_size=training.world_size)


def packed(folder: Path, training: TrainingArguments) -> shards.PackedShards:
    tokens = np.random.default_rng(0).integers(2, 100, 44 * CONTEXT).astype("<u2")
    if training.process_index == 0:
        tokens.tofile(folder / "train-00000.bin")
    training.distributed_state.wait_for_everyone()
    files = [shards.Shard("train-00000.bin", len(tokens), 1, "")]
    index = shards.Index(folder, tokens.dtype, 100, "", files, [])
    return shards.PackedShards(index, files, CONTEXT)


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def run(name: str, folder: str, out: Path, *, workers: int, resume: str | None) -> list[Any]:
    training = TrainingArguments(
        output_dir=str(out / name),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=9,
        save_steps=1,
        logging_steps=1,
        dataloader_num_workers=workers,
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-2,
        ddp_find_unused_parameters=False,
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    # Dropout: the generators must go on too, and loading must not draw from them.
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, attention_dropout=0.2, **shape))
    data = stream(folder, training) if name == "stream" else packed(out, training)
    trainer = ExactLoading(model=model, args=training, train_dataset=data, data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = [[entry["step"], entry["loss"], entry["grad_norm"], entry["epoch"]] for entry in logs]
    return kept if resume is None else [entry for entry in kept if entry[0] > int(resume.rsplit("-", 1)[1])]


def main() -> None:
    # An epoch of the shards is five steps: step 7 is in the middle of the second.
    folder, out = sys.argv[1], Path(sys.argv[2])
    for name, step in (("stream", 4), ("shards", 7)):
        whole = run(name, folder, out, workers=0, resume=None)
        resumed = run(name, folder, out, workers=2, resume=str(out / name / f"checkpoint-{step}"))
        # A stream's checkpoint has no order of shards, and shards have no lanes.
        try:
            run("shards", folder, out, workers=0, resume=str(out / "stream" / f"checkpoint-{step}"))
        except LaunchError as error:
            refused = str(error)
        if torch.distributed.get_rank() == 0:
            (out / f"{name}.json").write_text(json.dumps({"whole": whole, "resumed": resumed, "refused": refused}))
    torch.distributed.destroy_process_group()


main()
