import pytest

from ds_quant.base.patterns import check_patterns, matches
from ds_quant.config import ConfigError

NAMES = [
    "model.embed.weight",
    "model.layers.0.norm.weight",
    "model.layers.0.norm.bias",
    "lm_head.weight",
    "h.0.attention.weight",
]


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("model.layers.0.norm.weight", ["*norm*"], True),
        ("model.layers.0.norm.weight", ["model.*.weight"], True),
        ("model.layers.0.norm.weight", ["norm"], False),
        ("model.layers.0.norm.weight", ["nothing", "*.weight"], True),
        ("model.layers.0.norm.weight", ["*.Weight"], False),
        ("layers.1", ["layers.[01]"], True),
        ("layers.1", ["layers.?"], True),
        ("layers.10", ["layers.?"], False),
        ("anything", [], False),
        ("", ["*"], True),
    ],
)
def test_matches(name, patterns, expected):
    assert matches(name, patterns) is expected
    assert matches(name, iter(patterns)) is expected


def test_patterns_that_match_pass():
    check_patterns("place", "parameter", ["*", "lm_head.*", "*.bias"], NAMES)
    check_patterns("place", "parameter", [], [])


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("norm", r" \(the nearest name is 'model.layers.0.norm.weight'; '\*' crosses dots\)"),
        ("lm_head", r" \(the nearest name is 'lm_head.weight'; '\*' crosses dots\)"),
        ("embed.weight", r" \(the nearest name is 'model.embed.weight'; '\*' crosses dots\)"),
        ("lm_haed.wieght", r" \(the nearest name is 'lm_head.weight'; '\*' crosses dots\)"),
        ("h", r" \(the nearest name is 'h.0.attention.weight'; '\*' crosses dots\)"),
        ("@@@@", ""),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(pattern, hint):
    expected = (
        f"^place: got the pattern '{pattern}', which matches no trainable parameter of this model; "
        f"allowed: shell patterns on full parameter names{hint}; fix: correct the pattern or remove it$"
    )
    with pytest.raises(ConfigError, match=expected):
        check_patterns("place", "trainable parameter", ["*.bias", pattern], NAMES)
