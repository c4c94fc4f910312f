"""Runs of weights: each element is sent once by its owner, in as many bytes as the formula says."""

import numpy as np
import pytest

from ds_quant.comm.weight_layout import Coding, Weight, build


def weights_of(shapes):
    start, found = 0, []
    for number, (shape, coding) in enumerate(shapes):
        found.append(Weight(f"w{number}", start, shape, coding))
        start += int(np.prod(shape))
    return found, start


ROWS, COLUMNS = Coding(8, "row"), Coding(4, "column")
SHAPES = [((96, 10), None), ((37, 13), ROWS), ((13, 37), COLUMNS), ((37,), None), ((5, 300), ROWS), ((64, 64), COLUMNS)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 1024])
def test_every_element_is_sent_once(world_size):
    weights, numel = weights_of(SHAPES)
    padded = numel + -numel % world_size
    size = padded // world_size
    for round_numel in (10**6, 64):
        found = build(weights, padded, world_size, 2, round_numel)
        sent, shared = np.zeros(padded, int), set()
        for messages in found.rounds:
            assert len(messages) == world_size
            for owner, message in enumerate(messages):
                used = np.zeros(message.num_bytes, int)
                for run in message.runs:
                    assert owner * size <= run.start
                    assert run.start + run.numel <= (owner + 1) * size
                    sent[run.start : run.start + run.numel] += 1
                    used[run.absmax_at : run.absmax_at + 2 * run.num_channels] += 1
                    taken = 2 * run.numel if run.kind == "whole" else run.num_bytes
                    used[run.at : run.at + taken] += 1
                    if run.kind == "shared":
                        count = 1 if run.first_column < 0 else run.width
                        shared |= set(range(run.first_channel, run.first_channel + count))
                assert (used == 1).all(), "bytes that nothing or several things lie in"
        assert (sent[:numel] == 1).all()
        assert not sent[numel:].any(), "padding was sent"
        assert shared == set(range(found.num_shared))
        assert world_size > 1 or not shared


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_of_large_weights(bits):
    """A byte or half of one an element, and two bytes a row of 1024: of an ideal gather in bf16 0.501 and 0.251."""
    weights, numel = weights_of([((1024, 1024), Coding(bits, "row"))] * 12)
    found = build(weights, numel, 4, 2)
    assert found.num_shared == 0
    for rank in range(4):
        assert found.sent_bytes(rank) == 3 * numel // 4 * bits // 8 + 3 * 2 * 3 * 1024


def test_bytes_between_nodes():
    """A message for each other node, not for each other rank, and its share of the rows in several partitions."""
    weights, numel = weights_of(SHAPES)
    found = build(weights, numel + -numel % 4, 4, 2)
    assert found.num_shared % 2, "nothing to round up"
    for rank in range(4):
        (message,) = (messages[rank].num_bytes for messages in found.rounds)
        assert found.sent_bytes(rank) == 3 * message + 2 * 4 * found.num_shared * 3 // 4
        assert found.sent_bytes(rank, 2) == message + 2 * 4 * ((found.num_shared + 1) // 2) // 2


def test_what_cannot_be_laid_out_is_refused():
    weights, numel = weights_of(SHAPES)
    with pytest.raises(ValueError, match="allowed: multiples"):
        build(weights, numel + 1, numel, 2)
    with pytest.raises(ValueError, match="in the order of the group"):
        build(weights[::-1], numel, 1, 2)
