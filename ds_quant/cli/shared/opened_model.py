"""Inspects a model's folder before loading: what it contains, whether it is complete, how it was trained."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ds_quant.base import trainer_checkpoints
from ds_quant.base.errors import fail
from ds_quant.config import ConfigError, LinearConfig, QuantConfig
from ds_quant.export.hf_checkpoint import A_CHECKPOINT, INDEX, SINGLE, HFCheckpoint, linear_section, open_checkpoint


@dataclass(frozen=True)
class OpenedModel:
    """A folder that has been inspected but not loaded."""

    path: Path
    """The folder with config.json and the weights."""
    config: dict[str, Any]
    """config.json as it is written."""
    model_config: PretrainedConfig
    """What transformers makes of it."""
    checkpoint: HFCheckpoint | None
    """The weight files; None where DeepSpeed's files alone have them, and for an export."""
    trained: LinearConfig | None
    exported: bool
    """Whether it is quantized already, for servers."""

    @property
    def name(self) -> str:
        """Short enough for a table."""
        return short_name(self.path)

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model takes; None without a limit."""
        found = getattr(self.model_config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None


def open_model(folder: str | Path) -> OpenedModel:
    """Find the model in `folder`, and check that its files exist and are complete.

    Raises:
        ConfigError: something is missing, cut short or broken.
    """
    path = resolve(Path(folder))
    config, model_config = _configs(path)
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method")
        if method != "compressed-tensors":
            allowed = "a checkpoint of the training, or a compressed-tensors export"
            raise fail(str(path), f"a model in {method}", allowed, "name the checkpoint it was made from")
        return OpenedModel(path, config, model_config, None, None, exported=True)
    if _only_in_deepspeed_files(path):
        if problem := trainer_checkpoints.defect(path):
            raise fail(str(path), problem, "a whole checkpoint", "name another one, or copy it again")
        bare = HFCheckpoint(path, config, {}, sharded=False)
        return OpenedModel(path, config, model_config, None, linear_section(bare, None), exported=False)
    checkpoint = open_checkpoint(path)
    return OpenedModel(path, config, model_config, checkpoint, linear_section(checkpoint, None), exported=False)


def choose(
    opened: OpenedModel, quantizers: str | Path, *, with_backward: bool = False
) -> tuple[LinearConfig | None, list[str]]:
    """The quantizers to put in force, and what a user should know about them.

    with_backward: those of gradients in a JSON count as well.

    Raises:
        ConfigError: a JSON that is broken or quantizes nothing that a pass goes through, or any for an export.
    """
    if opened.exported and quantizers != "trained":
        fix = "name the checkpoint it was exported from"
        raise fail(f"{opened.path}: quantizers", str(quantizers), '"trained": its weights are codes already', fix)
    if quantizers == "off":
        return None, []
    if quantizers == "trained":
        # Gradient quantizers alone leave the forward as it is.
        trained = opened.trained
        if trained is None or not (trained.weight or trained.activation):
            return None, []
        return _at_step_of(opened.path, trained)
    section = QuantConfig.load(str(quantizers))
    linear = section.linear
    used = ("weight", "activation", *(("gradient",) if with_backward else ()))
    if linear is None or not any(getattr(linear, operand) for operand in used):
        got, passes = (
            " and ".join(f"no linear.{operand}" for operand in used),
            "a pass" if with_backward else "a forward",
        )
        raise fail(f"{quantizers}: ds_quant", got, f"quantizers that {passes} goes through", 'another JSON, or "off"')
    unused = [name for name in ("optimizer", "communication") if getattr(section, name) is not None]
    unused += ["linear.gradient"] if linear.gradient is not None and not with_backward else []
    if linear.forward_full_precision_from is not None:
        unused.append("linear.forward_full_precision_from")
    if linear.weight and linear.weight.oscillation_reset:
        unused.append("linear.weight.oscillation_reset")
    linear = _without_steps(linear)
    place = "here" if with_backward else "in an evaluation"
    return linear, [f"{quantizers}: without meaning {place}: {', '.join(unused)}"] if unused else []


def _at_step_of(path: Path, trained: LinearConfig) -> tuple[LinearConfig | None, list[str]]:
    """What the training's forward quantized at the step at which the weights were saved."""
    end = trained.forward_full_precision_from
    if end is None:
        return _without_steps(trained), []
    step, where = step_of(path), f"{LinearConfig.where}.forward_full_precision_from"
    if step is None:
        got, allowed = f"{end}, and no file that tells the step", "a checkpoint of the Trainer, or a run's final model"
        raise fail(f"{path}: {where}", got, allowed, 'choose quantizers by name: "off", or a JSON')
    if step >= end:
        note = f"{short_name(path)}: saved at step {step}, after {where} {end}: evaluated without quantizers"
        return None, [note]
    return _without_steps(trained), [f"{short_name(path)}: saved at step {step}, before {where} {end}: quantized"]


def _without_steps(linear: LinearConfig) -> LinearConfig:
    """Without what happens at steps of a training, of which an evaluation has none: quantized, and nothing reset."""
    if linear.forward_full_precision_from is not None:
        linear = linear.model_copy(update={"forward_full_precision_from": None})
    if linear.weight and linear.weight.oscillation_reset:
        linear = linear.model_copy(update={"weight": linear.weight.model_copy(update={"oscillation_reset": None})})
    return linear


# ---- the folder


def resolve(folder: Path) -> Path:
    """The folder with config.json and weights that `folder` stands for.

    Raises:
        ConfigError: there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise fail(str(folder), "no such folder", A_CHECKPOINT, "correct the path; of a model on the hub, its download")
    folder = folder.absolute()
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if trainer_checkpoints.listed(folder):
        newest = trainer_checkpoints.newest_whole(folder)
        if newest is None:
            last = trainer_checkpoints.listed(folder)[-1]
            problem = trainer_checkpoints.defect(last, ours=True)
            raise fail(str(last), f"a broken checkpoint: {problem}", A_CHECKPOINT, "name another, or train on")
        return newest
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    fix = f"name one of the folders in it: {', '.join(inner)}" if inner else "name a checkpoint or a run"
    raise fail(str(folder), "a folder without config.json", A_CHECKPOINT, fix)


def short_name(path: Path) -> str:
    """The last part of a path that tells models apart: a run's name for its final model, run/checkpoint-N."""
    if path.name == "model":
        return path.parent.name
    return f"{path.parent.name}/{path.name}" if re.fullmatch(r"checkpoint-\d+", path.name) else path.name


def step_of(path: Path) -> int | None:
    """The optimizer step at which the weights in `path` were saved, where a file says it."""
    for file, key in ((path / "trainer_state.json", "global_step"), (path.parent / "summary.json", "steps")):
        if file.name == "summary.json" and path.name != "model":
            continue
        try:
            value = json.loads(file.read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return int(value)
    return None


def _configs(path: Path) -> tuple[dict[str, Any], PretrainedConfig]:
    """config.json, and the configuration that transformers builds from it."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise fail(str(file), f"broken JSON ({error})", "a JSON object", "copy the file again") from error
    names = config.get("architectures") if isinstance(config, dict) else None
    if not names or names[0] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        allowed = "a causal language model of transformers"
        raise fail(f"{file}: architectures", names, allowed, "name the folder of one")
    try:
        return config, AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever a wrong value in a config leads to, in code that is not ours
        raise ConfigError(
            f"{file}: got values that transformers refuses ({type(error).__name__}: {first_line(error)}); allowed: the "
            "config that the weights were saved with; fix: copy the file again"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message; empty if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def _only_in_deepspeed_files(path: Path) -> bool:
    return not (path / SINGLE).is_file() and not (path / INDEX).is_file() and (path / "latest").is_file()
