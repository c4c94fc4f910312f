"""Converts the models of transformers' auto mappings, two layers each, on the meta device, and prints the counts.

    python tests/linear/architecture_sweep.py [MAPPING ...]     # such as CAUSAL_LM or CTC; default: all below

A refused model is tried again with the `exclude` that the error prints. Exit code 1 where that fails.
"""

import json
import sys
import warnings
from collections import Counter

import torch
import transformers
from transformers.models.auto import modeling_auto

from ds_quant.config import ConfigError
from ds_quant.linear.convert import convert, coverage

W8A8 = {"weight": {"bits": 8}, "activation": {"bits": 8}}
MAPPINGS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def shrink(config):
    for key, value in list(vars(config).items()):
        if key in LAYERS and isinstance(value, int):
            setattr(config, key, 2)
        elif key in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            setattr(config, key, value[:2])
        elif isinstance(value, transformers.PretrainedConfig):
            shrink(value)


def build(name):
    cls = getattr(transformers, name)
    config = cls.config_class()
    shrink(config)
    with torch.device("meta"):
        return cls(config)


def outcome(model):
    """What conversion comes to, and the names of the heads."""
    try:
        convert(model, W8A8)
    except ConfigError as error:
        if "several experts" not in str(error):
            return "its head is the only linear layer" if "leave none" in str(error) else f"refused: {error}", []
        fix = json.loads(str(error).rpartition('"exclude": ')[2])
        try:
            convert(model, {**W8A8, "exclude": fix})
        except ConfigError as second:
            return f"THE FIX FAILS: {second}", []
        return "fused experts: refused, converts with the printed fix", coverage(model).heads
    return "converted", coverage(model).heads


def main():
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    failed = False
    for mapping in sys.argv[1:] or MAPPINGS:
        counts, without_head = Counter(), []
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            name = names if isinstance(names, str) else names[0]
            try:
                model = build(name)
            except Exception as error:  # a package that is missing, or a default config that does not suit two layers
                counts["not built"] += 1
                print(f"  {name}: not built ({str(error)[:80]!r})", file=sys.stderr)
                continue
            result, heads = outcome(model)
            failed |= "FAILS" in result or result.startswith("refused")
            counts[result] += 1
            if not heads and not result.startswith("its head"):
                without_head.append(name)
        print(f"{mapping}: " + "; ".join(f"{count} {result}" for result, count in counts.items()))
        if without_head:
            print(f"  without a head that is a linear layer and could be told: {', '.join(without_head)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
