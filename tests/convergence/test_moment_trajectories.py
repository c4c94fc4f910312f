"""Bounds that the recommended ways to store the moments must keep;
docs/results/2026-11-22-moment-trajectories.md has the whole tables."""

import pytest
import torch
from convergence.moment_trajectories import M8, RECOMMENDED, V8, Moment, follow, recorded, synthetic

from ds_quant.numerics import code_map

DEFAULT = {"default": (M8, V8)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("beta2", "factor", "update"), [(0.95, 1.0, 0.12), (0.95, 0.1, 0.16), (0.95, 0.0, 0.15), (0.999, 0.1, 0.25)]
)
def test_8_bit_moments_follow_stationary_falling_and_ending_gradients(beta2, factor, update):
    figures = follow(synthetic(beta2, factor=factor, num_rows=8), beta2, DEFAULT)["default"]
    assert 0.9 < figures.mean < 1.1
    assert 0.85 < figures.median < 1.1
    assert figures.update < update
    assert figures.path < update
    assert 0.95 < figures.norm < 1.1


def test_nearest_rounding_of_the_second_moment_does_not():
    nearest = {"nearest": (None, V8._replace(rounding="nearest"))}
    dynamic = {"dynamic": (None, Moment(code_map("dynamic", 8, signed=False), 256))}
    figures = follow(synthetic(0.99, factor=0.1, num_rows=8), 0.99, {**nearest, **dynamic})
    assert figures["nearest"].mean > 1.5
    assert figures["dynamic"].mean > 4


def test_the_4_bit_second_moment_keeps_its_mean_but_not_the_update():
    figures = follow(synthetic(0.99, factor=0.1, num_rows=32), 0.99, {"4": (None, RECOMMENDED["4 bits"][1])})["4"]
    assert 0.8 < figures.mean < 1.25
    assert figures.update > 0.4


def test_training_gradients():
    trajectory = recorded(120)
    for beta2 in (0.95, 0.999):
        figures = follow(trajectory, beta2, RECOMMENDED)
        for f in figures.values():
            assert 0.95 < f.mean < 1.05
        assert figures["8 bits"].update < 0.1
        assert figures["m 4 bits, v 8 bits"].cosine > 0.8
        # No bound on the update of 4-bit exp_avg_sq: see the documentation.
