"""What the tests of exports share: small models, and what is made of them."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ds_quant.linear import QuantLinear
from ds_quant.linear.convert import convert
from ds_quant.numerics.format import named_format, quantize_to
from ds_quant.numerics.integer import dequantize, quantize

W8A8 = {"weight": {"bits": 8}, "activation": {"bits": 8}}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GATED = {**SIZES, "intermediate_size": 104, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, GATED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, GATED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**GATED, "head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, GATED),
    "opt": (OPTForCausalLM, OPTConfig, {**SIZES, "ffn_dim": 104, "word_embed_proj_dim": 64, "dropout": 0.0}),
}
IDS = torch.arange(24).reshape(2, 12)


def build(name="llama", dtype=torch.float32, **overrides):
    """A random model whose weights are far from uniform, so that every row has a scale of its own."""
    torch.manual_seed(0)
    cls, config, sizes = MODELS[name]
    model = cls(config(**{**sizes, **overrides}))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= torch.empty(module.out_features, 1).log_normal_(0, 1)
    return model.to(dtype).eval()


def saved(folder, linear=None, name="llama", shard="1GB", **build_with):
    """A checkpoint as our training leaves it: written by save_pretrained, with the section."""
    model = build(name, **build_with)
    if linear is not None:
        convert(model, linear)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def trained(folder, linear=None):
    """Our own model of a checkpoint in fp32, with its quantizers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if linear is not None:
        convert(model, linear)
    return model


def served(folder, **how):
    """What transformers and compressed-tensors make of an export, after the forward that decodes the weights."""
    how.setdefault("dtype", torch.float32)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info.values()), info
    model.eval()(IDS)
    return model


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def weights_are_trainings(model, reference):
    """Every quantized weight of `model` against the fake-quantized one of `reference`; returns how many."""
    count = 0
    for name, module in reference.named_modules():
        if isinstance(module, QuantLinear):
            w = module.quant_config.weight
            granularity = {"channel": "row", "tensor": "tensor", "block": "block"}[w.granularity]
            if w.format:
                rule = w.scale_rule or "floor"
                fmt = named_format(w.format, granularity, block_rows=w.block_rows, scale_rule=rule)
                q = quantize_to(module.weight, fmt)
            else:
                q = quantize(module.weight, w.bits, granularity=granularity, block_size=w.block_size)
            found = model.get_submodule(name).weight
            # As it is, or where compressed-tensors decodes in bf16, rounded to that.
            expected = dequantize(q, torch.bfloat16 if w.format == "nvfp4" else torch.float32)
            assert torch.equal(found, expected.to(found.dtype)), name
            count += 1
    return count


def server_activation(x):
    """The dynamic scale of compressed-tensors: absmax / 127.5 of each row, codes -128 to 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).clamp(-128, 127).round() * scale
