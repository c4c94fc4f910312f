"""What is trained: controls, every row of the paper's matrix, and repairs of those that fail."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from sweeping import paper

from ds_quant.config import TRIPWIRE
from ds_quant.config.deepspeed_json import TRIPWIRE_VALUE
from studying import combinations, repairs

BASELINE = "baseline"
CONTROL, MATRIX, REPAIR = "control", "paper", "repair"


@dataclass(frozen=True)
class Row:
    """One line of the tables."""

    name: str
    """Also of its folder; the paper's rows are called as in ds_configs/paper, without `paper_`."""
    kind: str
    """CONTROL, MATRIX or REPAIR."""
    component: str
    """Whose table it is in: W, A, G, m, v, wire, combined or recipe."""
    what: str
    """In words."""
    config: str
    """Text of its DeepSpeed JSON."""
    repairs: str = ""
    """Of a repair: the paper's row at the same number of bits."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Changes to the model's configuration."""
    outcome: str = ""
    """What the paper found."""
    families: tuple[str, ...] = ()
    """Those that it is trained with; empty: all."""
    ranks: int = 1
    """Processes of a run, which share each batch: more than one where something is sent between them."""

    def is_of(self, family: str) -> bool:
        """Whether models of that family are trained with it."""
        return not self.families or family in self.families

    @property
    def spared(self) -> str:
        """What of the quantized operands keeps more bits than the paper's rows leave it, in words; empty: nothing."""
        linear = (json.loads(self.config).get("ds_quant") or {}).get("linear")
        if linear is None:
            return ""
        found = {
            # Without a list the output layer stays as it is.
            "layers": linear.get("exclude") != [] or bool(linear.get("exclude_blocks")),
            "channels": "outlier_share" in (linear.get("activation") or {}),
            "steps": "forward_full_precision_from" in linear,
        }
        return ", ".join(what for what, is_spared in found.items() if is_spared)

    @property
    def own(self) -> list[Any]:
        """All that tells its runs from the baseline's."""
        content = json.loads(self.config)
        ranks = [self.ranks] if self.ranks > 1 else []
        return [content.get("ds_quant"), content["zero_optimization"].get("stage"), self.overrides, *ranks]


def all_rows() -> dict[str, Row]:
    """Every row by its name, in the order of the tables: the baseline first."""
    baseline = (paper.FOLDER / "baseline.json").read_text(encoding="utf-8")
    found = [*_controls(baseline), *_matrix(baseline), *_repairs(baseline)]
    rows = {row.name: row for row in found}
    assert len(rows) == len(found)
    return rows


def _controls(baseline: str) -> list[Row]:
    stage0 = json.loads(baseline)
    stage0["zero_optimization"]["stage"] = 0
    return [
        Row(BASELINE, CONTROL, "", "full precision", baseline),
        Row(
            "baseline_stage0",
            CONTROL,
            "",
            "full precision at ZeRO stage 0, where rows with a scale for whole moments run",
            _text(stage0),
        ),
        Row(
            "baseline_untied",
            CONTROL,
            "",
            "full precision, output layer with weights of its own, as the paper's quantized models had",
            baseline,
            overrides={"tie_word_embeddings": "False"},
        ),
        Row(
            "baseline_two_ranks",
            CONTROL,
            "",
            "full precision on two ranks, as rows that quantize what is sent have",
            baseline,
            ranks=2,
        ),
    ]


def _matrix(baseline: str) -> list[Row]:
    files = paper.files(baseline)
    rows = []
    for name, section in (paper.COMPONENTS | paper.COMBINATIONS | paper.MOMENTS).items():
        component = _component(section)
        rows.append(
            Row(
                name,
                MATRIX,
                component,
                _words(section),
                files[f"paper/paper_{name}.json"],
                outcome=paper.OUTCOMES[name],
            )
        )
    return rows


def _repairs(baseline: str) -> list[Row]:
    every = repairs.ALL | combinations.ALL
    known = set(paper.COMPONENTS | paper.COMBINATIONS | paper.MOMENTS) | set(every)
    rows = []
    for name, repair in every.items():
        assert not repair.of or repair.of in known, name
        content = json.loads(baseline)
        content["zero_optimization"] = {TRIPWIRE: TRIPWIRE_VALUE, **content["zero_optimization"]}
        content["ds_quant"] = repair.section
        more: dict[str, Any] = {"repairs": repair.of, "families": repair.families, "ranks": repair.ranks}
        rows.append(Row(name, REPAIR, repair.component, repair.what, _text(content), **more))
    return rows


def _component(section: paper.Section) -> str:
    letters = {"weight": "W", "activation": "A", "gradient": "G", "exp_avg": "m", "exp_avg_sq": "v"}
    return letters[next(iter(section))] if len(section) == 1 else "combined"


def _words(section: paper.Section) -> str:
    letters = {"weight": "W", "activation": "A", "gradient": "G", "exp_avg": "m", "exp_avg_sq": "v"}
    parts = []
    for operand, values in section.items():
        more = ", asymmetric" if values.get("symmetric") is False else ""
        more += ", for dX only" if values.get("used_for") == ["input"] else ""
        parts.append(f"{letters[operand]} {values['bits']} bits per {values['granularity']}{more}")
    return "; ".join(parts)


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
