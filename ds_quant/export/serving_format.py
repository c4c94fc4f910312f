"""What of a `linear` section the compressed-tensors format can say, and how a weight is written in it.

    section                                             format           what is stored for a weight [out, in]
    weight of 8 bits, activation of 8 bits per token    int-quantized    weight int8 [out, in], weight_scale [out, 1]
    weight of 4 or 8 bits, no activation                pack-quantized   weight_packed int32 [out, in * bits / 32],
                                                                         weight_scale, weight_shape

Codes and scales are those of training: `numerics.integer.quantize` of the weight, the scale in fp32. Their product is
the weight that training multiplied by. One scale for the whole tensor is repeated for each output feature; blocks along
the input features are the format's groups. The activation's scale is not stored: a server makes one for each token, as
training does with `"range": "full"` (compressed-tensors in transformers) or without (vLLM).

The package compressed-tensors (extra `export`) is imported on first use.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_quant.base.errors import fail, problem
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.linear.recipe import STREAM_WEIGHT, Quantizer, plan_of
from ds_quant.numerics.integer import dequantize

PLAIN = "train with what is allowed, or export plain weights: --format bf16"


class ServingFormat(NamedTuple):
    """A `linear` section as a server knows it."""

    name: str
    """`int-quantized` or `pack-quantized`."""
    quantizer: Quantizer
    """Of the weight, as in training."""
    scheme: Any
    """compressed_tensors' QuantizationScheme."""


def serving_format(config: LinearConfig) -> ServingFormat:
    """The format for a section.

    Raises:
        ConfigError: every setting that a server could not follow, or no compressed-tensors.
    """
    if lines := _what_cannot_be_said(config):
        raise ConfigError("\n".join(lines))
    quantizer = plan_of(config, transposed=False, stream=STREAM_WEIGHT).weight
    assert quantizer is not None
    in_blocks = quantizer.granularity == "block"
    weights = _arguments(
        num_bits=quantizer.bits,
        strategy="group" if in_blocks else "channel",
        group_size=quantizer.block_size if in_blocks else None,
        dynamic=False,
    )
    activations = None
    if config.activation:
        activations = _arguments(num_bits=8, strategy="token", group_size=None, dynamic=True)
    name = "int-quantized" if activations else "pack-quantized"
    scheme = _package().QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=activations, format=name
    )
    return ServingFormat(name, quantizer, scheme)


def _what_cannot_be_said(config: LinearConfig) -> list[str]:
    weight, activation, where = config.weight, config.activation, LinearConfig.where
    if weight is None:
        return [problem(f"{where}.weight", None, "a quantized weight, which is what is stored", PLAIN)]
    broken: list[tuple[str, Any, str]] = []
    zero_point = "true: the server's integer products have no zero point here"
    drawn = '"nearest": a server draws no random bits'
    bits = (8,) if activation else (4, 8)
    for name, operand in (("weight", weight), ("activation", activation)):
        if operand and operand.format:
            broken.append((f"{name}.format", operand.format, "bits: only integers are exported"))
    if config.rotation:
        broken.append(("rotation", config.rotation.model_dump(), "none: a server rotates nothing"))
    if weight.bits is not None and weight.bits not in bits:
        allowed = "8 beside a quantized activation" if activation else "4 or 8"
        broken.append(("weight.bits", weight.bits, allowed))
    if not weight.symmetric:
        broken.append(("weight.symmetric", False, zero_point))
    if weight.rounding != "nearest":
        broken.append(("weight.rounding", weight.rounding, drawn))
    if activation and weight.granularity == "block":
        allowed = '"channel" or "tensor" beside a quantized activation: other scales lie on the contraction axis'
        broken.append(("weight.granularity", "block", allowed))
    if activation:
        if activation.bits is not None and activation.bits != 8:
            broken.append(("activation.bits", activation.bits, "8"))
        if activation.granularity != "token":
            allowed = '"token": a server computes the scale of each token on its own'
            broken.append(("activation.granularity", activation.granularity, allowed))
        if not activation.symmetric:
            broken.append(("activation.symmetric", False, zero_point))
        if activation.rounding != "nearest":
            broken.append(("activation.rounding", activation.rounding, drawn))
    return [problem(f"{where}.{key}", got, allowed, PLAIN) for key, got, allowed in broken]


def left_behind(config: LinearConfig) -> list[str]:
    """The settings that end with training, in words."""
    found = []
    if config.gradient:
        found.append("gradient")
    if config.backward_operands != "quantized":
        found.append(f"backward_operands {config.backward_operands}")
    if config.backend != "simulated":
        found.append(f"backend {config.backend}")
    return found


def activation_note(config: LinearConfig) -> str | None:
    """How servers quantize the activations, beside how training did; None without such.

    As read and run in compressed-tensors 0.20; as read in vLLM (docs/export.md).
    """
    if config.activation is None:
        return None
    if config.activation.range == "full":
        return "activations: absmax / 127.5 a token in training and in transformers; absmax / 127 in vLLM"
    return (
        "activations: absmax / 127 a token in training and in vLLM; absmax / 127.5 in transformers, whose logits "
        'differ a little unless training has "range": "full"'
    )


def encode(name: str, weight: Tensor, form: ServingFormat) -> dict[str, Tensor]:
    """What is stored for the weight [out, in] of the module `name`, by full key.

    compressed-tensors decodes the tensors again, and has to find training's fake-quantized weight, bit for bit.

    Raises:
        ConfigError: a weight with an Inf or a NaN, or with blocks that do not divide its rows.
    """
    quantizer, scheme = form.quantizer, form.scheme
    if not weight.isfinite().all():
        raise fail(f"{name}.weight", "an Inf or a NaN", "finite weights", "export a checkpoint from before it diverged")
    if quantizer.granularity == "block" and weight.shape[1] % quantizer.block_size:
        got = f"rows of {weight.shape[1]} in blocks of {quantizer.block_size}"
        raise fail(f"{name}.weight", got, "rows that whole blocks fill, as the format has no shorter one", PLAIN)
    q = quantizer(weight, None, STREAM_WEIGHT)
    # [out, 1] or, in blocks, [out, in / block_size].
    scale = q.scale.expand(weight.shape[0], 1) if q.scale.dim() == 0 else q.scale
    stored = {"weight_scale": scale.contiguous()}
    if form.name == "int-quantized":
        stored["weight"] = q.codes.contiguous()
    else:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        stored["weight_packed"] = pack_to_int32(q.codes.contiguous(), quantizer.bits)
        stored["weight_shape"] = torch.tensor(weight.shape)
    decoded = _compressor(form.name).decompress(stored, scheme)["weight"]
    if not torch.equal(decoded, dequantize(q)):
        got = f"other values after decoding with compressed-tensors {version()}"
        raise fail(f"{name}.weight", got, "training's own", "use the version that constraints.txt names")
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}


def quantization_config(form: ServingFormat, ignore: list[str]) -> dict[str, Any]:
    """The object of that name in config.json; `ignore` names the nn.Linear modules that stay as they are."""
    config = _package().QuantizationConfig(
        config_groups={"group_0": form.scheme},
        format=form.name,
        quantization_status="compressed",
        ignore=ignore,
    )
    return {**config.model_dump(mode="json"), "version": version()}


def _arguments(**values: Any) -> Any:
    return _package().QuantizationArgs(type="int", symmetric=True, **values)


def _package() -> Any:
    try:
        from compressed_tensors import quantization
    except ImportError as error:
        raise ConfigError(
            f"ds_quant export: compressed-tensors cannot be imported ({error}); allowed: version 0.20 or later; "
            "fix: pip install 'ds_quant[export]'"
        ) from error
    return quantization


def _compressor(name: str) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(name)


def version() -> str:
    """The version of compressed-tensors that is installed."""
    import compressed_tensors

    return compressed_tensors.__version__
