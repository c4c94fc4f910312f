"""The study: its rows, sizes and text."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT
from helpers.study_results import ROWS
from studying import combinations, plan, protocol, repairs, rows, sections, texts, wiki_markup
from sweeping import paper
from transformers import AutoConfig, AutoModelForCausalLM

from ds_quant.config import QuantConfig
from ds_quant.linear.convert import convert

# ---- rows and sizes


def test_every_row_of_the_paper_is_there_as_its_file_has_it() -> None:
    names = [*paper.COMPONENTS, *paper.COMBINATIONS, *paper.MOMENTS]
    matrix = {name: row for name, row in ROWS.items() if row.kind == rows.MATRIX}
    assert list(matrix) == names
    assert set(paper.OUTCOMES) == set(names)
    for name, row in matrix.items():
        assert row.config == (ROOT / "ds_configs" / "paper" / f"paper_{name}.json").read_text()


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_one_that_ds_quant_takes(name: str) -> None:
    section = json.loads(sections.filled_in(ROWS[name].config, layers=2, steps=10)).get("ds_quant")
    quant = None if section is None else QuantConfig.model_validate(section)
    if quant is not None and quant.linear is not None:
        for family in filter(ROWS[name].is_of, protocol.FAMILIES):
            overrides = protocol.Size(32, 64, 2, 2, 16, 2, 2).overrides(family)
            values = {key: value == "True" if "tie" in key else int(value) for key, value in overrides.items()}
            config = AutoConfig.for_model(family, **values, vocab_size=64, bos_token_id=1, eos_token_id=1)
            model = AutoModelForCausalLM.from_config(config)
            convert(model, quant.linear)
            # Which an engine alone trains with.
            model.train(
                not any(key in ROWS[name].config for key in ("oscillation_reset", "forward_full_precision_from"))
            )
            ids = torch.randint(64, (2, 16))
            model(input_ids=ids, labels=ids).loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    others = {plan.fingerprint(row) for row in ROWS.values() if row.name != name}
    assert plan.fingerprint(ROWS[name]) not in others


def test_what_depends_on_a_run_is_filled_in() -> None:
    last = json.loads(sections.filled_in(ROWS["a4_block32_no_last"].config, layers=6, steps=162))
    assert last["ds_quant"]["linear"]["exclude"] == ["lm_head", "*.5.*"]
    for name in ("a4_token_full_at_end", "w4a4g4_nvfp4_full_at_end"):
        config = json.loads(sections.filled_in(ROWS[name].config, layers=6, steps=162))
        assert config["ds_quant"]["linear"]["forward_full_precision_from"] == 129
    for row in ROWS.values():
        assert "@" not in sections.filled_in(row.config, layers=2, steps=162)


def test_repairs_have_the_bits_of_what_they_repair() -> None:
    bits = {"nvfp4": 4, "nvint4": 4, "mxfp4": 4}
    for name, repair in (repairs.ALL | combinations.ALL).items():
        if name in combinations.RECIPES:
            continue  # as they are shipped
        told = [
            v for part in repair.section.values() for k, v in part.items() if isinstance(v, dict) and k != "rotation"
        ]
        most = max(values.get("bits") or bits[values["format"]] for values in told)
        named = {int(digit) for digit in "48" if digit in name.partition("_")[0]}
        assert most == max(named) or name.endswith("m4v8"), name


@pytest.mark.parametrize("family", protocol.FAMILIES)
def test_parameters_are_those_of_the_models(family: str) -> None:
    from pretraining import arguments, model

    for size in protocol.SIZES.values():
        overrides = ",".join(f"{key}={value}" for key, value in size.overrides(family).items())
        asked = arguments.ModelArguments(
            preset="tiny" if family == "llama" else "tiny-gpt2", config_overrides=overrides
        )
        config = model.resolve_config(asked, vocab_size=2048, context_length=size.context_length)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
        assert model.describe(built)["num_parameters"] == size.parameters(family, 2048)
    assert protocol.SIZES["0.7m"].steps("llama", 2048, 1) == 162


# ---- text


def test_prose_of_an_article() -> None:
    markup = """{{Infobox|a={{b|[[c]]}}}}
'''Anarchism''' is a [[political philosophy|philosophy of politics]] of [[self-governance]].<ref name="x">{{cite}}</ref>
[[File:A.jpg|thumb|A [[link]] in a caption that ends with a full stop.]]
{| class="wikitable"
| a cell that is long enough to be a sentence of its own here.
|}
== History ==
In 1920 &amp; later it was <b>much</b> discussed<!-- by whom? --> in the press of [http://a.org many countries].
* a list whose item is long enough to be a sentence, and is none.
A last sentence with a formula <math>x^2.</math> and a note<ref>Not this one.</ref> in it.
==References==
This line is long enough to be a sentence, but it lists only sources.
"""
    assert wiki_markup.prose(markup).split("\n") == [
        "Anarchism is a philosophy of politics of self-governance.",
        "In 1920 & later it was much discussed in the press of many countries.",
        "A last sentence with a formula and a note in it.",
    ]


def test_browns_words_become_text() -> None:
    tagged = "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' ./.\n\n\n\tWhy/wrb ?/. ?/.\n"
    assert texts.untagged(tagged) == 'The jury said, "no evidence".\nWhy?'


def test_what_a_row_spares_is_told() -> None:
    found = {name: row.spared for name, row in ROWS.items() if row.spared}
    assert {name for name in found if ROWS[name].kind == "paper"} == set()
    assert found["a4_token_outliers"] == "channels"
    assert found["a4_token_full_at_end"] == "steps"
    no_head = {name for name in ROWS if "no_head" in name or "no_last" in name or name.startswith("recommended")}
    assert {name for name, spared in found.items() if spared == "layers"} == no_head


def test_what_is_sent_between_ranks_is_quantized_in_rows_of_two_alone() -> None:
    sent = {name for name, row in ROWS.items() if "communication" in (json.loads(row.config).get("ds_quant") or {})}
    assert {name for name, row in ROWS.items() if row.ranks > 1} == sent | {"baseline_two_ranks"}
    assert {"wire4", "w4a4g4_nvfp4_m4v4_wire4", "recommended_4bit_two_ranks"} <= sent
    shipped = json.loads((ROOT / "ds_configs" / "recommended_4bit.json").read_text())["ds_quant"]
    assert json.loads(ROWS["recommended_4bit_two_ranks"].config)["ds_quant"] == shipped
    # All but the wire is that of the row beside it.
    for name in sent:
        for ending in ("_wire4", "_two_ranks"):
            one = ROWS.get(name.removesuffix(ending))
            if one is not None and one.name != name:
                both = [json.loads(row.config)["ds_quant"] for row in (one, ROWS[name])]
                assert {**both[0], "communication": both[1]["communication"]} == both[1]
    # The number of ranks is a setting of a row like any other.
    assert plan.fingerprint(ROWS["baseline_two_ranks"]) != plan.fingerprint(ROWS["baseline"])
