"""What servers make of an export, beside our own model: the table of docs/export.md.

    python tests/convergence/export_differences.py

Trains a Llama, with activations in the narrow and in the full range, and an OPT of two layers on this package's
sources, byte by byte, in W8A8 and fp32 (400 steps, half a minute each on one core), and exports their weights in fp32
and in bf16.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.utils import logging

import ds_quant
from ds_quant.export import export
from ds_quant.numerics.integer import dequantize, quantize

W8A8 = {"weight": {"bits": 8}, "activation": {"bits": 8}}
FULL = {"weight": {"bits": 8}, "activation": {"bits": 8, "range": "full"}}
MODELS = {"Llama": ("Llama", W8A8), "Llama, full range": ("Llama", FULL), "OPT": ("OPT", W8A8)}
LENGTH, ROWS = 128, 8
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}


def text() -> Tensor:
    sources = sorted(Path(ds_quant.__file__).parent.rglob("*.py"))
    return torch.tensor(list(b"".join(path.read_bytes() for path in sources)))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "Llama":
        config = LlamaConfig(**SIZES, intermediate_size=160, num_key_value_heads=2, max_position_embeddings=256)
        return LlamaForCausalLM(config)
    return OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=64, dropout=0.0, max_position_embeddings=256)
    )


def train(name: str, linear: dict, data: Tensor) -> nn.Module:
    model = build(name).train()
    ds_quant.convert(model, linear)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        starts = torch.randint(0, len(data) - 65, (16,)).tolist()
        batch = torch.stack([data[start : start + 65] for start in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def with_vllms_rule(model: nn.Module) -> None:
    """What vLLM's CUDA kernel does to an input, as read: scale absmax / 127, codes of x times 127 / absmax."""
    for module in model.modules():
        if isinstance(module, ds_quant.QuantLinear):
            weight = dequantize(quantize(module.weight.data, 8, granularity="row"))

            def forward(x: Tensor, weight: Tensor = weight, bias: Tensor | None = module.bias) -> Tensor:
                absmax = x.abs().amax(-1, keepdim=True)
                codes = (x * torch.where(absmax == 0, 0.0, 127 / absmax)).round().clamp(-128, 127)
                y = F.linear(codes, weight) * (absmax / 127)
                return y if bias is None else y + bias

            module.forward = forward  # type: ignore[method-assign]


@torch.no_grad()
def measure(model: nn.Module, held_out: Tensor) -> tuple[Tensor, float]:
    logits = model.eval()(held_out[:, :-1]).logits.float()
    return logits, F.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()


def main() -> None:
    logging.disable_progress_bar()
    data = text()
    data, held_out = data[: -ROWS * (LENGTH + 1)], data[-ROWS * (LENGTH + 1) :].view(ROWS, LENGTH + 1)
    print("| model, weights | run by | loss | logits off by | same likeliest token |")
    print("|---|---|---|---|---|")
    for title, (name, linear) in MODELS.items():
        trained = train(name, linear, data)
        for dtype in (torch.float32, torch.bfloat16):
            with tempfile.TemporaryDirectory() as folder:
                source, out = Path(folder, "model"), Path(folder, "out")
                trained.to(dtype).save_pretrained(source)
                export(source, out)
                compare(f"{title}, {str(dtype).removeprefix('torch.')}", linear, trained, source, out, held_out)


def compare(title: str, linear: dict, trained: nn.Module, source: Path, out: Path, held_out: Tensor) -> None:
    def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    ours, on_integers = load(source), load(source)
    ds_quant.convert(ours, linear)
    ds_quant.convert(on_integers, {**linear, "backend": "int8"})
    vllm = load(source)
    ds_quant.convert(vllm, W8A8)
    with_vllms_rule(vllm)
    rows = {"ours, fp32": ours, "ours on integer units, fp32": on_integers, "ours in the weights' dtype": trained}
    rows["ours without quantizers, fp32"] = load(source)
    rows |= {"served, fp32": load(out), "served, bf16": load(out, torch.bfloat16), "vLLM's rule, fp32": vllm}
    reference, _ = measure(ours, held_out)
    for run_by, model in rows.items():
        logits, loss = measure(model, held_out)
        off = ((logits - reference).norm() / reference.norm()).item()
        same = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
        print(f"| {title} | {run_by} | {loss:.5f} | {off:.1e} | {same:.2%} |", flush=True)


if __name__ == "__main__":
    main()
