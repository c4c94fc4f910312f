"""A trained model from its folder, with the quantizers of its training, without any, or with others.

The weights are those of `model.safetensors`: in a bf16 run the ones that the forward saw. Where ZeRO-3 left them in
DeepSpeed's files alone, they are put together from the fp32 master weights and rounded to the model's dtype, which
gives the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ds_quant.base.errors import fail
from ds_quant.cli.shared.opened_model import OpenedModel, choose, first_line, open_model, step_of
from ds_quant.config import ConfigError, LinearConfig
from ds_quant.linear.convert import convert, step_key_of

KEY_SEED = 0
"""Stochastic rounding draws the bits of this seed, whatever the training's was: every evaluation repeats itself."""


@dataclass
class LoadedModel:
    """A causal language model in eval mode, and what is known about it."""

    name: str
    """Folder, short enough for a table: the run's name, or run/checkpoint-N."""
    folder: Path
    """Where the model's files are."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None where the folder holds none."""
    linear: LinearConfig | None
    """The quantizers in force; None: no quantizers of ours."""
    trained: LinearConfig | None
    """The quantizers that the checkpoint was trained with."""
    step: int | None
    """The optimizer step of the checkpoint, where it says."""
    notes: list[str] = field(default_factory=list)
    """What a user should know: settings that mean nothing here."""


def load_model(
    folder: str | Path,
    *,
    quantizers: str | Path = "trained",
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        folder: a checkpoint-N, the final model, a run of pre-training (its final model, else its newest whole
            checkpoint), a folder of save_pretrained, or a compressed-tensors export.
        quantizers: `trained`, as the checkpoint's config.json says; `off`; or the path of a DeepSpeed JSON whose
            `ds_quant.linear` is put in their place. Of an export, `trained` is the quantization of the server.
        dtype: of weights and products; None: as saved.
        device: None: the accelerator, or the CPU without one.

    Raises:
        ConfigError: something is missing, cut short, does not belong together or does not fit into memory.
    """
    return load_opened(open_model(folder), quantizers=quantizers, dtype=dtype, device=device)


def load_opened(
    opened: OpenedModel,
    *,
    quantizers: str | Path,
    dtype: torch.dtype | None,
    device: str | None,
    with_backward: bool = False,
) -> LoadedModel:
    """As :func:`load_model`, of a folder that was opened before. with_backward: as for :func:`choose`."""
    linear, notes = choose(opened, quantizers, with_backward=with_backward)
    where = device_named(device)
    state = None
    if not opened.exported:
        state = _from_deepspeed_files(opened.path) if opened.checkpoint is None else None
        stored = state or (opened.checkpoint.tensors if opened.checkpoint is not None else {})
        elements = sum(math.prod(tensor.shape) for tensor in stored.values())
        _check_memory(opened.path, elements, dtype or _saved_dtype(opened.config), where)
    model = _build(opened, dtype, state)
    if linear is not None:
        convert(model, linear)
        key = step_key_of(model)
        assert key is not None
        key.reseed(KEY_SEED, 0)
    return LoadedModel(
        name=opened.name,
        folder=opened.path,
        model=model.to(where).eval(),
        tokenizer=_tokenizer(opened.path),
        linear=linear,
        trained=opened.trained,
        step=step_of(opened.path),
        notes=notes,
    )


def _saved_dtype(config: dict[str, Any]) -> torch.dtype:
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _from_deepspeed_files(path: Path) -> dict[str, torch.Tensor]:
    """The fp32 master weights, which ZeRO-3 keeps in parts; by the model's names."""
    from ds_quant.engine.zero_files import fp32_weights

    try:
        return fp32_weights(str(path))
    except Exception as error:  # of DeepSpeed, for files that are missing or cut short
        raise ConfigError(
            f"{path}: got files of DeepSpeed that cannot be put together ({type(error).__name__}: {error}); allowed: "
            "those of all ranks of one save; fix: copy the checkpoint again, or name another"
        ) from error


def device_named(asked: str | None) -> torch.device:
    """The device of that name; without one the accelerator, or the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if asked is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        fix = f"name another ({first_line(error)})"
        raise fail("device", asked, "a device that is there, such as cpu or cuda:0", fix) from error


def _check_memory(path: Path, elements: int, dtype: torch.dtype, device: torch.device) -> None:
    need = elements * dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        return
    # Half as much again for what a forward keeps would be a guess: only what cannot fit is refused.
    if need > free:
        raise fail(
            str(path),
            f"weights of {need / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')} where {free / 2**30:.1f} GiB "
            f"are free on {device}",
            "a model that fits into memory",
            "free memory, or use another device or a smaller dtype",
        )


def _build(opened: OpenedModel, dtype: torch.dtype | None, state: dict[str, torch.Tensor] | None) -> PreTrainedModel:
    """The model with every weight from the files, or from `state`."""
    path = opened.path
    if opened.exported:
        _need_compressed_tensors(path)
    wrong: dict[str, Any]
    try:
        if state is not None:
            chosen = dtype or _saved_dtype(opened.config)
            model = AutoModelForCausalLM.from_config(opened.model_config, dtype=chosen)
            missing, surplus = model.load_state_dict(state, strict=False)
            wrong = {"no": missing, "the surplus": surplus}
        else:
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=opened.model_config,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, all of them
            )
            kinds = {"no": "missing_keys", "another shape of": "mismatched_keys", "the surplus": "unexpected_keys"}
            wrong = {what: info[key] for what, key in kinds.items()}
    except Exception as error:  # whatever wrong values in a config lead to, in code that is not ours
        raise ConfigError(
            f"{path}: got a model that transformers cannot load ({type(error).__name__}: {first_line(error)}); "
            "allowed: config and weights of one save; fix: copy the checkpoint again"
        ) from error
    for what, keys in wrong.items():
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
        if names:
            more = f" and {len(names) - 1} tensors more" if len(names) > 1 else ""
            raise ConfigError(
                f"{path}: got files with {what} {names[0]}{more}; allowed: the weights of the model that config.json "
                "describes; fix: take config and weights of one save"
            )
    built: PreTrainedModel = model
    return built


def _need_compressed_tensors(path: Path) -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        fix = "pip install 'ds_quant[export]'"
        raise fail(str(path), "a compressed-tensors export", "the package compressed-tensors", fix) from error


def _tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    if not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        got = f"a tokenizer that cannot be loaded ({type(error).__name__}: {first_line(error)})"
        raise fail(str(path), got, "a whole tokenizer", "copy its files again") from error
    return tokenizer
