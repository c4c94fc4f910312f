"""The fewest GPUs that Llamas train on, by dry runs: the table of planning.md.

    python docs/fit_table.py [--most-ranks 64] [1B 7B 13B 70B]

One sequence of 2048 tokens a GPU and step, bf16, activations recomputed, 2 GiB of each card set aside.
"""

import argparse
import sys
from bisect import bisect_left
from collections.abc import Sequence

from ds_quant.planning.fit import Fitter
from ds_quant.planning.models import resolve_model
from ds_quant.planning.plan import Request
from ds_quant.planning.predict import Predictor

MODELS = {
    "1B": "hidden_size=2048,intermediate_size=5632,num_hidden_layers=22,num_attention_heads=32,num_key_value_heads=4",
    "7B": "hidden_size=4096,intermediate_size=11008,num_hidden_layers=32,num_attention_heads=32",
    "13B": "hidden_size=5120,intermediate_size=13824,num_hidden_layers=40,num_attention_heads=40",
    "70B": "hidden_size=8192,intermediate_size=28672,num_hidden_layers=80,num_attention_heads=64,num_key_value_heads=8",
}
CARDS = (24, 40, 80, 141)
WORLDS = (1, 2, 4, 8, 16, 32, 64)
WAYS = {
    "32-bit moments, fp32 masters": (0, False),
    "8-bit moments, 24-bit masters": (2, False),
    "4-bit exp_avg, 24-bit masters": (3, False),
    "the same, gradients released at ZeRO 2": (3, True),
}
"""Depth of `ds_quant.planning.fit.DEPTHS`, and whether gradients are released."""
CONFIG = {
    "gradient_clipping": 0,
    "bf16": {"enabled": True, "check_grad_overflow": False},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000},
}


class Peaks:
    """Peaks of one model, in bytes, each dry run once."""

    def __init__(self, name: str, predictor: Predictor) -> None:
        self._model, self._length = resolve_model(f"model_type=llama,vocab_size=32000,{MODELS[name]}", length=2048)
        self._predictor = predictor
        self._known: dict[tuple[int, int, bool], int] = {}

    def peak(self, world_size: int, depth: int, released: bool) -> int:
        """At stage 3, which takes least; on one rank at stage 1, which has no buffers of higher ones."""
        key = world_size, depth, released
        if key not in self._known:
            asked = Request(CONFIG, self._model, self._length, world_size, 8, gradient_checkpointing=True)
            fitter = Fitter(asked, self._predictor, lambda line: print(line, file=sys.stderr, flush=True))
            stage = 2 if released else 1 if world_size == 1 else 3
            found = fitter.outcome(world_size, stage, True, depth, released)
            assert found is not None
            self._known[key] = found.peak_bytes
        return self._known[key]

    def fewest(self, card: int, depth: int, released: bool, worlds: Sequence[int]) -> str:
        """GPUs of `card` GiB, and the peak there in GiB."""

        def fits(world_size: int) -> bool:
            return self.peak(world_size, depth, released) <= (card - 2) * 2**30

        if fits(worlds[0]):  # which is the quickest to tell
            return str(worlds[0])
        place = bisect_left(worlds, True, lo=1, key=fits)
        return str(worlds[place]) if place < len(worlds) else f"more than {worlds[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="default: all")
    parser.add_argument("--most-ranks", type=int, default=WORLDS[-1], help="default: %(default)s")
    arguments = parser.parse_args()
    worlds = [world for world in WORLDS if world <= arguments.most_ranks]
    print(f"| model | states | GiB on one GPU | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print(f"|---|---|---|{'---|' * len(CARDS)}", flush=True)
    with Predictor() as predictor:
        for name in arguments.models:
            peaks = Peaks(name, predictor)
            for label, (depth, released) in WAYS.items():
                alone = peaks.peak(1, depth, released) / 2**30
                cells = " | ".join(peaks.fewest(card, depth, released, worlds) for card in CARDS)
                print(f"| {name} | {label} | {alone:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
