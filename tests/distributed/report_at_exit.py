"""A native loop of one rank that ends: python report_at_exit.py FOLDER."""

import sys

import torch
from torch import nn

import ds_quant

engine, *_ = ds_quant.initialize(
    model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)),
    optimizer=None,
    config={
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "ds_quant": {"diagnostics": {"every": 2, "output_dir": sys.argv[1]}},
    },
)
for step in range(5):
    loss = engine(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean()
    engine.backward(loss)
    engine.step()
