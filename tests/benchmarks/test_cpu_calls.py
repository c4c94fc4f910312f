"""What two commits are compared by: all calls do what they are named after."""

import torch

from benchmarks import cpu_calls


def test_all_calls_are_measured():
    calls = {**cpu_calls.layers(), **cpu_calls.steps(), **cpu_calls.messages()}
    assert len(calls) == 2 * (8 + 1) + 2 * 2 + 4 * 3
    small = {name: call for name, call in calls.items() if "16 → 16" in name or "148" in name}
    assert len(small) == 8 + 2 + 3
    seconds = cpu_calls.measure(small)
    assert list(seconds) == list(small)
    assert all(0 < each < 1 for each in seconds.values())


def test_a_layer_goes_forward_and_backward():
    module = torch.nn.Linear(5, 5)
    cpu_calls._layer(module, 3, 5, torch.float32)()
    assert module.weight.grad.any()


def test_messages_have_residuals_where_they_are_named():
    for name, (*_, has_feedback, _) in cpu_calls._MESSAGES.items():
        assert has_feedback == ("stochastic, error feedback" in name)
