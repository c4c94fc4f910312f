"""What was fixed before any run: docs/study.md says it in words, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

FAMILIES = ("llama", "gpt2")
VOCABULARY = 2048
"""Of the study's own tokenizer; tokens of one's own (`--corpus`) bring theirs."""
SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4, 5, 6, 7)
"""For rows whose gap is below SMALL_EFFECT after SEEDS."""
RATES = (2e-3, 4e-3, 8e-3)
"""Learning rates that the baseline is tuned on with seed 0; doubled or halved on while the best one is at an end."""
SCALES = (0.5, 1.0, 2.0)
"""Learning rates of every row, as multiples of the tuned one."""
EQUAL_WITHIN = 0.02
"""Nats a token: a row is equal when its whole interval lies within plus and minus this."""
REPAIRED_WITHIN = 0.05
"""Nats a token: the mean gap of a repair."""
SMALL_EFFECT = 0.01
"""Nats a token."""
RISE = 0.5
"""Nats a token: a run has diverged when it ends so far above its own lowest validation loss, or is not finite."""


@dataclass(frozen=True)
class Size:
    """Widths and depth of both families, and how a step is cut."""

    hidden: int
    gated: int
    """Width of Llama's MLP; GPT-2's is 4 * hidden."""
    layers: int
    heads: int
    context_length: int
    batch: int
    """Sequences a step."""
    micro_batch: int

    @property
    def tokens_per_step(self) -> int:
        return self.context_length * self.batch

    def parameters(self, family: str, vocabulary: int) -> int:
        """Trained numbers of the model, whose embedding and output share theirs."""
        embedding = vocabulary * self.hidden
        if family == "llama":
            layer = 4 * self.hidden**2 + 3 * self.hidden * self.gated + 2 * self.hidden
            return embedding + self.layers * layer + self.hidden
        layer = 12 * self.hidden**2 + 13 * self.hidden
        return embedding + self.context_length * self.hidden + self.layers * layer + 2 * self.hidden

    def steps(self, family: str, vocabulary: int, ratio: float) -> int:
        """Steps that make `ratio` tokens a parameter, as near as whole steps come."""
        return max(1, round(ratio * self.parameters(family, vocabulary) / self.tokens_per_step))

    def overrides(self, family: str) -> dict[str, str]:
        """What makes the presets `tiny` and `tiny-gpt2` a model of this size."""
        if family == "llama":
            values: dict[str, object] = {
                "hidden_size": self.hidden,
                "intermediate_size": self.gated,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.heads,
                # Not derived anew from the two above.
                "head_dim": self.hidden // self.heads,
                "tie_word_embeddings": True,
            }
        else:
            values = {"n_embd": self.hidden, "n_layer": self.layers, "n_head": self.heads}
        return {key: str(value) for key, value in values.items()}


SIZES = {
    "0.7m": Size(128, 352, 2, 4, context_length=128, batch=32, micro_batch=32),
    "2m": Size(192, 512, 4, 6, context_length=128, batch=32, micro_batch=32),
    "5m": Size(256, 688, 6, 8, context_length=128, batch=32, micro_batch=32),
    # For GPUs, with a corpus of one's own. Without vocabulary they have 25M and 85M.
    "30m": Size(512, 1376, 8, 8, context_length=1024, batch=64, micro_batch=16),
    "124m": Size(768, 2048, 12, 12, context_length=1024, batch=128, micro_batch=16),
}


def has_diverged(final: float, lowest: float) -> bool:
    """Of one run: its last and its lowest validation loss in nats a token."""
    return not math.isfinite(final) or final > lowest + RISE
