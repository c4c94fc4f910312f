"""What of a `linear` section the compressed-tensors format can say.

    section                                             format                what is stored for a weight [out, in]
    weight of 8 bits, activation of 8 bits per token    int-quantized         weight int8 [out, in],
                                                                              weight_scale [out, 1]
    weight of 4 or 8 bits, no activation                pack-quantized        weight_packed int32 [out, in * bits / 32],
                                                                              weight_scale, weight_shape
    weight fp8_e4m3, activation fp8_e4m3 per token      float-quantized       weight float8 [out, in],
    or none                                                                   weight_scale [out, 1]
    weight mxfp8, no activation                         mxfp8-quantized       weight float8 [out, in],
                                                                              weight_scale uint8 [out, in / 32] (E8M0)
    weight mxfp6 or mxfp4, no activation                mxfp6-pack-quantized  weight_packed uint8 [out, in * bits / 8],
                                                        mxfp4-pack-quantized  weight_scale as for mxfp8
    weight nvfp4, no activation                         nvfp4-pack-quantized  weight_packed uint8 [out, in / 2],
                                                                              weight_scale float8 [out, in / 16],
                                                                              weight_global_scale [1]

Codes and scales are those of training. One scale for the whole tensor is repeated for each output feature; blocks of
integers along the input features are the format's groups. The activation's scale is not stored: a server makes one for
each token, as training does with integers of `"range": "full"` and fp8 (compressed-tensors in transformers) or of the
narrow range (vLLM). Servers scale blocks of activations by rules of their own, so that MX and NVFP4 activations are
refused.

`stored_weight` writes a weight so. The package compressed-tensors (extra `export`) is imported on first use.
"""

from typing import Any, NamedTuple

from ds_quant.base.errors import problem
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.linear.recipe import STREAM_WEIGHT, Quantizer, plan_of

PLAIN = "train with what is allowed, or export plain weights: --format bf16"

FP8 = "float-quantized"
FLOATING_POINT = {
    "fp8_e4m3": FP8,
    "mxfp8": "mxfp8-quantized",
    "mxfp6": "mxfp6-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
"""The package's names of formats for weights, by `linear.weight.format`."""


class ServingFormat(NamedTuple):
    """A `linear` section as a server knows it."""

    name: str
    """The package's, as in the table above."""
    quantizer: Quantizer
    """Of the weight, as in training."""
    scheme: Any
    """compressed_tensors' QuantizationScheme."""

    @property
    def is_decoded_in_bf16(self) -> bool:
        """By compressed-tensors, whatever the dtype of the model."""
        return self.name in FLOATING_POINT.values() and self.name != FP8


def serving_format(config: LinearConfig) -> ServingFormat:
    """The format for a section.

    Raises:
        ConfigError: every setting that a server could not follow, or no compressed-tensors.
    """
    if lines := _what_cannot_be_said(config):
        raise ConfigError("\n".join(lines))
    quantizer = plan_of(config, transposed=False, stream=STREAM_WEIGHT).weight
    assert quantizer is not None
    if quantizer.format_name:
        name, weights = FLOATING_POINT[quantizer.format_name], _floating_point(quantizer)
    else:
        name, weights = "int-quantized" if config.activation else "pack-quantized", _integers(quantizer)
    activations = None
    if config.activation:
        kind = "float" if config.activation.format else "int"
        activations = _arguments(type=kind, num_bits=8, strategy="token", dynamic=True)
    scheme = _package().QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=activations, format=name
    )
    return ServingFormat(name, quantizer, scheme)


def _integers(quantizer: Quantizer) -> Any:
    in_blocks = quantizer.granularity == "block"
    return _arguments(
        type="int",
        num_bits=quantizer.bits,
        strategy="group" if in_blocks else "channel",
        group_size=quantizer.block_size if in_blocks else None,
        dynamic=False,
    )


def _floating_point(quantizer: Quantizer) -> Any:
    import torch

    fmt = quantizer.format
    how: dict[str, Any] = {"type": "float", "num_bits": quantizer.bits, "dynamic": False}
    if fmt.scale.kind == "float":
        return _arguments(strategy="channel", **how)
    stored = {"e8m0": ("group", torch.uint8), "e4m3": ("tensor_group", torch.float8_e4m3fn)}
    strategy, dtype = stored[fmt.scale.kind]
    return _arguments(strategy=strategy, group_size=fmt.group.block_size, scale_dtype=dtype, zp_dtype=dtype, **how)


def _what_cannot_be_said(config: LinearConfig) -> list[str]:
    weight, where = config.weight, LinearConfig.where
    if weight is None:
        return [problem(f"{where}.weight", None, "a quantized weight, which is what is stored", PLAIN)]
    broken = _of_any_numbers(config)
    broken += _of_floating_point(config) if weight.format else _of_integers(config)
    return [problem(f"{where}.{key}", got, allowed, PLAIN) for key, got, allowed in broken]


_Broken = list[tuple[str, Any, str]]
"""Key, what it has, and what it may have."""


def _of_any_numbers(config: LinearConfig) -> _Broken:
    broken: _Broken = []
    zero_point = "true: the server's products have no zero point here"
    drawn = '"nearest": a server draws no random bits'
    if config.activation and config.activation.split_mean:
        broken.append(("activation.split_mean", True, "false: a server takes no mean of tokens"))
    if config.activation and config.activation.outlier_share is not None:
        allowed = "absent: a server has one number of bits for all features"
        broken.append(("activation.outlier_share", config.activation.outlier_share, allowed))
    if "Y" in config.rotated_products():
        broken.append(("rotation.used_for", "output", "a forward without: a server rotates nothing"))
    if config.forward_full_precision_from is not None:
        allowed = "absent: weights that were trained without quantizers last are no longer those of a quantized model"
        broken.append(("forward_full_precision_from", config.forward_full_precision_from, allowed))
    for name, operand in (("weight", config.weight), ("activation", config.activation)):
        if operand and not operand.symmetric:
            broken.append((f"{name}.symmetric", False, zero_point))
        if operand and operand.rounding != "nearest":
            broken.append((f"{name}.rounding", operand.rounding, drawn))
    if config.rotation:
        broken.append(("rotation", config.rotation.model_dump(), "none: a server rotates nothing"))
    return broken


def _of_integers(config: LinearConfig) -> _Broken:
    weight, activation = config.weight, config.activation
    assert weight is not None
    broken: _Broken = []
    bits = (8,) if activation else (4, 8)
    if weight.bits not in bits:
        allowed = "8 beside a quantized activation" if activation else "4 or 8"
        broken.append(("weight.bits", weight.bits, allowed))
    if activation and weight.granularity == "block":
        allowed = '"channel" or "tensor" beside a quantized activation: other scales lie on the contraction axis'
        broken.append(("weight.granularity", "block", allowed))
    if activation and activation.format:
        broken.append(("activation.format", activation.format, "bits, beside a weight of integers"))
    elif activation and activation.bits != 8:
        broken.append(("activation.bits", activation.bits, "8"))
    return broken + _of_tokens(config)


def _of_floating_point(config: LinearConfig) -> _Broken:
    weight, activation = config.weight, config.activation
    assert weight is not None
    if weight.format not in FLOATING_POINT:
        known = ", ".join(FLOATING_POINT)
        return [("weight.format", weight.format, f"{known}, or bits: compressed-tensors has no other")]
    broken: _Broken = []
    if weight.format == "fp8_e4m3":
        if weight.granularity == "block":
            broken.append(("weight.granularity", "block", '"channel" or "tensor": servers have no other scales of fp8'))
        if activation and activation.format != "fp8_e4m3":
            got = activation.format or activation.bits
            broken.append(("activation", got, 'format "fp8_e4m3", or none, beside a weight in it'))
        broken += _of_tokens(config)
    elif activation:
        allowed = f"none beside a weight in {weight.format}: servers scale blocks of activations by rules of their own"
        broken.append(("activation", activation.format or activation.bits, allowed))
    return broken


def _of_tokens(config: LinearConfig) -> _Broken:
    activation = config.activation
    if activation is None or activation.granularity == "token":
        return []
    allowed = '"token": a server computes the scale of each token on its own'
    return [("activation.granularity", activation.granularity, allowed)]


def left_behind(config: LinearConfig) -> list[str]:
    """The settings that end with training, in words."""
    found = []
    if config.gradient:
        found.append("gradient")
    if config.backward_operands != "quantized":
        found.append(f"backward_operands {config.backward_operands}")
    if config.rotation:
        found.append("rotation")
    if config.backend != "simulated":
        found.append(f"backend {config.backend}")
    return found


def activation_note(config: LinearConfig) -> str | None:
    """How servers quantize the activations, beside how training did; None without such.

    As read and run in compressed-tensors 0.20; as read in vLLM (docs/export.md).
    """
    if config.activation is None:
        return None
    if config.activation.format:
        return "activations: absmax / 448 a token in training and in transformers"
    if config.activation.range == "full":
        return "activations: absmax / 127.5 a token in training and in transformers; absmax / 127 in vLLM"
    return (
        "activations: absmax / 127 a token in training and in vLLM; absmax / 127.5 in transformers, whose logits "
        'differ a little unless training has "range": "full"'
    )


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
    return _package().QuantizationArgs(symmetric=True, **values)


def _package() -> Any:
    try:
        from compressed_tensors import quantization
    except ImportError as error:
        raise ConfigError(
            f"ds_quant export: compressed-tensors cannot be imported ({error}); allowed: version 0.20 or later; "
            "fix: pip install 'ds_quant[export]'"
        ) from error
    return quantization


def version() -> str:
    """The version of compressed-tensors that is installed."""
    import compressed_tensors

    return compressed_tensors.__version__
