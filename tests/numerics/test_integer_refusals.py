"""Arguments that integer quantization refuses, and what importing it takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_quant.numerics import fake_quantize, fold_key, quantize, random_bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.float64)}, r"\(x\): got torch.float64; allowed: float32, bfloat16, float16; "),
        ({"x": torch.ones(3, dtype=torch.int32)}, r"\(x\): got torch.int32; allowed: "),
        ({"bits": 1}, r"\(bits\): got 1; allowed: integers 2 to 8; "),
        ({"bits": 9}, r"\(bits\): got 9; allowed: "),
        ({"bits": 4.0}, r"\(bits\): got 4.0; allowed: "),
        ({"bits": True}, r"\(bits\): got True; allowed: "),
        ({"granularity": "channel"}, r"\(granularity\): got 'channel'; allowed: tensor, row, column, block; "),
        ({"granularity": "block", "block_size": 8}, r"\(block_size\): got 8; allowed: powers of two from 16 to 4096; "),
        ({"granularity": "block", "block_size": 8192}, r"\(block_size\): got 8192; allowed: "),
        ({"granularity": "block", "block_size": 48}, r"\(block_size\): got 48; allowed: "),
        ({"granularity": "block", "block_size": 64.5}, r"\(block_size\): got 64.5; allowed: "),
        ({"rounding": "up"}, r"\(rounding\): got 'up'; allowed: nearest, stochastic; "),
        (
            {"rounding": "stochastic"},
            r"\(key\): got None; allowed: a key with rounding 'stochastic'; ",
        ),
        ({"key": fold_key(0)}, r"\(key\): got a key; allowed: none with rounding 'nearest'"),
        ({"rounding": "stochastic", "key": torch.ones(2)}, r"\(key\): got torch.float32 of shape \(2,\); allowed: "),
        ({"rounding": "stochastic", "key": random_bits(fold_key(0), 3)}, r"\(key\): got torch.int64 of shape \(3,\); "),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    arguments = {"x": torch.ones(3), "bits": 8, **arguments}
    for function in (quantize, fake_quantize):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_block_size_counts_for_blocks_only():
    assert quantize(torch.ones(3), 8, granularity="row", block_size=7).codes.tolist() == [127, 127, 127]


@pytest.mark.thorough
def test_importing_touches_neither_the_frameworks_nor_an_accelerator():
    program = (
        "import sys, torch, ds_quant.numerics\n"
        "assert not {'deepspeed', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
