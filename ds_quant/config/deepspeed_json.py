"""The DeepSpeed JSON around the section: reading it, the tripwire, misspelt keys, and `"auto"`.

No DeepSpeed is imported here; what is known about its JSON is data in this file, and the tests hold it against
the installed version.
"""

import base64
import binascii
import copy
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hjson

from ds_quant.base.errors import ConfigError, closest, fail, problem

SECTION = "ds_quant"

TRIPWIRE = "ds_quant_required"
"""The key in `zero_optimization` that makes stock DeepSpeed fail: it ignores an unknown top-level section, and would
train in full precision, but rejects unknown keys there."""

TRIPWIRE_VALUE = "run with python -m ds_quant"
"""What the shipped configs have under it: stock DeepSpeed's error shows key and value, and so tells what to do."""

TOP_LEVEL_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc
    dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
    prescale_gradients scheduler seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """.split()
)
"""What DeepSpeedConfig reads at the top level, in 0.19.8."""

OTHER_TOP_LEVEL_KEYS = frozenset({SECTION, "sequence_parallel_size", "data_parallel_size", "inference", "msamp"})
"""Top-level keys that are read elsewhere: here, by `deepspeed.initialize`, transformers and accelerate."""

_STATES = {"exp_avg", "exp_avg_sq", "momentum_buffer", "exp_avg_fast", "exp_avg_slow"}
"""Keys by which a misplaced `optimizer` section of this package is known."""

NATIVE_AUTO = ("data_types.keep_in_fp32_modules", "pipeline", "expert_parallel", "zero_optimization.zenflow")
"""Where `"auto"` is a value of DeepSpeed's own."""

DROPPED_AUTO = (
    "optimizer.params.eps",
    "scheduler.params.warmup_min_lr",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
)
"""`"auto"`s that HF Trainer fills and that have a default which does not depend on the job: without a value,
`resolve_auto` drops the key, so that the optimizer's or DeepSpeed's own default holds."""


# ---- reading


def read_deepspeed_config(source: Any) -> dict[str, Any]:
    """The whole DeepSpeed config as a dict of the caller's own, from whatever `deepspeed.initialize` takes.

    `source` is a path, a dict (copied), or the JSON text in URL-safe base64. The text may be Hjson (comments), as in
    DeepSpeed.
    """
    if isinstance(source, dict):
        return copy.deepcopy(source)
    if not isinstance(source, str | os.PathLike):
        raise fail("config", source, "a path, a dict or base64", "pass the DeepSpeed config")
    path = os.fspath(source)
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            got = f"a file that cannot be read as text ({error})"
            raise ConfigError(f"{path}: got {got}; allowed: a readable JSON file; fix: name one") from error
        return parse_deepspeed_config(text, str(path))
    decoded = _decode_base64(path)
    if decoded is None:
        raise ConfigError(
            f"{_shorten(path)}: got no such file (working directory {os.getcwd()}); "
            "allowed: the path of a JSON file, a dict, or the JSON in URL-safe base64; fix: correct the path"
        )
    return parse_deepspeed_config(decoded, "base64 config")


def _shorten(text: object) -> str:
    shown = str(text)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."


def _decode_base64(text: str) -> str | None:
    # Strict, and only what looks like an object or a comment: a mistyped path may be valid base64 by accident.
    try:
        decoded = base64.b64decode("".join(text.split()), altchars=b"-_", validate=True).decode("utf-8")
    except (ValueError, binascii.Error):
        return None
    return decoded if decoded.lstrip().startswith(("{", "#", "/")) else None


_START = "start from a recipe of ds_quant's documentation"


def parse_deepspeed_config(text: str, name: str) -> dict[str, Any]:
    """The text of a DeepSpeed config (JSON or Hjson) as a dict; `name` is what errors call it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise ConfigError(f"{name}: got {', '.join(repeated)} twice; allowed: each key once; fix: keep one")
        return dict(pairs)

    if not text.strip():
        raise ConfigError(f"{name}: got an empty file; allowed: a JSON object; fix: {_START}")
    try:
        config = hjson.loads(text, object_pairs_hook=unique)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(
            f"{name}: broken JSON at line {error.lineno}, column {error.colno} ({error.msg.replace(' %r', '')}); "
            "allowed: a JSON object, comments included; fix: correct it there"
        ) from error
    if not isinstance(config, dict):
        raise fail(name, config, "a JSON object", _START)
    return config


# ---- tripwire and misspelt keys


def has_tripwire(config: dict[str, Any]) -> bool:
    """Whether stock DeepSpeed would refuse this config; anything but true and TRIPWIRE_VALUE is an error."""
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or TRIPWIRE not in zero:
        return False
    if zero[TRIPWIRE] is not True and zero[TRIPWIRE] != TRIPWIRE_VALUE:
        allowed = f'true, "{TRIPWIRE_VALUE}", or absent'
        raise fail(f"zero_optimization.{TRIPWIRE}", zero[TRIPWIRE], allowed, "remove it or set it to true")
    return True


def strip_tripwire(config: dict[str, Any]) -> dict[str, Any]:
    """A copy that DeepSpeed accepts. Shallow, but for `zero_optimization`; `config` stays as it is."""
    stripped = dict(config)
    if has_tripwire(config):
        stripped["zero_optimization"] = {k: v for k, v in config["zero_optimization"].items() if k != TRIPWIRE}
    return stripped


def misspelt_section(config: dict[str, Any]) -> list[str]:
    """Problems with a section that is not read because it is misspelt or misplaced: silence would be full precision."""
    problems = []
    for key in config:
        plain = re.sub(r"[^a-z]", "", str(key).lower())
        if key == TRIPWIRE:
            problems.append(
                problem(key, config[key], "only inside zero_optimization", "move it there; DeepSpeed ignores it here")
            )
        elif key not in TOP_LEVEL_KEYS | OTHER_TOP_LEVEL_KEYS and (
            plain.startswith("dsquant") or closest(plain, ["dsquant"], cutoff=0.8)
        ):
            fix = f'did you mean "{SECTION}"? (a section is switched off by "enabled": false)'
            problems.append(problem(str(key), config[key], f'"{SECTION}"', fix))
    if SECTION in config:
        return problems
    optimizer = config.get("optimizer")
    stray = [key for key in ("linear", "communication") if isinstance(config.get(key), dict)]
    if isinstance(optimizer, dict) and _STATES & optimizer.keys():
        stray.append("optimizer")
    if stray:
        fix = f'nest the section in a whole DeepSpeed config: {{..., "{SECTION}": {{"{stray[0]}": ...}}}}'
        problems.append(problem(stray[0], config[stray[0]], f"only inside {SECTION}", fix))
    return problems


def near_miss_keys(config: dict[str, Any]) -> list[str]:
    """Warnings for top-level keys that DeepSpeed ignores and that look like one it reads."""
    warnings = []
    known = TOP_LEVEL_KEYS | OTHER_TOP_LEVEL_KEYS
    for key in config:
        match = None if key in known else closest(key, known, cutoff=0.8)
        if match:
            warnings.append(f'{key}: DeepSpeed has no such top-level key and ignores it; did you mean "{match}"?')
    return warnings


# ---- "auto"


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything that is not an object; without the ds_quant section."""
    if not isinstance(node, dict):
        yield path, node
        return
    for key, value in node.items():
        if path or key != SECTION:
            yield from _leaves(value, (*path, str(key)))


def _is_native_auto(path: str) -> bool:
    return any(path == native or path.startswith(f"{native}.") for native in NATIVE_AUTO)


def unresolved_auto(config: dict[str, Any]) -> list[str]:
    """The dotted paths that are still `"auto"`, without those where DeepSpeed means something by it."""
    paths = (".".join(path) for path, value in _leaves(config) if value == "auto")
    return [path for path in paths if not _is_native_auto(path)]


def _parent(config: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    *parents, last = path.split(".")
    for key in parents:
        config = config[key]
    return config, last


def _is_auto(config: dict[str, Any], path: str) -> bool:
    return path in unresolved_auto(config)


def _find(config: dict[str, Any], name: str, value: Any) -> str | None:
    """The path that the argument `name` speaks of; None where there is nothing to fill, and that is right."""
    paths = [".".join(path) for path, _ in _leaves(config)]
    wanted = name.replace("__", ".")
    if wanted in ("bf16", "fp16"):
        wanted = f"{wanted}.enabled"
        if wanted not in paths and value is False:
            return None
    # An exact path first: "train_batch_size" may recur deeper down.
    found = [path for path in paths if path == wanted] or [path for path in paths if path.endswith(f".{wanted}")]
    if len(found) == 1:
        return found[0]
    if found:
        full = " or ".join(path.replace(".", "__") for path in found)
        raise fail(name, value, "the name of one key", f"name it in full: {full}")
    match = closest(name, {path.rsplit(".", 1)[-1] for path in paths} | {"world_size"})
    hint = f'did you mean "{match}"?' if match else f'write "{name}": "auto" into the config, or leave the value out'
    raise fail(name, value, "the name of a key in the config", hint)


def _fill(config: dict[str, Any], path: str, value: Any) -> None:
    def as_json(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    parent, key = _parent(config, path)
    if parent[key] == "auto":
        parent[key] = as_json(value)
    elif as_json(parent[key]) != as_json(value):
        raise fail(path, value, f"{json.dumps(parent[key])}, as the config says", 'write "auto" there, or pass that')


def resolve_auto(config: Any, *, world_size: int = 1, **values: Any) -> dict[str, Any]:
    """A copy of the DeepSpeed config (path, dict or base64) with its `"auto"`s filled.

    A value is named by its key (`lr=1e-3`) or by its path where that is ambiguous (`optimizer__params__lr=1e-3`);
    `bf16` and `fp16` stand for their `enabled`. A value that contradicts the config, or that it has no key for, is an
    error. `train_batch_size` follows from micro batch, accumulation and `world_size`, and `warmup_max_lr` from `lr`.
    See `DROPPED_AUTO` for the keys that are dropped when no value is given. What is left, `unresolved_auto` names.
    """
    resolved = read_deepspeed_config(config)
    problems = []
    for name, value in values.items():
        try:
            path = _find(resolved, name, value)
            if path is not None:
                _fill(resolved, path, value)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    if _is_auto(resolved, "scheduler.params.warmup_max_lr") and not _is_auto(resolved, "optimizer.params.lr"):
        lr = resolved.get("optimizer", {}).get("params", {}).get("lr")
        if lr is not None:
            _fill(resolved, "scheduler.params.warmup_max_lr", lr)
    for path in DROPPED_AUTO:
        if _is_auto(resolved, path):
            parent, key = _parent(resolved, path)
            del parent[key]
    _resolve_train_batch_size(resolved, world_size)
    return resolved


def _resolve_train_batch_size(config: dict[str, Any], world_size: int) -> None:
    micro, accumulation = config.get("train_micro_batch_size_per_gpu"), config.get("gradient_accumulation_steps")
    if not (isinstance(micro, int) and isinstance(accumulation, int) and "train_batch_size" in config):
        return  # DeepSpeed computes what is absent; unresolved_auto names what is still "auto"
    product = micro * accumulation * world_size
    if config["train_batch_size"] == "auto":
        config["train_batch_size"] = product
    elif config["train_batch_size"] != product:
        raise fail(
            "train_batch_size",
            config["train_batch_size"],
            f"{product} = {micro} (micro batch) * {accumulation} (accumulation) * {world_size} (world_size)",
            'leave it "auto", or pass the right world_size',
        )
