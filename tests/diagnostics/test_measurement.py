"""Measurements as JSON and CSV."""

import csv
import io
import json
import math

import pytest

from ds_quant.base.errors import ConfigError
from ds_quant.diagnostics.measurement import KINDS, Measurement, rows_csv, scalars_csv

FOUND = Measurement(
    "outliers",
    7,
    {"a": 1.0, "b": math.nan, "c": math.inf},
    [{"layer": 'x, "y"', "value": -math.inf, "count": 3, "none": None}, {"layer": "z", "value": 0.1, "count": 2**40}],
    {"list": [1, 2.5, "three", None], "inner": {"nan": math.nan}},
)  # fmt: skip


def test_json_is_plain_and_comes_back():
    text = FOUND.to_json()
    assert "\n" not in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = Measurement.from_json(text)
    assert math.isnan(back.scalars.pop("b"))
    assert back.scalars == {"a": 1.0, "c": math.inf}
    assert back.rows == FOUND.rows
    assert back.kind == "outliers"
    assert back.step == 7
    assert back.settings["list"] == [1, 2.5, "three", None]
    assert Measurement.from_json(Measurement("moments", None).to_json()) == Measurement("moments", None)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"kind": "outliers"}', '{"kind": "x", "step": 1}', "[" * 99999])
def test_other_text_is_refused(text):
    with pytest.raises(ConfigError):
        Measurement.from_json(text)


def test_a_kind_must_be_known():
    with pytest.raises(ConfigError, match="sharpness"):
        Measurement("sharpnes", 1)
    assert len(KINDS) == len(set(KINDS)) == 8


def test_csv_of_scalars_and_rows():
    other = Measurement("outliers", None, {"a": 0.1 + 0.2}, [{"layer": "q", "more": 5}])
    scalars = list(csv.DictReader(io.StringIO(scalars_csv([FOUND, other]))))
    assert [(row["step"], row["kind"], row["name"]) for row in scalars] == [
        ("7", "outliers", "a"), ("7", "outliers", "b"), ("7", "outliers", "c"), ("", "outliers", "a")]  # fmt: skip
    assert float(scalars[-1]["value"]) == 0.1 + 0.2
    assert math.isnan(float(scalars[1]["value"]))
    rows = list(csv.DictReader(io.StringIO(rows_csv([FOUND, other]))))
    assert list(rows[0]) == ["step", "kind", "layer", "value", "count", "none", "more"]
    assert rows[0]["layer"] == 'x, "y"'
    assert float(rows[0]["value"]) == -math.inf
    assert (rows[2]["value"], rows[2]["more"]) == ("", "5")
    assert scalars_csv([other], header=False).count("\n") == 1
    assert rows_csv([other]) == "step,kind,layer,more\n,outliers,q,5\n"
