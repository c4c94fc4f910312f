"""What is owed: kept, committed, rolled back, cut anew, saved, and paid."""

import copy
import itertools
import math

import pytest
import torch
from collectives_definition import simulate

from ds_quant.base.errors import ConfigError
from ds_quant.comm.feedback import ErrorFeedback
from ds_quant.comm.layout import Piece, Span, cut_evenly
from ds_quant.numerics.random import fold_words
from ds_quant.numerics.wire import WireFormat

CPU = torch.device("cpu")
A = Piece("a", 0, 0, 0, 6, 1)
B = Piece("b", 4, 0, 6, 3, 0)


def write(feedback, pieces, *values):
    slots = feedback.slots(pieces, CPU)
    for tensor, value in zip(slots.write, values, strict=True):
        tensor.fill_(value)


def read(feedback, *pieces):
    """What is added next, without claiming anything."""
    return [tensor.tolist() for tensor in copy.deepcopy(feedback).slots(pieces, CPU).read]


def owed(feedback, name, numel):
    """Committed, by element; elements in several segments count as often."""
    total = torch.zeros(numel)
    for key, residual in feedback.state_dict().items():
        its_name, _, offset = key.rpartition("@")
        if its_name == name:
            total[int(offset) : int(offset) + residual.numel()] += residual.float()
    return total


@pytest.mark.parametrize("transactional", [True, False])
def test_nothing_is_owed_at_first(transactional):
    slots = ErrorFeedback(transactional=transactional).slots([A, B], CPU)
    for tensors in (slots.read, slots.write):
        assert [tensor.shape for tensor in tensors] == [(6,), (3,)]
        assert all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in tensors)
    assert not any(tensor.any() for tensor in slots.read)


@pytest.mark.parametrize("transactional", [True, False])
def test_what_a_step_wrote_is_read_in_the_next(transactional):
    feedback = ErrorFeedback(transactional=transactional)
    write(feedback, [A, B], 1.5, -2.0)
    feedback.commit()
    assert read(feedback, B, A) == [[-2.0] * 3, [1.5] * 6]
    write(feedback, [A], 0.25)
    feedback.commit()
    assert read(feedback, A, B) == [[0.25] * 6, [-2.0] * 3], "a parameter that took no part owes what it owed"


def test_a_step_that_is_skipped_counts_for_nothing():
    feedback = ErrorFeedback()
    write(feedback, [A], 1.0)
    feedback.rollback()
    assert read(feedback, A) == [[0.0] * 6]
    write(feedback, [A], 2.0)
    feedback.commit()
    for value in (3.0, 4.0):
        write(feedback, [A], value)
        feedback.rollback()
        assert read(feedback, A) == [[2.0] * 6]
        assert owed(feedback, "a", 6).tolist() == [2.0] * 6
    write(feedback, [A], 5.0)
    assert owed(feedback, "a", 6).tolist() == [2.0] * 6, "not committed yet: not in a checkpoint"
    feedback.commit()
    assert read(feedback, A) == [[5.0] * 6]


def test_micro_steps_of_a_step_pass_on_what_they_owe():
    feedback = ErrorFeedback()
    write(feedback, [A], 1.0)
    feedback.commit()
    write(feedback, [A], 2.0)
    assert read(feedback, A) == [[2.0] * 6]
    write(feedback, [A], 3.0)
    assert read(feedback, A) == [[3.0] * 6]
    feedback.rollback()
    assert read(feedback, A) == [[1.0] * 6], "all micro steps are skipped together"


def test_without_transactions_residuals_count_at_once():
    feedback = ErrorFeedback(transactional=False)
    slots = feedback.slots([A], CPU)
    assert slots.read[0] is slots.write[0], "one tensor an element"
    slots.write[0].fill_(1.0)
    assert read(feedback, A) == [[1.0] * 6]
    assert owed(feedback, "a", 6).tolist() == [1.0] * 6


@pytest.mark.parametrize("transactional", [True, False])
def test_settling_pays_once(transactional):
    feedback = ErrorFeedback(transactional=transactional)
    assert feedback.settle([A, B]) == [None, None]
    assert feedback.num_bytes == 0, "an owner that owes nothing keeps nothing"
    write(feedback, [A], 1.0)
    feedback.commit()
    found = feedback.settle([A, B])
    assert found[0].tolist() == [1.0] * 6
    assert found[1] is None
    feedback.commit()
    assert owed(feedback, "a", 6).tolist() == [0.0] * 6
    assert not any(tensor is not None and tensor.any() for tensor in feedback.settle([A]))


def test_settling_is_undone_with_its_step():
    feedback = ErrorFeedback()
    write(feedback, [A], 1.0)
    feedback.commit()
    feedback.settle([A._replace(offset=2, numel=2)])
    feedback.rollback()
    assert read(feedback, A) == [[1.0] * 6]


@pytest.mark.parametrize("transactional", [True, False])
def test_cutting_anew_loses_and_doubles_nothing(rng, transactional):
    """Random cuts of a parameter, each step another; every element owes what it owed, whoever has it."""
    numel = 200
    feedback = ErrorFeedback(transactional=transactional)
    value = torch.from_numpy(rng.integers(-99, 99, numel)).bfloat16()  # exact

    def cut():
        ends = sorted({0, numel, *rng.integers(1, numel, rng.integers(0, 9)).tolist()})
        pieces = [Piece("w", begin, 0, 0, end - begin, 0) for begin, end in itertools.pairwise(ends)]
        return [pieces[i] for i in rng.permutation(len(pieces))]

    def step(change):
        for piece in cut():
            slots = feedback.slots([piece], CPU)
            at = slice(piece.offset, piece.offset + piece.numel)
            assert torch.equal(slots.read[0], value[at])
            slots.write[0].copy_(value[at] + change)

    for piece in cut():
        feedback.slots([piece], CPU).write[0].copy_(value[piece.offset : piece.offset + piece.numel])
    feedback.commit()
    for number in range(20):
        step(1.0)
        if transactional and number % 3 == 1:
            feedback.rollback()
        else:
            feedback.commit()
            value += 1.0
        assert torch.equal(owed(feedback, "w", numel), value.float())
    expected = {key: tensor.numel() for key, tensor in feedback.state_dict().items()}
    assert sum(expected.values()) == numel, "what was cut anew is gone"


@pytest.mark.parametrize("transactional", [True, False])
def test_a_piece_that_grows_owes_nothing_for_what_is_new(transactional):
    feedback = ErrorFeedback(transactional=transactional)
    write(feedback, [A], 1.0)
    feedback.commit()
    assert read(feedback, A._replace(offset=4, numel=4)) == [[1.0, 1.0, 0.0, 0.0]]
    assert read(feedback, A._replace(name="other")) == [[0.0] * 6]


def test_memory():
    feedback = ErrorFeedback()
    for _ in range(3):
        write(feedback, [A, B], 1.0, 1.0)
        assert feedback.num_bytes == 4 * (6 + 3)
        feedback.commit()
    feedback = ErrorFeedback(transactional=False)
    for _ in range(3):
        write(feedback, [A, B], 1.0, 1.0)
        feedback.commit()
        assert feedback.num_bytes == 2 * (6 + 3)
    feedback.reset()
    assert feedback.num_bytes == 0
    assert feedback.state_dict() == {}
    assert read(feedback, A) == [[0.0] * 6]


@pytest.mark.parametrize("transactional", [True, False])
def test_saved_and_loaded(tmp_path, transactional):
    feedback = ErrorFeedback(transactional=transactional)
    names = [A._replace(name="layer@2.weight"), B, B._replace(offset=7)]
    write(feedback, names, 1.0, 2.0, 3.0)
    feedback.commit()
    state = feedback.state_dict()
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in state.items()} == {
        "layer@2.weight@0": (torch.bfloat16, (6,)),
        "b@4": (torch.bfloat16, (3,)),
        "b@7": (torch.bfloat16, (3,)),
    }
    torch.save(state, tmp_path / "state.pt")
    other = ErrorFeedback(transactional=transactional)
    write(other, [A], 9.0)
    other.load_state_dict(torch.load(tmp_path / "state.pt"), "cpu")
    assert read(other, *names) == [[1.0] * 6, [2.0] * 3, [3.0] * 3]
    assert read(other, A) == [[0.0] * 6], "what it owed before is not its own any more"
    write(other, names, 4.0, 4.0, 4.0)
    assert read(feedback, *names) == [[1.0] * 6, [2.0] * 3, [3.0] * 3], "a copy"


@pytest.mark.parametrize(
    "state",
    [
        {"a": torch.zeros(3, dtype=torch.bfloat16)},
        {"a@x": torch.zeros(3, dtype=torch.bfloat16)},
        {"a@-1": torch.zeros(3, dtype=torch.bfloat16)},
        {"b@0": torch.zeros(3, dtype=torch.bfloat16), "a@0": torch.zeros(3)},
        {"a@0": torch.zeros(3, 1, dtype=torch.bfloat16)},
    ],
)
def test_what_is_no_state_is_refused(state):
    feedback = ErrorFeedback()
    write(feedback, [A], 1.0)
    feedback.commit()
    with pytest.raises(ConfigError, match=r"error feedback: got \W?a.*; allowed: name@offset: bf16"):
        feedback.load_state_dict(state)
    assert read(feedback, A) == [[1.0] * 6], "as it was"


LEVELS = {8: 127, 4: 7}
STEPS = 48


@pytest.mark.parametrize(
    ("bits", "rotation", "transactional"),
    [(8, "none", True), (4, "none", False), (8, "hadamard", False), (4, "hadamard", True)],
)
def test_the_sum_of_what_was_sent_follows_the_sum_of_the_gradients(bits, transactional, rotation):
    """Two ranks, the same gradient in every step: rounding to nearest makes the same error each time, and only what is
    owed makes up for it. Pieces change halfway, as DDP's buckets do, and with them the owners."""
    fmt = WireFormat(bits, 32, rotation)
    numel, world_size, loss_scale = 150, 2, 4.0
    generator = torch.Generator().manual_seed(bits)
    gradients = [torch.randn(numel, generator=generator) for _ in range(world_size)]
    exact = sum(gradient.double() for gradient in gradients) / world_size

    def run(feedbacks):
        total = torch.zeros(numel, dtype=torch.float64)
        for step in range(STEPS):
            parameters = [(0, 90), (90, 60)] if step < STEPS // 2 else [(90, 60), (0, 90)]
            starts = [0, parameters[0][1]]
            spans = [
                Span(f"p{at}", 0, 0, start, length) for (at, length), start in zip(parameters, starts, strict=True)
            ]
            shares = [
                [torch.cat([gradient[at : at + length] for at, length in parameters]) * loss_scale]
                for gradient in gradients
            ]
            pieces = cut_evenly(spans, fmt, world_size)
            results = simulate(
                shares, pieces, fmt, factor=1 / world_size, feedbacks=feedbacks, residual_scale=loss_scale
            )
            assert torch.equal(results[0][0], results[1][0])
            for (at, length), start in zip(parameters, starts, strict=True):
                total[at : at + length] += results[0][0][start : start + length].double() / loss_scale
            for feedback in feedbacks or []:
                feedback.commit()
        return float((total - STEPS * exact).abs().max())

    # Steps of the codes: of a share, and of the result. With what is owed on top (half a step each, rotated back by at
    # most sqrt(block)), and a rotation that makes values sqrt(block) times as large, the largest value is at most
    # twice (8 bits) what it was; 4 bits have coarser steps. One quantization step is taken from these amplitudes.
    spread = math.sqrt(fmt.block_size) if rotation == "hadamard" else 1.0
    largest = max(float(gradient.abs().max()) for gradient in gradients) * spread
    step = largest * (1 + spread / LEVELS[bits]) / LEVELS[bits]
    # Owed in the end: half a step of the sender's, divided by the ranks, and half of the result's. Each step rounds
    # what is owed to bf16, an error of at most 2^-9 of it.
    bound = (step / 2 / world_size + step / 2) * spread * (1 + STEPS * 2**-9)
    with_feedback = run([ErrorFeedback(transactional=transactional) for _ in range(world_size)])
    without = run(None)
    assert with_feedback <= bound
    assert without > 8 * with_feedback, "rounding errors alone would have averaged out: the test shows nothing"


def test_both_residuals_count():
    """The sender's and, for an all-reduce, the owner's: leave out one, and the sum drifts."""
    fmt, world_size, numel = WireFormat(4, 32), 2, 64
    shares = [[torch.linspace(-1, 1, numel) + rank] for rank in range(world_size)]
    pieces = cut_evenly([Span("w", 0, 0, 0, numel)], fmt, world_size)
    feedbacks = [ErrorFeedback(transactional=False) for _ in range(world_size)]
    simulate(shares, pieces, fmt, feedbacks=feedbacks)
    for rank, feedback in enumerate(feedbacks):
        state = feedback.state_dict()
        assert set(state) == {"w@0", "w@32"}
        assert all(residual.any() for residual in state.values()), rank


def test_stochastic_rounding_is_owed_too():
    fmt, world_size, numel = WireFormat(4, 32), 2, 64
    shares = [[torch.linspace(-1, 1, numel) + rank] for rank in range(world_size)]
    exact = sum(share[0].double() for share in shares)
    pieces = cut_evenly([Span("w", 0, 0, 0, numel)], fmt, world_size)
    feedbacks = [ErrorFeedback(transactional=False) for _ in range(world_size)]
    total = torch.zeros(numel, dtype=torch.float64)
    for step in range(STEPS):
        keys = [fold_words(0, step, 0, rank + 1) for rank in range(world_size)]
        total += simulate(shares, pieces, fmt, keys=keys, feedbacks=feedbacks)[0][0]
    # A stochastic step is a whole one, of values that are at most a step larger for what is owed: shares reach 2,
    # results 3.
    step = (2 + 3) / 7 * (1 + 2 / 7)
    assert float((total - STEPS * exact).abs().max()) <= step * (1 + STEPS * 2**-9)


@pytest.mark.parametrize("transactional", [True, False])
def test_the_pieces_of_a_layout_owe_what_they_owe_one_by_one(transactional):
    """A layout's pieces, a tuple, are looked up once; lists are looked up in every call."""
    cuts = [
        (A, B),
        (B._replace(numel=2), B._replace(offset=6, numel=1), A),
        tuple(cut_evenly([Span("a", 0, 0, 0, 6), Span("b", 4, 0, 6, 3)], WireFormat(8, 32), 2)),
    ]
    assert len({(*map(repr, pieces),) for pieces in cuts}) == 3
    by_layout, by_piece = (ErrorFeedback(transactional=transactional) for _ in range(2))
    # As many writes as commits: a cut that is gone comes back, and so does one that a step has used in part.
    draws = torch.randint(1000, (200,)).tolist()
    actions = ["write"] * 6 + ["commit"] * 6 + ["rollback"] * 2 + ["save", "load", "reset"]
    saved = by_piece.state_dict()
    for number, draw in enumerate(draws):
        action = actions[draw % len(actions)]
        if action == "write":
            pieces = cuts[draw % 3]
            values = [float(number + index) for index in range(len(pieces))]
            for feedback, given in ((by_layout, pieces), (by_piece, [*pieces])):
                write(feedback, given, *values)
        elif action == "save":
            saved = copy.deepcopy(by_piece.state_dict())
        elif action == "load":
            for feedback in (by_layout, by_piece):
                feedback.load_state_dict(saved)
        elif action != "rollback" or transactional:
            for feedback in (by_layout, by_piece):
                getattr(feedback, action)()
        context = f"draws {draws}, after number {number}, {action}"
        for pieces in cuts:
            assert read(by_layout, *pieces) == read(by_piece, *pieces), context
        left, right = by_layout.state_dict(), by_piece.state_dict()
        assert list(left) == list(right), context
        assert all(torch.equal(left[name], right[name]) for name in right), context
