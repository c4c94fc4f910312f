"""What no longer has a gradient goes at most twice as far as with exact states (docs/moments.md)."""

import pytest
from convergence.moment_endings import VICTIMS, dying_rows
from convergence.optimizer_endings import FORMATS, MIX_FORMATS, OPTIMIZERS, TURNED, turned, ways


@pytest.mark.parametrize("case", VICTIMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_gradients_come_to_rest(name, case):
    found = ways(name, case, MIX_FORMATS if name == "AdEMAMix" else FORMATS)
    exact, _ = found.pop("exact")
    assert {key: way for key, (way, _) in found.items() if way > 2 * exact} == {}


def test_sgd_rounded_to_nearest_does_not_come_to_rest():
    """Why it is refused per block."""
    found = ways("SGD", dying_rows, {"4": FORMATS["4"]}, nearest=True)
    assert found["4"][0] > 4 * found["exact"][0]


def test_lion_turns_when_the_gradient_does():
    """Rounded to nearest, a moment keeps its sign for ever against gradients of a thousandth of its block's largest."""
    formats = {"8": FORMATS["8"], "4": FORMATS["4"]}
    found = ways("Lion", turned, formats, after=TURNED)
    nearest = ways("Lion", turned, {"4": FORMATS["4"]}, after=TURNED, nearest=True)
    # The exact moment goes on for some 917 steps, and then back.
    assert found["exact"][1] > -1000
    for key in formats:
        assert found[key][1] > found["exact"][1] - 100
    assert nearest["4"][1] == pytest.approx(-TURNED, rel=1e-3)
