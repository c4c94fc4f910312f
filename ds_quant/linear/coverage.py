"""What of a model is quantized, counted on the model as it is."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ds_quant.linear.experts import fused_experts, shared_patterns, starred
from ds_quant.linear.heads import output_heads
from ds_quant.linear.linear_classes import is_linear, obstacle
from ds_quant.linear.modules import QuantizedModule
from ds_quant.linear.shapes import shape_of


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
    heads: list[str] = field(default_factory=list)
    """Modules whose outputs are the model's logits and that stay in full precision."""
    experts: list[str] = field(default_factory=list)
    """Those of `left_out` that hold the weights of several experts in one."""
    obstacles: dict[str, str] = field(default_factory=dict)
    """Linear modules that cannot be converted, and why."""

    @property
    def share(self) -> float:
        """Share of the matrix-product parameters that is quantized, 0 to 1."""
        return self.covered_numel / self.matmul_numel if self.matmul_numel else 0.0

    def lines(self) -> list[str]:
        """The coverage as a few lines of text. What differs in the numbers of layers alone is one line."""
        kinds: dict[str, int] = {}
        for text in self.converted.values():
            kinds[text] = kinds.get(text, 0) + 1
        lines = [f"{count} linear modules quantized: {text}" for text, count in kinds.items()]
        lines.append(f"{self.share:.1%} of {self.matmul_numel:,} matmul parameters covered")
        if self.experts:
            owners = dict.fromkeys(name.rpartition(".")[0] or name for name in self.experts)
            numel = sum(torch.Size(self.left_out[name]).numel() for name in self.experts)
            patterns = ", ".join(shared_patterns(owners))
            lines.append(f"left in full precision: fused experts {patterns} ({numel:,} parameters)")
        lines += self._left_out_lines()
        if self.embeddings:
            lines.append("embeddings, never quantized: " + ", ".join(self.embeddings))
        return lines

    def _left_out_lines(self) -> list[str]:
        groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
        for name, shape in self.left_out.items():
            if name in self.experts:
                continue
            owner = name.rpartition(".")[0]
            note = " (output head)" if owner in self.heads else ""
            if owner in self.obstacles:
                note = f" ({self.obstacles[owner]})"
            groups.setdefault((starred(name), shape, note), []).append(name)
        lines = []
        for (pattern, shape, note), names in groups.items():
            what = names[0] if len(names) == 1 else f"{len(names)} x {pattern}"
            lines.append(f"left in full precision: {what} {list(shape)}{note}")
        return lines


def coverage(model: nn.Module) -> Coverage:
    """What of `model` is quantized, counted on the model as it is now (also with ZeRO-3's partitioned parameters)."""
    result = Coverage()
    counted: set[int] = set()
    include_classes: tuple[str, ...] = ()
    for name, module in model.named_modules():
        quantized = isinstance(module, QuantizedModule)
        if isinstance(module, QuantizedModule):
            result.converted[name] = module.describe()
            include_classes = module.quant_config.include_classes
        for key, parameter in module.named_parameters(recurse=False):
            shape = shape_of(parameter)
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
    result.heads = [name for name in output_heads(model) if name not in result.converted]
    result.experts = [name for name in fused_experts(model) if name in result.left_out]
    for name, module in model.named_modules():
        if is_linear(module) and name not in result.converted and (reason := obstacle(module, include_classes)):
            result.obstacles[name] = reason
    return result
