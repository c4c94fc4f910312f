"""A live AdamW becomes a QuantAdamW: how an optimizer that the user or the Trainer made is quantized."""

from typing import Any

import torch

from ds_quant.base.errors import fail
from ds_quant.optim.adamw import QuantAdamW
from ds_quant.optim.base import QuantizedOptimizer
from ds_quant.optim.group_options import MOMENTS, check_hyperparameters, check_parameters, moment_options, state_option


def convert_adamw(optimizer: torch.optim.Optimizer, *, exp_avg: Any, exp_avg_sq: Any, seed: int = 0) -> QuantAdamW:
    """Turn a live torch.optim.AdamW (or an Adam without weight decay) into a QuantAdamW, the same object.

    Schedulers bound to it stay in charge of its learning rate; its param_groups stay the same list and dicts. Groups
    that have `exp_avg` or `exp_avg_sq` of their own keep them.

    Raises:
        ConfigError: an optimizer of another type, or with options that QuantAdamW does not have.
    """
    where = "ds_quant.optimizer"
    if isinstance(optimizer, QuantAdamW):
        check_agreement(optimizer, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
        return optimizer
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam):
        raise fail(
            where,
            f"an optimizer of type {type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "torch.optim.AdamW, an optimizer of ds_quant, or one that the config's optimizer section names",
            "pass torch.optim.AdamW, or remove ds_quant.optimizer",
        )
    moments = moment_options(exp_avg, exp_avg_sq)
    own = []
    for group in optimizer.param_groups:
        if group["weight_decay"] and type(optimizer) is torch.optim.Adam and not group.get("decoupled_weight_decay"):
            raise fail(
                where,
                "torch.optim.Adam with weight_decay, which is added to the gradient",
                "decoupled weight decay",
                "use torch.optim.AdamW",
            )
        check_hyperparameters(group, where)
        check_parameters(group["params"], where)
        own.append({name: state_option(group.get(name, moments[name]), name) for name in MOMENTS})
    step = optimizer.__dict__.get("step")
    if step is not None and not getattr(step, "_wrapped_by_lr_sched", False):
        raise fail(
            where,
            "an optimizer whose step method was replaced on the object",
            "the step method of its class",
            "create the wrapper after initialize, or remove ds_quant.optimizer",
        )
    optimizer.__class__ = QuantAdamW
    converted: QuantAdamW = optimizer  # type: ignore[assignment]
    converted.seed = seed
    converted.defaults.update(moments)
    for group, options in zip(converted.param_groups, own, strict=True):
        group.update(options)
    # Set by torch's fused AdamW for gradient scalers: step would be handed a scale that it does not take.
    converted.__dict__.pop("_step_supports_amp_scaling", None)
    converted._patch_step_function()
    if step is not None:
        _track_like_a_scheduler(converted)
    return converted


def check_agreement(optimizer: QuantizedOptimizer, states: dict[str, Any]) -> None:
    """Raise ConfigError unless each state is stored as `states` has it in one group, and so or in 32 bits in all."""
    for name, value in states.items():
        wanted = state_option(value, name)
        found = [group[name] for group in optimizer.param_groups]
        other = next((option for option in found if option not in (None, wanted)), None)
        if other is not None or wanted not in found:
            raise fail(
                f"ds_quant.optimizer.{name}",
                f"a {type(optimizer).__name__} with {other}",
                "the moments of the optimizer that was passed in",
                "make the section and the optimizer agree, or remove ds_quant.optimizer",
            )


def _track_like_a_scheduler(optimizer: QuantAdamW) -> None:
    """Replace the wrapper that a scheduler has put around the old class's step by one around the new one's.

    torch's schedulers wrap `optimizer.step` on the object to see whether it was called before their own.
    """

    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return type(optimizer).step(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.__dict__["step"] = step
