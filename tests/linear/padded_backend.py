"""The definitions of padded operations as a backend of CPUs that may be chosen: layers then go the way of GPUs."""

from ds_quant.kernels import choice, registry
from ds_quant.kernels.int8 import ops
from ds_quant.numerics import products as reference

NAMES = ("quantize_operand", "quantize_gradient", "padded_matmul")


def add_padded_backend(monkeypatch):
    """Register it as "padded"; returns a list that takes its calls: name, arguments, and arguments by name."""
    monkeypatch.setattr(registry, "BACKENDS", [*registry.BACKENDS])
    monkeypatch.setattr(registry, "CHOICES", [*choice.CHOICES])
    monkeypatch.setattr(choice, "CHOICES", registry.CHOICES)
    registry.add_backend(registry.Backend("padded", ("cpu",), by_choice=True))
    found = []

    def counting(name):
        function = getattr(reference, name)

        def call(*args, **kwargs):
            found.append((name, args, kwargs))
            return function(*args, **kwargs)

        return call

    for name in NAMES:
        operation = getattr(ops, name)
        monkeypatch.setattr(operation, "implementations", {**operation.implementations})
        operation.by("padded")(counting(name))
    return found
