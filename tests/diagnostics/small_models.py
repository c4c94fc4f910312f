"""Small models for the diagnostics' tests, and a batch for them."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ds_quant

W8A8G8 = {
    "weight": {"bits": 8},
    "activation": {"bits": 8},
    "gradient": {"bits": 8, "rounding": "stochastic"},
}


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 4, "attention_dropout": 0.1, **changes}))


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes}))


def batch():
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def converted(model, linear=None):
    ds_quant.convert(model, linear or W8A8G8)
    return model


class TwoLayers(nn.Module):
    """x [n, 8] -> [n, 4], with an in-place change between the layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        y = self.first(x)
        y.mul_(2.0)
        return self.second(y)
