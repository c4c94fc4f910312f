"""Relative quantization error of real gradients by bits, block size and rotation: a table of
docs/results/2026-11-22-communication.md.

    python tests/convergence/gradient_errors.py runs/tiny/model

MODEL is what launchers/pretrain.py left: the gradients of its weights, and of fresh ones of the same architecture, on
2048 tokens of the Python library's source.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_quant.numerics import integer, rotation

ROWS, LENGTH = 16, 128
BLOCK_SIZES = (32, 64, 128, 256, 512)


def gradients(model, tokens):
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return [parameter.grad.reshape(-1).float() for parameter in model.parameters()]


def relative_error(found, bits, block_size, rotated):
    """Root of the summed squared errors over that of the summed squares, blocks starting anew in each parameter."""
    errors = squares = 0.0
    for gradient in found:
        y = rotation.rotate(gradient, block_size) if rotated else gradient
        q = integer.quantize(y, bits, granularity="block", block_size=block_size)
        errors += (y - integer.dequantize(q)).square().sum().item()
        squares += gradient.square().sum().item()
    return (errors / squares) ** 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    path = parser.parse_args().model
    trained = AutoModelForCausalLM.from_pretrained(path)
    text = Path(argparse.__file__).read_text()
    tokens = torch.tensor(AutoTokenizer.from_pretrained(path)(text)["input_ids"][: ROWS * LENGTH])
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(trained.config)
    found = {
        name: gradients(model, tokens.reshape(ROWS, LENGTH)) for name, model in (("fresh", fresh), ("trained", trained))
    }
    print("| bits, rotation | " + " | ".join(f"blocks of {size}" for size in BLOCK_SIZES) + " |")
    print("|---|" + "---|" * len(BLOCK_SIZES))
    for bits in (8, 4):
        for rotated in (False, True):
            cells = (
                ", ".join(f"{relative_error(found[name], bits, size, rotated):.4f}" for name in found)
                for size in BLOCK_SIZES
            )
            print(f"| {bits}, {'hadamard' if rotated else 'none'} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
