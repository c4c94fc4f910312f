"""A Hugging Face checkpoint on the disk: its config, its section, its safetensors, and whether they belong together.

Of a checkpoint folder of a DeepSpeed run the model's own files are read. With bf16 or fp16 these hold the 16-bit
weights, which are what the forward saw; DeepSpeed's files add the fp32 master weights, which no forward ever saw.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.config import ConfigError, LinearConfig, QuantConfig
from ds_quant.config.deepspeed_json import SECTION

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
A_CHECKPOINT = "a folder with config.json and safetensors, as save_pretrained writes it"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet."""

    file: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HFCheckpoint:
    """A folder that has been checked: every file exists and has its full length."""

    folder: Path
    config: dict[str, Any]
    """config.json."""
    tensors: dict[str, StoredTensor]
    """By key, in the files' order."""
    sharded: bool

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    def read(self, file: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one file, one after the other."""
        with safe_open(self.folder / file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                yield key, opened.get_tensor(key)


def open_checkpoint(folder: str | Path) -> HFCheckpoint:
    """Look through a folder.

    Raises:
        ConfigError: it is no checkpoint, is quantized already, or has a file that is missing or cut short.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise fail(str(folder), "no such folder", A_CHECKPOINT, "correct the path")
    config = _read_json(folder / "config.json", _fix_without_config(folder))
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise fail(str(folder), f"a model in {method} already", A_CHECKPOINT, "export the checkpoint it was made from")
    files, weight_map = _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found = _look_into(folder / file)
        wanted = [key for key, where in weight_map.items() if where == file]
        if lost := [key for key in wanted if key not in found]:
            got = f"{len(lost)} tensors fewer than {INDEX} says (the first: {lost[0]})"
            raise fail(str(folder / file), got, "files of one save", "copy the whole checkpoint again")
        tensors |= {key: StoredTensor(file, shape) for key, shape in found.items()}
    return HFCheckpoint(folder, config, tensors, bool(weight_map))


def _fix_without_config(folder: Path) -> str:
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        return f"name one of the folders in it: {', '.join(inner)}"
    if (folder / "latest").is_file() or any(folder.glob("*model_states.pt")):
        return (
            "these are DeepSpeed's own files alone; write the model with save_pretrained, or the Trainer's save_model"
        )
    return "name a folder that save_pretrained has written"


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    if not path.is_file():
        raise fail(str(path), "no such file", A_CHECKPOINT, fix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise fail(str(path), f"broken JSON ({error})", "a JSON object", "copy the file again") from error
    if not isinstance(content, dict):
        raise fail(str(path), content, "a JSON object", "copy the file again")
    return content


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the files, and which key the index puts where; no index where there is one file only."""
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    if not (folder / INDEX).is_file():
        fix = "save it with save_pretrained of transformers 5"
        if (folder / "latest").is_file():
            fix = (
                'ZeRO-3 leaves the weights in DeepSpeed\'s files unless "stage3_gather_16bit_weights_on_model_save" is '
                "true: set that and go on training from here for a step, or export the run's final model"
            )
        raise fail(str(folder), f"neither {SINGLE} nor {INDEX}", A_CHECKPOINT, fix)
    weight_map = _read_json(folder / INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fail(str(folder / INDEX), "no weight_map", "which file holds which tensor", "copy the file again")
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise fail(str(folder / file), "no such file", f"every file that {INDEX} names", "copy the missing shard")
    return files, weight_map


def _look_into(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape by key. Opening compares the length of the file with what its header says."""
    try:
        with safe_open(path, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        got = f"a file of {path.stat().st_size} bytes that was cut short or is not in the safetensors format ({error})"
        raise fail(str(path), got, "a whole file", "copy the file again") from error


def linear_section(checkpoint: HFCheckpoint, given: str | Path | None) -> LinearConfig | None:
    """How the linears were quantized: from the checkpoint's config.json, or from the DeepSpeed JSON `given`.

    None where they were not, or where neither says anything.

    Raises:
        ConfigError: both say something, and not the same.
    """
    place = f"{checkpoint.folder / 'config.json'}: {SECTION}"
    stored = checkpoint.config.get(SECTION)
    from_checkpoint = None
    if stored is not None:
        try:
            section = QuantConfig.parse(stored)
        except ConfigError as error:
            raise ConfigError("\n".join(f"{place}: {line}" for line in str(error).splitlines())) from error
        from_checkpoint = section.linear if section.enabled else None
    if given is None:
        return from_checkpoint
    from_file = QuantConfig.load(str(given)).linear
    if stored is not None and from_file != from_checkpoint:
        said, trained = _said(from_file), _said(from_checkpoint)
        keys = [key for key in said | trained if said.get(key) != trained.get(key)]
        raise ConfigError(
            f"--config {given}: got {json.dumps({key: said.get(key) for key in keys})} in {LinearConfig.where}; "
            f"allowed: what the checkpoint was trained with, {json.dumps({key: trained.get(key) for key in keys})}; "
            "fix: leave --config out, or name the checkpoint of that run"
        )
    return from_file


def _said(linear: LinearConfig | None) -> dict[str, Any]:
    return {} if linear is None else linear.model_dump(mode="json")


def skeleton(checkpoint: HFCheckpoint) -> nn.Module:
    """The model that config.json describes, on the meta device: its modules, names, shapes and ties.

    Raises:
        ConfigError: transformers knows no such model, or cannot build one.
    """
    import transformers

    where = str(checkpoint.folder / "config.json")
    names = checkpoint.config.get("architectures") or [None]
    cls: Any = getattr(transformers, str(names[0]), None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not known:
        raise fail(
            f"{where}: architectures", names, "a model class of transformers", "correct it, or use --format bf16"
        )
    try:
        config = cls.config_class.from_pretrained(checkpoint.folder)
        with torch.device("meta"):
            model: nn.Module = cls(config)
    except Exception as error:  # whatever a wrong value in a config leads to, in code that is not ours
        raise ConfigError(
            f"{where}: got values that {cls.__name__} cannot be built from ({type(error).__name__}: {error}); "
            "allowed: the config that the weights were saved with; fix: copy the file again"
        ) from error
    return model


def check_weights_fit(checkpoint: HFCheckpoint, model: nn.Module) -> None:
    """Compare the files with the model that config.json describes.

    Raises:
        ConfigError: a tensor is missing, left over, or of another shape. A tied one needs one of its names only.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    present = {
        name for group in tied_names(model) if any(name in checkpoint.tensors for name in group) for name in group
    }
    missing = [key for key in shapes if key not in checkpoint.tensors and key not in present]
    surplus = [key for key in checkpoint.tensors if key not in shapes]
    other = [key for key, tensor in checkpoint.tensors.items() if key in shapes and tensor.shape != shapes[key]]
    fix = "export the config and the weights of one save together"
    for what, keys in (("no", missing), ("the surplus", surplus), ("another shape of", other)):
        if not keys:
            continue
        more = f" and {len(keys) - 1} tensors more" if len(keys) > 1 else ""
        if keys is other:
            more = f" ({list(checkpoint.tensors[keys[0]].shape)} instead of {list(shapes[keys[0]])}){more}"
        raise ConfigError(
            f"{checkpoint.folder}: got files with {what} {keys[0]}{more}; allowed: the weights of the model that "
            f"config.json describes; fix: {fix}"
        )


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter, in the model's order; more than one where it is tied."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())
