"""Muon's parameter groups: each group that is passed in becomes one of Muon's matrices and one of AdamW's."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ds_quant.base.errors import fail

MUON_KEYS = ("lr", "momentum", "weight_decay", "ns_method")
ADAMW_KEYS = ("lr", "betas", "eps", "weight_decay")


def muon_groups(
    params: Iterable[Any], muon: Mapping[str, Any], adamw: Mapping[str, Any], states: Iterable[str]
) -> list[dict[str, Any]]:
    """The groups that DeepSpeed would make of `params`, parameters or groups of them with `use_muon` set on each.

    Args:
        params: a group's own hyperparameters and states go before those of `muon` and `adamw`.
        muon: hyperparameters of Muon's groups.
        adamw: those of AdamW's.
        states: names of the states, which a group may have of its own.

    Each group says by `use_muon` which of the two it is; Muon's has its largest matrices first, as in DeepSpeed, so
    that partitions are the same.

    Raises:
        ConfigError: a parameter that DeepSpeed has not marked, or that of an expert.
    """
    given, loose = [], []
    for item in params:
        if isinstance(item, dict):
            given.append({**item, "params": [item["params"]] if isinstance(item["params"], Tensor) else item["params"]})
        else:
            loose.append(item)
    if loose:
        given.append({"params": loose})
    groups = []
    for number, group in enumerate(given):
        trained = [param for param in group["params"] if param.requires_grad]
        unmarked = [param for param in trained if not hasattr(param, "use_muon")]
        if unmarked:
            raise fail(
                "model_parameters",
                f"a parameter of shape {list(unmarked[0].shape)} without use_muon",
                "parameters of the model that is passed to initialize, which DeepSpeed marks",
                "pass model.parameters(), or leave model_parameters out",
            )
        if any(not getattr(param, "allreduce", True) for param in trained):
            raise fail(
                "optimizer.type",
                "Muon for the experts of a mixture",
                "models without expert parallelism with Muon and ds_quant.optimizer",
                "use AdamW, or remove ds_quant.optimizer",
            )
        prefix = group.get("name") or (f"group{number}" if len(given) > 1 else None)
        for use_muon, label, keys, settings in ((True, "muon", MUON_KEYS, muon), (False, "adam", ADAMW_KEYS, adamw)):
            half = [param for param in trained if bool(param.use_muon) is use_muon]
            if use_muon:
                half.sort(key=lambda param: param.size(), reverse=True)
            if half:
                own = {key: value for key, value in group.items() if key in (*keys, *states)}
                name = f"{prefix}-{label}-params" if prefix else f"{label}-params"
                groups.append({"params": half, "use_muon": use_muon, "name": name, **settings, **own})
    return groups
