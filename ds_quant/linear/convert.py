"""Turns the linear layers of a model into quantized ones, in place, and counts what that covers.

A module is converted by swapping its class: it stays the same object with the same Parameters and names, so optimizers,
ties, ZeRO-3's attributes, hooks and `state_dict` keys are none the wiser.
"""

import json
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ds_quant.base.log import say
from ds_quant.base.patterns import check_patterns, matches
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.linear.coverage import Coverage, coverage
from ds_quant.linear.depth import in_end_blocks
from ds_quant.linear.experts import fused_experts, shared_patterns
from ds_quant.linear.fused_outputs import parts_of
from ds_quant.linear.heads import output_heads
from ds_quant.linear.linear_classes import check_included, is_linear, obstacle, quantized_class, register_module
from ds_quant.linear.modules import QuantizedModule, describe
from ds_quant.linear.recipe import NUM_STREAMS
from ds_quant.linear.shapes import out_features, shape_of
from ds_quant.linear.shared_inputs import SharedInputs
from ds_quant.linear.step_key import StepKey, count_forwards, remove_forward_counter

__all__ = [
    "Coverage",
    "check_still_converted",
    "convert",
    "coverage",
    "linear_modules",
    "register_module",
    "step_key_of",
    "write_to_model_config",
]


def linear_modules(model: nn.Module, include_classes: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The linear layers of `model` by name, in its order: what :func:`convert` has quantized or could quantize."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule) or quantized_class(module, include_classes) is not None
    }


def convert(
    model: nn.Module,
    linear_config: LinearConfig | dict,
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> list[str]:
    """Quantize the linear layers of `model` in place, before or after it is passed to DeepSpeed.

    Args:
        model: any module. Layers of type nn.Linear, transformers' Conv1D, subclasses that compute the same (see
            `linear_classes`) or a registered class take part. What is new in a model that was converted before, such
            as a head that was resized, is converted as the rest is. Quantized layers that were made directly take their
            part in the model's random bits and steps.
        linear_config: `QuantConfig.linear`, or the JSON object of `ds_quant.linear`.
        filter: called with (name, module) of each layer that the patterns chose; False leaves it as it is.

    Returns:
        The names of all quantized modules, in the model's order. `model.config.ds_quant`, where the model has a
        config, then carries the section.

    Raises:
        ConfigError: a pattern or class that matches nothing, no layer to convert, fused experts that are not excluded,
            or a model that was converted with another configuration before.
    """
    config = linear_config if isinstance(linear_config, LinearConfig) else LinearConfig.parse(linear_config)
    done = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    _check_agreement(done, config)
    check_included(model, config.include_classes)
    candidates = linear_modules(model, config.include_classes)
    if not candidates:
        raise _nothing_to_convert(model)
    experts, heads = fused_experts(model), output_heads(model)
    _check_patterns(model, config, [*candidates, *heads], experts)
    _refuse_fused_experts(experts, heads, config)

    excluded = set(heads) if config.exclude is None else set()
    if config.exclude_blocks:
        excluded |= in_end_blocks(model, candidates, config.exclude_blocks)
    chosen = {
        name: module
        for name, module in candidates.items()
        if matches(name, config.include) and name not in excluded and not matches(name, config.exclude or ())
    }
    if not chosen and not done:
        raise ConfigError(
            f"ds_quant.linear: got include {list(config.include)} and exclude {list(config.exclude or heads)}, "
            f"which leave none of {len(candidates)} linear layers; allowed: at least one; fix: widen the patterns"
            + ('; "exclude": [] quantizes output heads, too' if config.exclude is None and heads else "")
        )
    passing = _passing(chosen, filter, len(candidates), bool(done))
    _check_split_qkv({**done, **passing}, config)
    joining = {name: module for name, module in candidates.items() if name in passing or _is_alone(module)}
    _convert_modules(model, joining, {name: done[name] for name in done if name not in joining}, config)
    write_to_model_config(model, {"linear": config.model_dump(mode="json", exclude_unset=True)})
    return [name for name, module in candidates.items() if isinstance(module, QuantizedModule)]


def _is_alone(module: nn.Module) -> bool:
    """Whether a quantized module was made directly and no model has taken it in yet."""
    return isinstance(module, QuantizedModule) and module.is_alone


# On a module that the filter of `convert` has left as it is, for the next call, which is usually that of `initialize`.
_LEFT_BY_FILTER = "_ds_quant_left_by_filter"


def _passing(
    chosen: dict[str, nn.Module], filter: Callable[[str, nn.Module], bool] | None, count: int, again: bool
) -> dict[str, nn.Module]:
    """Those of `chosen` that are not quantized yet and that the filter, now or before, does not leave as they are."""
    passing = {}
    for name, module in chosen.items():
        if isinstance(module, QuantizedModule) or module.__dict__.get(_LEFT_BY_FILTER):
            continue
        if filter is None or filter(name, module):
            passing[name] = module
        else:
            module.__dict__[_LEFT_BY_FILTER] = True
    if not passing and not again:
        raise ConfigError(
            f"ds_quant.linear: got a filter that leaves none of {count} linear layers; allowed: at least one; "
            "fix: widen it"
        )
    return passing


# On a converted model: which random bits a layer draws, by its name.
_PLACES = "_ds_quant_places"


def _convert_modules(
    model: nn.Module, modules: dict[str, nn.Module], done: dict[str, QuantizedModule], config: LinearConfig
) -> None:
    first = next(iter(done.values()), None)
    step_key = first.step_key if first else StepKey(torch.initial_seed())
    shared_inputs = first._shared_inputs if first else SharedInputs()
    # A layer that was replaced takes its own place again; others go behind all that there are.
    taken = {module._quant_plan.stream // NUM_STREAMS for module in done.values()}
    places = model.__dict__.get(_PLACES, {}) if done else {name: place for place, name in enumerate(modules)}
    for name, module in modules.items():
        if isinstance(module, QuantizedModule):
            remove_forward_counter(module)
        else:
            quantized = quantized_class(module, config.include_classes)
            assert quantized is not None
            module.__class__ = quantized
        assert isinstance(module, QuantizedModule)
        index = places.get(name, -1)
        if index < 0 or index in taken:
            index = max(taken, default=-1) + 1
        taken.add(index)
        module.configure_quantization(config, step_key, index, shared_inputs, name=name)
    if not done:
        model.__dict__[_PLACES] = places
        count_forwards(model, step_key, config)
    elif modules:
        say(f"{len(modules)} linear modules that are new since the model was converted: {', '.join(modules)}")


def _nothing_to_convert(model: nn.Module) -> ConfigError:
    reasons = dict.fromkeys(reason for module in model.modules() if is_linear(module) and (reason := obstacle(module)))
    return ConfigError(
        f"ds_quant.linear: got a model ({type(model).__name__}) without any linear layer to convert; allowed: "
        "modules of type nn.Linear, transformers' Conv1D, subclasses that compute the same, or a class given to "
        "ds_quant.register_module; fix: " + ("; ".join(reasons) or "register the model's own linear class")
    )


def _check_patterns(
    model: nn.Module, config: LinearConfig, linears: list[str], experts: dict[str, tuple[int, ...]]
) -> None:
    """Refuse patterns that match nothing that is multiplied: no linear layer, and no parameter or its module."""
    if config.exclude:
        plain = [
            f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            if not isinstance(module, nn.Embedding)
            for key, parameter in module.named_parameters(recurse=False)
            if len(shape_of(parameter)) > 1
        ]
        names = dict.fromkeys([*linears, *(name.rpartition(".")[0] or name for name in plain), *plain])
        check_patterns("ds_quant.linear.exclude", "linear module", config.exclude, list(names))
    if config.include != LinearConfig.model_fields["include"].default:
        names = dict.fromkeys([*linears, *experts, *(name.rpartition(".")[0] for name in experts)])
        check_patterns("ds_quant.linear.include", "linear module", config.include, list(names))


def _check_split_qkv(modules: dict[str, nn.Module], config: LinearConfig) -> None:
    """Refuse, before anything is converted, patterns that match no quantized layer, or one that has no equal parts."""
    if not (config.gradient and config.gradient.split_qkv):
        return
    check_patterns("ds_quant.linear.gradient.split_qkv", "quantized module", config.gradient.split_qkv, list(modules))
    for name, module in modules.items():
        found = type(module) if isinstance(module, QuantizedModule) else quantized_class(module, config.include_classes)
        assert found is not None
        parts_of(config, name, out_features(module, transposed=found.transposed))


def _check_agreement(done: dict[str, QuantizedModule], config: LinearConfig) -> None:
    for name, module in done.items():
        if module.quant_config != config:
            raise ConfigError(
                f"ds_quant.linear: got a model whose {name!r} was converted before as {module.describe()}; allowed: "
                f"the same configuration again ({describe(config)}); fix: convert a model once"
            )


def _refuse_fused_experts(experts: dict[str, tuple[int, ...]], heads: list[str], config: LinearConfig) -> None:
    exclude = config.exclude or ()
    open_ones = {}
    for name in experts:
        owner = name.rpartition(".")[0] or name
        included = matches(name, config.include) or matches(owner, config.include)
        if included and not matches(name, exclude) and not matches(owner, exclude):
            open_ones[name] = owner
    if not open_ones:
        return
    first = next(iter(open_ones))
    # An own list replaces the default one, which leaves the output heads out.
    kept = shared_patterns(heads) if config.exclude is None else list(config.exclude)
    fix = json.dumps([*dict.fromkeys([*shared_patterns(dict.fromkeys(open_ones.values())), *kept])])
    raise ConfigError(
        f"ds_quant.linear: got {len(open_ones)} parameters that hold the weights of several experts in one (first: "
        f"{first!r} of shape {experts[first]}) and belong to no nn.Linear, so that their products would stay in full "
        f'precision; allowed: models with one linear module per expert; fix: leave them out in words: "exclude": '
        f"{fix}"
    )


def write_to_model_config(model: nn.Module, section: dict) -> None:
    """Put the section into `model.config.ds_quant`, where there is one, so that save_pretrained carries it."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict") and not isinstance(config, dict):
        config.ds_quant = section


def step_key_of(model: nn.Module) -> StepKey | None:
    """The :class:`StepKey` that the quantized layers of `model` share, or None without quantized layers."""
    return next((module.step_key for module in model.modules() if isinstance(module, QuantizedModule)), None)


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
            f"{lost[0]!r}); allowed: none; fix: turn off what replaces modules, such as tensor parallelism"
        )
