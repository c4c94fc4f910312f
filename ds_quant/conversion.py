"""Turns the linear layers of a model into quantized ones, in place, and counts what that covers.

A module is converted by swapping its class: it stays the same object with the same Parameters and names, so optimizers,
ties, ZeRO-3's attributes, hooks and `state_dict` keys are none the wiser.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from ds_quant.config import ConfigError, LinearConfig
from ds_quant.linear import QuantizedModule, QuantLinear, describe
from ds_quant.patterns import check_patterns, matches
from ds_quant.shared_inputs import SharedInputs
from ds_quant.stepkey import CountForwards, StepKey

# By qualified name where importing the class would import a whole library for models that do not have it.
_registry: dict[type | str, type | str] = {
    nn.Linear: QuantLinear,
    "transformers.pytorch_utils.Conv1D": "ds_quant.conv1d:QuantConv1D",
}


def register_module(cls: type[nn.Module], quantized_cls: type[QuantizedModule]) -> None:
    """Have :func:`convert` turn modules whose exact type is `cls` into `quantized_cls`.

    `quantized_cls` derives from both :class:`QuantizedModule` and `cls`, needs nothing that `cls.__init__` does not
    set, and calls `quantized_forward` for its product.

    Raises:
        ConfigError: `quantized_cls` does not derive from both.
    """
    if not (issubclass(quantized_cls, QuantizedModule) and issubclass(quantized_cls, cls)):
        raise ConfigError(
            f"register_module: got {quantized_cls.__name__} for {cls.__name__}; allowed: a class that derives from "
            f"QuantizedModule and from {cls.__name__}; remedy: class {quantized_cls.__name__}(QuantizedModule, "
            f"{cls.__name__})"
        )
    _registry[cls] = quantized_cls


def _quantized_class(module: nn.Module) -> type[QuantizedModule] | None:
    # The exact type: a subclass (AutoTP's layers, say) has a forward of its own that a swap would silence.
    cls = type(module)
    target = _registry.get(cls) or _registry.get(f"{cls.__module__}.{cls.__qualname__}")
    if isinstance(target, str):
        path, name = target.split(":")
        target = getattr(importlib.import_module(path), name)
    return target


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of `model` by name, in its order: what :func:`convert` has quantized or could quantize."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule) or _quantized_class(module) is not None
    }


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    # ZeRO-3 leaves an empty tensor behind and keeps the shape beside it.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _output_embedding_names(model: nn.Module) -> set[str]:
    """Names of the model's output embedding: what it says itself, or what is named lm_head at any depth."""
    names = {name for name, _ in model.named_modules() if name.rpartition(".")[2] == "lm_head"}
    heads = []
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            head = getter()
            if head is not None:
                heads.append(head)
    return names | {name for name, module in model.named_modules() if any(module is head for head in heads)}


def _fused_experts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters of three dimensions that are no convolution's: all experts' weights in one, as in transformers 5."""
    return {
        f"{name}.{key}" if name else key: _shape(parameter)
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for key, parameter in module.named_parameters(recurse=False)
        if len(_shape(parameter)) == 3
    }


def convert(
    model: nn.Module,
    linear_config: LinearConfig | dict,
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> list[str]:
    """Quantize the linear layers of `model` in place, before or after it is handed to DeepSpeed.

    Args:
        model: any module. Layers of exact type nn.Linear, transformers' Conv1D or a registered class take part.
        linear_config: `QuantConfig.linear`, or the JSON object of `ds_quant.linear`.
        filter: called with (name, module) of each layer that the patterns chose; False leaves it as it is.

    Returns:
        The names of the converted modules, in the model's order. `model.config.ds_quant`, where the model has a
        config, then carries the section.

    Raises:
        ConfigError: a pattern that matches nothing, no layer to convert, fused experts that are not excluded, or a
            model that was converted with another configuration before.
    """
    config = linear_config if isinstance(linear_config, LinearConfig) else LinearConfig.parse(linear_config)
    done = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    if done:
        return _already_converted(done, config)

    candidates = linear_modules(model)
    experts = _fused_experts(model)
    if not candidates:
        raise ConfigError(
            f"ds_quant.linear: got a model ({type(model).__name__}) without any linear layer to convert; allowed: "
            "modules of type nn.Linear, transformers' Conv1D or a class given to ds_quant.register_module (subclasses "
            "are not touched); remedy: register the model's own linear class"
        )
    named = [*candidates, *experts, *(name.rpartition(".")[0] for name in experts)]
    if config.include != LinearConfig.model_fields["include"].default:
        check_patterns("ds_quant.linear.include", "linear module", config.include, named)
    if config.exclude:
        check_patterns("ds_quant.linear.exclude", "linear module", config.exclude, named)
    _refuse_fused_experts(experts, config)

    excluded = _output_embedding_names(model) if config.exclude is None else set()
    chosen = {
        name: module
        for name, module in candidates.items()
        if matches(name, config.include)
        and name not in excluded
        and not matches(name, config.exclude or ())
        and (filter is None or filter(name, module))
    }
    if not chosen:
        raise ConfigError(
            f"ds_quant.linear: got include {list(config.include)} and exclude {list(config.exclude or excluded)}, "
            f"which leave none of {len(candidates)} linear layers; allowed: at least one; remedy: widen the patterns"
        )
    step_key, shared_inputs = StepKey(torch.initial_seed()), SharedInputs()
    for index, (_, module) in enumerate(chosen.items()):
        quantized = _quantized_class(module)
        assert quantized is not None
        module.__class__ = quantized
        assert isinstance(module, QuantizedModule)
        module.configure_quantization(config, step_key, index, shared_inputs)
    if _draws_random_bits(config):
        model.register_forward_pre_hook(CountForwards(step_key))
    write_to_model_config(model, {"linear": config.model_dump(mode="json", exclude_unset=True)})
    return list(chosen)


def _draws_random_bits(config: LinearConfig) -> bool:
    return any(
        x is not None and x.rounding == "stochastic" for x in (config.weight, config.activation, config.gradient)
    )


def _already_converted(done: dict[str, QuantizedModule], config: LinearConfig) -> list[str]:
    for name, module in done.items():
        if module.quant_config != config:
            raise ConfigError(
                f"ds_quant.linear: got a model whose {name!r} was converted before as {module.describe()}; allowed: "
                f"the same configuration again ({describe(config)}); remedy: convert a model once"
            )
    return list(done)


def _refuse_fused_experts(experts: dict[str, tuple[int, ...]], config: LinearConfig) -> None:
    for name, shape in experts.items():
        owner = name.rpartition(".")[0]
        if matches(name, config.exclude or ()) or matches(owner, config.exclude or ()):
            continue
        if not (matches(name, config.include) or matches(owner, config.include)):
            continue
        raise ConfigError(
            f"ds_quant.linear: got the parameter {name!r} of shape {shape}, which holds the weights of several experts "
            "in one and is no nn.Linear, so that its products would stay in full precision; allowed: models with one "
            f'linear module per expert; remedy: leave it out in words: "exclude": ["{owner or name}", "lm_head"]'
        )


def write_to_model_config(model: nn.Module, section: dict) -> None:
    """Put the section into `model.config.ds_quant`, where there is one, so that save_pretrained carries it."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict") and not isinstance(config, dict):
        config.ds_quant = section


def step_key_of(model: nn.Module) -> StepKey | None:
    """The :class:`StepKey` that the quantized layers of `model` share, or None without quantized layers."""
    return next((module.step_key for module in model.modules() if isinstance(module, QuantizedModule)), None)


@dataclass
class Coverage:
    """Which matrix-product parameters of a model are quantized.

    A parameter of two or more dimensions counts as one of matrix products unless its module is an nn.Embedding; an
    output embedding tied to the input embedding counts, through the module that multiplies by it.
    """

    converted: dict[str, str] = field(default_factory=dict)
    """Module name to what is quantized in it."""
    left_out: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameter name to shape: matrix-product parameters that stay in full precision."""
    embeddings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameter name to shape: tables that are looked up, not multiplied."""
    covered_numel: int = 0
    matmul_numel: int = 0

    @property
    def share(self) -> float:
        """Share of the matrix-product parameters that is quantized, 0 to 1."""
        return self.covered_numel / self.matmul_numel if self.matmul_numel else 0.0

    def lines(self) -> list[str]:
        """The coverage as a few lines of text."""
        kinds: dict[str, int] = {}
        for text in self.converted.values():
            kinds[text] = kinds.get(text, 0) + 1
        lines = [f"{count} linear modules quantized: {text}" for text, count in kinds.items()]
        lines.append(f"{self.share:.1%} of {self.matmul_numel:,} matmul parameters covered")
        lines += [f"left in full precision: {name} {list(shape)}" for name, shape in self.left_out.items()]
        if self.embeddings:
            lines.append("embeddings, never quantized: " + ", ".join(self.embeddings))
        return lines


def coverage(model: nn.Module) -> Coverage:
    """What of `model` is quantized, counted on the model as it is now (also with ZeRO-3's partitioned parameters)."""
    result = Coverage()
    counted: set[int] = set()
    for name, module in model.named_modules():
        quantized = isinstance(module, QuantizedModule)
        if quantized:
            result.converted[name] = module.describe()
        for key, parameter in module.named_parameters(recurse=False):
            shape = _shape(parameter)
            if len(shape) < 2:
                continue
            full = f"{name}.{key}" if name else key
            if isinstance(module, nn.Embedding):
                result.embeddings[full] = shape
                continue
            if not quantized:
                result.left_out[full] = shape
            if id(parameter) not in counted:
                counted.add(id(parameter))
                numel = int(torch.Size(shape).numel())
                result.matmul_numel += numel
                result.covered_numel += numel if quantized else 0
    return result


def check_still_converted(model: nn.Module, names: Iterable[str]) -> None:
    """Compare the quantized modules of `model` with what :func:`convert` promised.

    Raises:
        ConfigError: a module was replaced since, by AutoTP for instance.
    """
    found = {name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    lost = [name for name in names if name not in found]
    if lost:
        raise ConfigError(
            f"ds_quant.linear: got {len(lost)} quantized modules replaced by something else after conversion (first: "
            f"{lost[0]!r}); allowed: none; remedy: turn off what replaces modules, such as tensor parallelism"
        )


def remove_forward_counter(model: nn.Module) -> None:
    """Stop a converted model from counting its own forwards, once an engine tells it the step."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, CountForwards):
            del model._forward_pre_hooks[key]
