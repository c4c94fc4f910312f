"""Models whose training step is measured: built from configurations, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PRESETS: dict[str, dict[str, Any]] = {
    # 124M parameters: the configuration's own defaults, dropout 0.1 everywhere included.
    "gpt2": {"model_type": "gpt2"},
    # 110M parameters, the output embedding tied as in models of that size.
    "llama": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
    },
    # Two blocks and little else: what a model of that hidden size spends its time on.
    "block-2048": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
    },
    "block-4096": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    },
    "tiny-gpt2": {
        "model_type": "gpt2",
        "vocab_size": 256,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "tiny-llama": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    },
}

_DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout")


def positions(name: str) -> int:
    """The longest sequence of a model."""
    return int(_config(name, None).max_position_embeddings)


def build(name: str, *, dropout: float | None, device: torch.device) -> nn.Module:
    """A model in fp32, in training mode, with sdpa attention; `dropout` in place of the configuration's."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(name, dropout), attn_implementation="sdpa")
    # The default, in words: GPT-2 would warn that it takes it, in the midst of what is compiled.
    model.loss_type = "ForCausalLM"
    return model.to(device=device, dtype=torch.float32).train()


def linears(model: nn.Module) -> list[nn.Module]:
    """The modules that multiply by a weight, whatever they have become."""
    return [module for module in model.modules() if isinstance(module, (nn.Linear, _conv1d()))]


def with_linears(model: nn.Module) -> nn.Module:
    """The same model with nn.Linear in place of GPT-2's Conv1D, for those who know nothing else."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _conv1d()):
                weight, bias = child.get_parameter("weight"), child.get_parameter("bias")
                in_features, out_features = weight.shape
                linear = nn.Linear(in_features, out_features, device="meta")
                linear.weight = nn.Parameter(weight.detach().t().contiguous())
                linear.bias = bias
                setattr(parent, name, linear)
    return model


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _config(name: str, dropout: float | None) -> Any:
    from transformers import AutoConfig

    options = dict(PRESETS[name])
    config = AutoConfig.for_model(options.pop("model_type"), **options, use_cache=False)
    for key in _DROPOUTS:
        if dropout is not None and hasattr(config, key):
            setattr(config, key, dropout)
    return config
