"""The file that `ds_quant_report --for` writes for each way in trains unedited, by a process that nothing launched."""

import json

import pytest
from conftest import ROOT
from helpers.launching import PROGRAMS, UNDER_DS_QUANT, run_ranks

from ds_quant.cli.report import main
from ds_quant.config.batch_sizes import BATCH_SIZES
from ds_quant.config.deepspeed_json import unresolved_auto
from ds_quant.config.ways_in import WAYS, config_for

pytestmark = pytest.mark.distributed


def test_each_way_in_runs_its_file_unedited(tmp_path):
    recipe = str(ROOT / "ds_configs" / "full_int8.json")
    for way in WAYS:
        values = ["--set", "bf16=false"] if way == "native" else []  # the others ask the script
        assert main([recipe, "--for", way, "--output", str(tmp_path / f"{way}.json"), *values]) == 0
    output = tmp_path / "report.json"
    run_ranks(UNDER_DS_QUANT, PROGRAMS / "ways_in.py", output, tmp_path, ranks=0, timeout=240)
    for way, got in json.loads(output.read_text()).items():
        assert got == {"linears": 7, "optimizer": "QuantAdamW", "steps": 2, "world_size": 1}, way


def test_what_lightning_fills_in_is_left_to_it():
    """Its Trainer refuses gradient_accumulation_steps in the config; tests/clients trains with it."""
    recipe = json.loads((ROOT / "ds_configs" / "full_int8.json").read_text())
    config, lines = config_for(recipe, "lightning", {})
    assert unresolved_auto(config) == []
    assert set(recipe) - set(config) == {
        *BATCH_SIZES,
        "gradient_clipping",
        "bf16",
        "optimizer",
        "scheduler",
    }
    assert [line.partition(" ")[0] for line in lines] == [
        "optimizer",
        "scheduler",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
    ]
