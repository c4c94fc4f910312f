"""What was pickled under the names that modules had in version 0.1 goes on."""

import importlib
import sys

import pytest
import torch
import written_by_0_1 as old

from ds_quant.base import old_paths
from ds_quant.base.checkpoint_files import read_checkpoint_file


@pytest.fixture
def forgotten():
    """The old names, as if none had been imported in this process."""
    for name in old_paths.TODAY:
        sys.modules.pop(f"ds_quant.{name}", None)


@pytest.mark.parametrize("name", sorted(old_paths.TODAY))
def test_old_names_give_the_modules_of_today(name, forgotten):
    today = importlib.import_module(f"ds_quant.{old_paths.TODAY[name]}")
    spec = today.__spec__
    assert importlib.import_module(f"ds_quant.{name}") is today
    assert today.__spec__ is spec


def test_a_checkpoint_goes_on(single_rank, forgotten):
    told = torch.load(old.FOLDER / "told.pt", weights_only=True)
    engine = old.start()
    path, _ = engine.load_checkpoint(old.FOLDER)
    assert path is not None
    for name, values in old.moments(engine).items():
        assert torch.equal(values, told["moments"][name]), name
    for name, value in engine.module.state_dict().items():
        assert torch.equal(value, told["weights"][name]), name
    # Sums differ in their last bits between processors, and a code that flips by it moves little.
    assert old.losses(engine, old.STEPS) == pytest.approx(told["losses"], rel=1e-3)


def test_a_look_at_an_old_checkpoint_needs_no_pickle(forgotten):
    (path,) = (old.FOLDER / "saved").glob("zero_pp_rank_0_*")
    assert "ds_quant.moment.rebuild_moment" in torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    assert read_checkpoint_file(str(path))["optimizer_state_dict"]


def test_a_pickled_layer_trains(forgotten):
    layer = torch.load(old.FOLDER / "layer.pt", weights_only=False)
    assert type(layer).__module__ == "ds_quant.linear.modules"
    layer(torch.randn(3, 16)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
