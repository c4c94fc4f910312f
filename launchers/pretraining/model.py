"""The model: from scratch, from its configuration, or from trained weights."""

from __future__ import annotations

import copy
from typing import Any

from survival.errors import LaunchError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from ds_quant.planning.presets import PRESETS
from pretraining.arguments import ModelArguments


def resolve_config(args: ModelArguments, *, vocab_size: int, context_length: int) -> PretrainedConfig:
    """The configuration of the model to train. Uses the network only for a named model."""
    name = args.model_name_or_path or args.config_name
    if name is not None:
        config = _load_config(name)
    else:
        preset = PRESETS[str(args.preset)]
        kwargs = copy.deepcopy(preset.model)
        multiple = preset.vocab_multiple
        # Products are faster with round sizes; ids beyond the tokenizer's never occur.
        kwargs["vocab_size"] = -(-vocab_size // multiple) * multiple
        kwargs["n_positions" if kwargs["model_type"] == "gpt2" else "max_position_embeddings"] = context_length
        config = AutoConfig.for_model(kwargs.pop("model_type"), **kwargs)
    if args.config_overrides:
        try:
            config.update_from_string(args.config_overrides)
        except (ValueError, KeyError, AttributeError) as error:
            raise LaunchError(
                f"--config_overrides {args.config_overrides!r}: {error}. Write name=value,name=value."
            ) from error
    if config.vocab_size < vocab_size:
        raise LaunchError(
            f"The tokenizer has {vocab_size} ids, the model an embedding for {config.vocab_size}. "
            f"Use the model's own tokenizer, or --config_overrides vocab_size={vocab_size}."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < context_length:
        raise LaunchError(
            f"--context_length {context_length} is longer than the {positions} positions of the model. "
            f"Give at most {positions}, or raise them with --config_overrides."
        )
    return config


def build(
    args: ModelArguments, training: TrainingArguments, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> PreTrainedModel:
    """The model on every rank. At ZeRO-3 it is partitioned during creation, because TrainingArguments exist."""
    config = resolve_config(args, vocab_size=len(tokenizer), context_length=context_length)
    for token in ("bos", "eos", "pad"):
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    set_seed(training.seed)
    if args.model_name_or_path is None:
        # Not the class itself: under zero.Init only from_config initializes the weights correctly.
        return AutoModelForCausalLM.from_config(config)
    try:
        return AutoModelForCausalLM.from_pretrained(args.model_name_or_path, config=config, dtype="float32")
    except (OSError, ValueError, RuntimeError) as error:
        raise LaunchError(f"--model_name_or_path {args.model_name_or_path}: {error}") from error


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Class, architecture and size, also if ZeRO-3 has partitioned the parameters."""
    sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "num_parameters": int(sum(sizes.values())),
        "vocab_size": model.config.vocab_size,
    }


def _load_config(name: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LaunchError(
            f"No model configuration could be loaded from {name!r}: {reason} "
            "Name a folder or a config.json, or check that the Hugging Face hub can be reached."
        ) from error
