"""Weights that a rank holds in few bits are not handed to whoever might take them for whole."""

from torch import nn

_REMEDY = "call engine.gather_weights() on all ranks before this"


class CodedWeights:
    """Whether the weights of an engine are whole on this rank."""

    def __init__(self) -> None:
        self.whole = True

    def is_whole(self) -> bool:
        return self.whole

    def check(self, what: str) -> None:
        """Raise RuntimeError unless they are."""
        if not self.is_whole():
            raise RuntimeError(
                f"{what}: got weights of which this rank holds parts in few bits (ds_quant.communication.weight); "
                f"allowed: whole weights; fix: {_REMEDY}"
            )


class Guard:
    """A hook of a layer that is called before its `state_dict`, and is copied with it."""

    def __init__(self, weights: CodedWeights | None) -> None:
        self._weights = weights

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.check("state_dict()")

    def __deepcopy__(self, memo: dict) -> "Guard":
        self.check("copy.deepcopy()")
        return Guard(None)  # a copy has weights of its own

    def check(self, what: str) -> None:
        if self._weights is not None:
            self._weights.check(what)


def check_whole(model: nn.Module) -> None:
    """Raise RuntimeError where a model still holds weights that an engine before has sent in few bits."""
    for module in model.modules():
        for hook in module._state_dict_pre_hooks.values():
            if isinstance(hook, Guard):
                hook.check("initialize(model)")
