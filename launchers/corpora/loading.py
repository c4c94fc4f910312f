"""Reads token shards and streams in an order that depends only on the seed and the global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from survival.errors import mistake
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from corpora.permutation import PermutedBatches
from corpora.shards import PackedShards
from corpora.streaming import LaneLoader, LaneStream

_SHARDS_STATE = "data_state.json"


class ExactLoading(Trainer):
    """A Trainer whose training data may be `PackedShards` or a `LaneStream`; other data are loaded as usual.

    Neither uses accelerate's loaders. They would read a whole stream on one rank and send its parts to the others, and
    turn the order of an epoch into a list of Python integers: gigabytes per rank for millions of sequences.
    """

    _lane_loader: LaneLoader | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; a stream first moves to the checkpoint's position."""
        if isinstance(self.train_dataset, LaneStream):
            self.add_callback(_ShareOfRun())
        if resume_from_checkpoint:
            self._go_on_from(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """As in Trainer, with our own loaders for shards and streams."""
        args, dataset = self.args, self.train_dataset
        if isinstance(dataset, LaneStream):
            # The loader starts at the checkpoint; the Trainer would skip the same number of batches again.
            args.ignore_data_skip = True
            self._lane_loader = LaneLoader(
                dataset,
                batch_size=args.per_device_train_batch_size,
                workers=args.dataloader_num_workers,
                prefetch_factor=args.dataloader_prefetch_factor,
                start_method=args.dataloader_multiprocessing_context,
            )
            return self._lane_loader
        if isinstance(dataset, PackedShards):
            return DataLoader(
                dataset,
                batch_sampler=PermutedBatches(
                    len(dataset),
                    global_batch=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
                    batch_size=args.per_device_train_batch_size,
                    rank=args.process_index,
                    world_size=args.world_size,
                    seed=self._data_seed,
                ),
                collate_fn=self.data_collator,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
                persistent_workers=args.dataloader_persistent_workers,
                prefetch_factor=args.dataloader_prefetch_factor,
                multiprocessing_context=args.dataloader_multiprocessing_context,
                # A separate generator; otherwise the workers' seeds would be drawn from the one that dropout uses.
                generator=torch.Generator().manual_seed(0),
            )
        return super().get_train_dataloader()

    def _save_rng_state(self, output_dir: str) -> None:
        """As in Trainer, where each rank saves its own state; this adds the position in the stream."""
        super()._save_rng_state(output_dir)
        if self._lane_loader is not None:
            self._lane_loader.save(output_dir)
        elif isinstance(self.train_dataset, PackedShards) and self.args.process_index == 0:
            (Path(output_dir) / _SHARDS_STATE).write_text(json.dumps(self.train_dataset.state(self._data_seed)))

    @property
    def _data_seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _go_on_from(self, checkpoint: Path) -> None:
        """Move to the checkpoint's position; raises LaunchError if the checkpoint was reading other data."""
        if isinstance(self.train_dataset, LaneStream):
            self.train_dataset.load(str(checkpoint))
            return
        state = checkpoint / _SHARDS_STATE
        before = json.loads(state.read_text()) if state.is_file() else None
        now = self.train_dataset.state(self._data_seed) if isinstance(self.train_dataset, PackedShards) else None
        if any(checkpoint.glob("data_state_rank*.json")):
            before = "lanes of a stream"
        if before != now:
            raise mistake(
                str(checkpoint),
                f"a checkpoint that was reading other data: {before or 'text in memory'}",
                f"the data of this run, {now or 'text in memory'}",
                "resume with the same --train_shards, or the same way of reading, seed and --context_length; or start "
                "afresh",
            )


class _ShareOfRun(TrainerCallback):
    """Sets the epoch of a stream, which has none; the Trainer would count the steps since the last start."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps
