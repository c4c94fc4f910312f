"""What was trained, in a format that servers load: see `ds_quant.cli.export` for what comes out."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.base.whole_folder import check_new, whole_folder
from ds_quant.config import LinearConfig
from ds_quant.config.deepspeed_json import SECTION
from ds_quant.export.hf_checkpoint import (
    INDEX,
    HFCheckpoint,
    check_weights_fit,
    linear_section,
    open_checkpoint,
    skeleton,
    tied_names,
)
from ds_quant.export.serving_format import (
    ServingFormat,
    activation_note,
    left_behind,
    quantization_config,
    serving_format,
)
from ds_quant.export.stored_weight import encode
from ds_quant.linear.convert import convert
from ds_quant.linear.experts import fused_experts
from ds_quant.linear.modules import QuantLinear

FORMATS = ("compressed-tensors", "bf16")

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
"""Files of a checkpoint, beside weights and config, that a server reads."""


@dataclass
class Exported:
    """What an export wrote, for the report."""

    format: str
    modules: list[str] = field(default_factory=list)
    """The linears that are stored in few bits."""
    ignored: list[str] = field(default_factory=list)
    """The nn.Linear modules that stay as they were."""
    elements: int = 0
    """Weights in `modules`."""
    stored_bytes: int = 0
    """What `modules` take: codes and scales."""
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report, as lines for the terminal."""
        lines = []
        if self.modules:
            share = self.stored_bytes / (2 * self.elements)
            size = f"{self.stored_bytes:,} bytes, {share:.1%} of what they take in bf16"
            lines.append(f"{self.format}: {len(self.modules)} linear modules in {size}")
            lines.append(f"as they were: {', '.join(self.ignored) or 'no linear module'}")
        else:
            lines.append("bf16: every floating-point tensor, no quantizers")
        return lines + self.notes


def export(
    checkpoint: str | Path, out: str | Path, *, config: str | Path | None = None, format: str = "compressed-tensors"
) -> Exported:
    """Write the checkpoint folder `checkpoint` to the new folder `out`.

    Args:
        checkpoint: what save_pretrained or the Trainer has written; ours has the section in its config.json.
        out: a folder that does not exist or is empty.
        config: the DeepSpeed JSON of the training, where the checkpoint does not have the section.
        format: `compressed-tensors` or `bf16`.

    Raises:
        ConfigError: something is missing, broken or cannot be expressed. `out` is then as it was.
        OSError: the disk is full, for instance. Likewise.
    """
    if format not in FORMATS:
        raise fail("--format", format, " or ".join(FORMATS), "write one of them")
    out = check_new(Path(out))
    source = open_checkpoint(checkpoint)
    linear = linear_section(source, config)
    if format == "bf16":
        plan, report = None, Exported("bf16")
    else:
        plan = _plan(source, linear)
        report = Exported(plan.form.name, list(plan.modules), plan.ignored, notes=plan.notes)
    with whole_folder(out) as folder:
        _write_weights(source, plan, folder, report)
        _write_config(source, plan, folder)
        copied = [path for pattern in COPIED for path in source.folder.glob(pattern) if path.is_file()]
        for path in copied:
            shutil.copyfile(path, folder / path.name)
        for path in folder.glob("*.safetensors"):  # safetensors makes it readable by this user only
            path.chmod((folder / "config.json").stat().st_mode)
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in copied):
        report.notes.append(f"{source.folder} holds no tokenizer: copy its files into {out}")
    return report


# ---- what is stored how


@dataclass
class _Plan:
    form: ServingFormat
    modules: dict[str, str]
    """Linear module to the key of the files that holds its weight."""
    plain: dict[str, list[str]]
    """Of these keys, the names under which the weight is stored as it is too, for an embedding tied to a linear."""
    ignored: list[str]
    notes: list[str]


def _plan(source: HFCheckpoint, linear: LinearConfig | None) -> _Plan:
    if linear is None:
        raise fail(
            f"{source.folder / 'config.json'}: {SECTION}",
            None,
            "a section with `linear`, there or in --config",
            "name the DeepSpeed JSON of the training by --config; for a model trained in full precision: --format bf16",
        )
    form = serving_format(linear)
    model = skeleton(source)
    _refuse_fused_experts(model)  # first: their files have other names than the model's parameters
    check_weights_fit(source, model)
    names = convert(model, linear)
    _refuse_other_layers(model, names)
    weights = {f"{name}.weight": name for name in names}
    modules: dict[str, str] = {}
    plain: dict[str, list[str]] = {}
    for group in tied_names(model):
        linears = [weights[key] for key in group if key in weights]
        if not linears:
            continue
        key = next(name for name in group if name in source.tensors)
        modules |= dict.fromkeys(linears, key)
        others = [name for name in group if name not in weights]
        plain[key] = [name for name in others if name in source.tensors] or others[:1]
    training_only = left_behind(linear)
    notes = [f"of training only, and left behind: {', '.join(training_only)}"] if training_only else []
    if note := activation_note(linear):
        notes.append(note)
    if any(plain.values()):
        if "tie_word_embeddings" not in source.config:
            fix = 'exclude the output head in training ("exclude": null), or use --format bf16'
            got = "a quantized linear tied to an embedding"
            raise fail("ds_quant.linear.exclude", got, "where config.json has tie_word_embeddings", fix)
        notes.append("the output head is quantized: stored apart from the input embedding, no longer tied to it")
    dtype = source.config.get("dtype", source.config.get("torch_dtype"))
    if form.is_decoded_in_bf16 and dtype != "bfloat16":
        notes.append(f"transformers: load it with dtype=torch.bfloat16, in which {form.name} is decoded")
    if not form.is_decoded_in_bf16 and dtype != "float32":
        notes.append("transformers: load it with dtype=torch.float32, else the scales are rounded to the model's dtype")
    ignored = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n not in modules]
    return _Plan(form, {name: modules[name] for name in names}, plain, ignored, notes)


def _refuse_other_layers(model: nn.Module, names: list[str]) -> None:
    for name in names:
        module = model.get_submodule(name)
        if type(module) is not QuantLinear:
            kind = getattr(type(module), "quantized_from", type(module).__mro__[2])
            got = f"a layer of type {kind.__name__}"
            fix = "--format bf16, or train a model of nn.Linear layers (Llama, Qwen, Mistral, OPT)"
            raise fail(name, got, "nn.Linear, the only linear layer that compressed-tensors serves", fix)


def _refuse_fused_experts(model: nn.Module) -> None:
    for name, shape in fused_experts(model).items():
        allowed = "models without fused experts: servers would take these for quantized ones"
        raise fail(name, f"experts in one tensor {list(shape)}", allowed, "--format bf16")


# ---- writing


def _write_weights(source: HFCheckpoint, plan: _Plan | None, folder: Path, report: Exported) -> None:
    """One file for each file of the source: no more than one of them is in memory."""
    weight_map: dict[str, str] = {}
    total = 0
    by_key: dict[str, list[str]] = {}
    for name, key in (plan.modules if plan else {}).items():
        by_key.setdefault(key, []).append(name)
    for file in source.files:
        stored: dict[str, Tensor] = {}
        for key, tensor in source.read(file):
            if plan is None:
                stored[key] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            elif key not in by_key:
                stored[key] = tensor
            else:
                for name in by_key[key]:
                    encoded = encode(name, tensor, plan.form)
                    report.elements += tensor.numel()
                    report.stored_bytes += sum(part.nbytes for part in encoded.values())
                    stored |= encoded
                stored |= {other: tensor.clone() for other in plan.plain[key]}
        try:
            save_file(stored, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder.parent}: {file} could not be written ({error})") from error
        weight_map |= dict.fromkeys(stored, file)
        total += sum(tensor.nbytes for tensor in stored.values())
    if source.sharded:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(source: HFCheckpoint, plan: _Plan | None, folder: Path) -> None:
    config: dict[str, Any] = {key: value for key, value in source.config.items() if key != SECTION}
    if config.get("use_cache") is False:
        config["use_cache"] = True  # the Trainer turns it off to train, and saves it so
    if plan is None:
        config.pop("torch_dtype", None)
        config["dtype"] = "bfloat16"
    else:
        config["quantization_config"] = quantization_config(plan.form, plan.ignored)
        if any(plan.plain.values()):
            config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
