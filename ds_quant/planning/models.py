"""Models by name, and models from their config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_quant.base.errors import closest, fail
from ds_quant.planning.presets import PRESETS, Preset

if TYPE_CHECKING:
    from torch import nn

WAYS = (
    f"a preset ({', '.join(PRESETS)}), a folder with config.json or such a file, a name on the Hugging Face hub, or a "
    "description such as model_type=llama,hidden_size=4096,num_hidden_layers=32,vocab_size=32000"
)
_LENGTHS = ("max_position_embeddings", "n_positions")


def causal_model(config: dict[str, Any]) -> nn.Module:
    """The causal language model of a config.json, with new weights in fp32, as pre-training starts."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(_config_of(config), dtype="float32")


def preload() -> None:
    """Import what building any model imports."""
    import transformers.modeling_utils  # noqa: F401


def resolve_model(name: str, *, length: int | None = None, vocabulary: int | None = None) -> tuple[dict[str, Any], int]:
    """The config.json of a model, and the number of tokens in its sequences.

    Args:
        name: see `WAYS`.
        length: tokens of a sequence; all positions of the model if None.
        vocabulary: of a preset, whose own is its tokenizer's.

    Raises:
        ConfigError: no such model, one that transformers cannot build as a causal language model, or a sequence
            longer than its positions.
    """
    if preset := _preset(name):
        values = {**preset.model, "vocab_size": vocabulary or preset.flags.get("vocab_size", 50257)}
        values |= {"bos_token_id": None, "eos_token_id": None}  # the tokenizer's
        # As pre-training does it: the tokenizer's ids filled up to a multiple, positions as many as tokens.
        values["vocab_size"] = -(-values["vocab_size"] // preset.vocab_multiple) * preset.vocab_multiple
        length = length or preset.flags["context_length"]
        values["n_positions" if values["model_type"] == "gpt2" else "max_position_embeddings"] = length
    elif "=" in name:
        values = _described(name)
    else:
        values = _loaded(name)
    if vocabulary is not None and not preset:
        raise fail("--vocab-size", vocabulary, "presets' only", "write vocab_size into the model's config.json")
    config = _config_of(values, name)
    full = json.loads(config.to_json_string(use_diff=False))
    positions = next((full[key] for key in _LENGTHS if isinstance(full.get(key), int)), None)
    if length is None and positions is None:
        raise fail("--context", None, "the tokens of a sequence, which this model does not limit", "give --context")
    length = length or positions
    assert length is not None
    if length < 2:
        raise fail("--context", length, "at least 2: the last token has nothing to predict", "raise it")
    if positions is not None and length > positions:
        raise fail(
            "--context", length, f"at most {positions}, the positions of {name}", "lower it, or change the model"
        )
    return full, length


def _preset(name: str) -> Preset | None:
    found = PRESETS.get(name)
    if found is None and "/" not in name and not Path(name).exists() and (near := closest(name, PRESETS, 0.8)):
        raise fail("--model", name, WAYS, f'did you mean "{near}"?')
    return found


def _described(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for word in text.split(","):
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise fail("--model", text, WAYS, f"write {word!r} as name=value")
        try:
            values[key.strip()] = json.loads(value)
        except ValueError:
            values[key.strip()] = value.strip()
    if "model_type" not in values:
        raise fail("--model", text, "a description that begins with model_type=", "add model_type=llama, say")
    return values


def _loaded(name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return json.loads(AutoConfig.from_pretrained(name).to_json_string(use_diff=False))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise fail("--model", name, WAYS, f"check the name, and that the hub can be reached ({reason})") from error


def _config_of(values: dict[str, Any], name: str = "") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(values)
    model_type = values.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type)
        unknown = [key for key in values if "=" in name and key not in config.to_dict() | config.attribute_map]
        if unknown:
            near = closest(unknown[0], config.to_dict())
            hint = f'did you mean "{near}"?' if near else "remove it"
            raise fail(f"--model {model_type}", unknown[0], "a key of that model's config.json", hint)
        config = type(config).from_dict(values)
    except (ValueError, TypeError, KeyError) as error:
        if "fix" in str(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise fail("--model", name or values, WAYS, f"correct it ({reason[:200]})") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise fail("--model", name or model_type, "causal language models of transformers", "take one of those")
    return config
