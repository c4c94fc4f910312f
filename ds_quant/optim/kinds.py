"""Which optimizers a JSON can name, and what each takes of DeepSpeed's `optimizer.params`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ds_quant.base.errors import fail
from ds_quant.config import OptimizerConfig
from ds_quant.optim.adamw import QuantAdamW
from ds_quant.optim.ademamix import QuantAdEMAMix
from ds_quant.optim.base import QuantizedOptimizer
from ds_quant.optim.group_options import FIXED as FIXED_IN_GROUPS
from ds_quant.optim.group_options import HYPERPARAMETERS, MOMENTS
from ds_quant.optim.lion import QuantLion
from ds_quant.optim.muon import QuantMuon
from ds_quant.optim.sgd import QuantSGD

IMPLEMENTATIONS = ("torch_adam", "fused", "foreach", "capturable")
"""Keys of DeepSpeed's and torch's AdamW that choose between implementations of one function: QuantAdamW is another."""

FIXED = {**FIXED_IN_GROUPS, "adam_w_mode": True, "fp32_optimizer_states": True}
"""Keys that change the function, and what QuantAdamW computes."""


class Kind(NamedTuple):
    """An optimizer of the JSON."""

    types: tuple[str, ...]
    """Values of `optimizer.type`, as DeepSpeed writes them."""
    any_case: bool
    """Whether upper and lower case mean the same, as for DeepSpeed's own; torch.optim's are spelt as there."""
    optimizer: type[QuantizedOptimizer]
    hyperparameters: tuple[str, ...]
    """Keys of `optimizer.params` that the optimizer takes."""
    fixed: Mapping[str, bool]
    """Keys that change the function, and the one value that is allowed."""
    implementations: tuple[str, ...]
    """Keys that choose between implementations of the same function, or that DeepSpeed alone reads."""
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Of hyperparameters, as the optimizer that DeepSpeed would have taken for these params has them."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.types[-1]

    @property
    def label(self) -> str:
        """What reports call its states."""
        return f"{self.name}'s moments"


def _adam_defaults(params: Mapping[str, Any]) -> dict[str, Any]:
    # DeepSpeed's own implementations leave the weights alone where no decay is set; torch's takes 0.01.
    return {"weight_decay": 0.01 if params.get("torch_adam") else 0.0}


ADAM = Kind(("Adam", "AdamW"), True, QuantAdamW, HYPERPARAMETERS, FIXED, IMPLEMENTATIONS, _adam_defaults)
LION = Kind(
    ("Lion",),
    True,
    QuantLion,
    ("lr", "betas", "weight_decay"),
    {"fp32_optimizer_states": True},
    ("set_grad_none",),
    lambda params: {"lr": 1e-3, "betas": (0.9, 0.999)},  # DeepSpeed's, not the paper's
)
SGD = Kind(
    ("SGD",),
    False,
    QuantSGD,
    ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    {"maximize": False, "differentiable": False},
    ("fused", "foreach"),
    lambda params: {"momentum": 0.0},
)
ADEMAMIX = Kind(
    ("AdEMAMix",),
    False,
    QuantAdEMAMix,
    ("lr", "betas", "alpha", "eps", "weight_decay", "t_alpha", "t_beta3"),
    {},
    (),
    lambda params: {},
)
"""Stock DeepSpeed knows no such type, and refuses it: a script that forgets to enable ds_quant fails."""
MUON = Kind(
    ("Muon",),
    True,
    QuantMuon,
    ("lr", "muon_lr", "adam_lr", "momentum", "ns_method", "betas", "eps", "weight_decay"),
    {"adam_w_mode": True, "fp32_optimizer_states": True},
    ("torch_adam", "per_head_muon"),
    lambda params: {},
)
KINDS = (ADAM, LION, SGD, ADEMAMIX, MUON)

TYPES = tuple(name for kind in KINDS for name in kind.types)


def kind_named(name: Any) -> Kind | None:
    """The kind of an `optimizer.type`; None where there is none."""
    for kind in KINDS:
        if name in kind.types or (kind.any_case and str(name).lower() in map(str.lower, kind.types)):
            return kind
    return None


def kind_of(raw: Mapping[str, Any]) -> Kind:
    """That of the whole JSON; AdamW where it names none that is known, and the optimizer is passed in."""
    section = raw.get("optimizer")
    return (kind_named(section.get("type")) if isinstance(section, dict) else None) or ADAM


def kind_of_client(client: Any) -> Kind:
    """That of an `optimizer` argument; AdamW where it is a function, or an optimizer that is yet to be converted."""
    return next((kind for kind in KINDS if type(client) is kind.optimizer), ADAM)


def check_states(config: OptimizerConfig, optimizer: type[QuantizedOptimizer], name: str) -> None:
    """Raise ConfigError where the section stores a state that the optimizer does not have."""
    states = tuple(optimizer.STATES)
    for state in config.states():
        if state not in states:
            where, one = f"{config.where}.{state}", "one" if len(states) == 1 else "some"
            got = getattr(config, state).model_dump(exclude_unset=True)
            raise fail(where, got, f"{', '.join(states)} with {name}, which has no {state}", f"store {one} of those")


def check_zero(raw: Mapping[str, Any], kind: Kind) -> None:
    """Raise ConfigError where DeepSpeed does not compute Muon's updates as its momentum in few bits needs it."""
    if kind is not MUON:
        return
    section = raw.get("zero_optimization") or {}
    stage, reduce_scatter = section.get("stage", 0), section.get("reduce_scatter", True)
    if stage == 0:
        allowed = "1, 2 or 3 with Muon and ds_quant.optimizer (it is ZeRO that makes updates of whole matrices)"
        raise fail("zero_optimization.stage", stage, allowed, "set 1, which works with one process too")
    if stage == 3 and reduce_scatter is not False:
        allowed = "false with Muon at stage 3 (DeepSpeed gathers whole matrices)"
        raise fail("zero_optimization.reduce_scatter", reduce_scatter, allowed, "set it so, or use stage 1 or 2")
    for where, key, reason in (
        ("zero_optimization", "save_muon_momentum_buffer_in_memory", "it keeps a second momentum of full size"),
        ("fp16", "enabled", "momentums of gradients with a loss scale are not tested; use bf16"),
    ):
        value = (raw.get(where) or {}).get(key)
        if value and value != "auto":
            raise fail(f"{where}.{key}", value, f"false with Muon and ds_quant.optimizer ({reason})", "remove it")


def check_universal(raw: Mapping[str, Any], kind: Kind) -> None:
    """Raise ConfigError for universal checkpoints of states that DeepSpeed's converter does not know."""
    section = raw.get("checkpoint")
    if isinstance(section, dict) and section.get("load_universal") and tuple(kind.optimizer.STATES) != MOMENTS:
        raise fail(
            "checkpoint.load_universal",
            True,
            f"false with {kind.name} (DeepSpeed's universal checkpoints hold exp_avg and exp_avg_sq, no less and no "
            "more)",
            "resume from the checkpoint itself, at its number of ranks",
        )
