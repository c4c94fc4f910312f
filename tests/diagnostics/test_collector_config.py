"""The JSON's `diagnostics`: what is refused, and what a section has the components for."""

import pytest

from ds_quant.config import ConfigError, QuantConfig
from ds_quant.config.refusals import REFUSALS, check_refusals
from ds_quant.diagnostics.choice import TRAINING_KINDS, choose, make_recorders
from ds_quant.diagnostics.measurement import KINDS

W8, A8, G8 = {"weight": {"bits": 8}}, {"activation": {"bits": 8}}, {"gradient": {"bits": 8}}
ALWAYS = {"outliers", "gradient_norms", "moments"}


def chosen(diagnostics, **section):
    quant = QuantConfig.parse({**section, "diagnostics": {"every": 5, **diagnostics}})
    return choose(quant.diagnostics, quant)


@pytest.mark.parametrize(
    ("diagnostics", "where", "got", "fix"),
    [
        ({}, "ds_quant.diagnostics.every", "nothing", "add it"),
        ({"every": 0}, "ds_quant.diagnostics.every", "0", "write what is allowed"),
        ({"every": True}, "ds_quant.diagnostics.every", "true", "1 or more"),
        ({"every": 1.5}, "ds_quant.diagnostics.every", "1.5", "1 or more"),
        ({"every": "auto"}, "ds_quant.diagnostics.every", '"auto"', "write it out"),
        ({"evry": 5, "every": 5}, "ds_quant.diagnostics.evry", "5", 'did you mean "every"?'),
        ({"every": 5, "kinds": []}, "ds_quant.diagnostics.kinds", "[]", "remove the key"),
        ({"every": 5, "kinds": "outliers"}, "ds_quant.diagnostics.kinds", '"outliers"', "a list of"),
        (
            {"every": 5, "kinds": ["outliers", "outliers"]},
            "ds_quant.diagnostics.kinds",
            "outliers",
            "list each kind once",
        ),
        ({"every": 5, "kinds": ["sharpnes"]}, "ds_quant.diagnostics.kinds[0]", '"sharpnes"', '"oscillation"'),
        (
            {"every": 5, "kinds": ["sharpness"]},
            "ds_quant.diagnostics.kinds",
            "sharpness",
            "ds_quant diagnose sharpness CHECK",
        ),
        (
            {"every": 5, "kinds": ["landscape"]},
            "ds_quant.diagnostics.kinds",
            "landscape",
            "ds_quant diagnose landscape",
        ),
        ({"every": 5, "output_dir": " "}, "ds_quant.diagnostics.output_dir", '" "', "a path"),
        ({"every": 5, "report": "yes"}, "ds_quant.diagnostics.report", '"yes"', "true or false"),
        ({"every": 5, "gradient": {"bits": 9}}, "ds_quant.diagnostics.gradient.bits", "9", "2 to 8"),
        ({"every": 5, "exp_avg_sq": {"bits": 6}}, "ds_quant.diagnostics.exp_avg_sq.bits", "6", "4 or 8"),
    ],
)
def test_what_is_refused(diagnostics, where, got, fix):
    with pytest.raises(ConfigError) as raised:
        QuantConfig.load({"ds_quant": {"diagnostics": diagnostics}})
    assert str(raised.value).startswith(f"{where}: got ")
    assert got in str(raised.value)
    assert fix in str(raised.value)


def test_a_section_of_diagnostics_alone_is_enough():
    quant = QuantConfig.parse({"diagnostics": {"every": 7}})
    assert quant.enabled
    assert (quant.diagnostics.every, quant.diagnostics.output_dir, quant.diagnostics.report) == (7, "diagnostics", True)
    assert QuantConfig.parse(quant.model_dump()) == quant


@pytest.mark.parametrize(
    ("section", "more"),
    [
        ({}, set()),
        ({"linear": W8}, {"quantization_error", "oscillation"}),
        ({"linear": {"weight": {"format": "mxint8"}}}, {"quantization_error", "oscillation"}),
        ({"linear": {"weight": {"format": "mxfp8"}}}, {"quantization_error"}),
        ({"linear": {**W8, **A8, "rotation": {}}}, {"quantization_error", "gradient_error"}),
        ({"linear": A8}, {"quantization_error", "gradient_error"}),
        ({"linear": {**A8, "backward_operands": "original"}}, {"quantization_error"}),
        ({"linear": G8}, {"gradient_error"}),
        ({"linear": {**W8, **A8, **G8, "forward_full_precision_from": 9}}, set()),
        ({"linear": {"gradient": {"bits": 8, "used_for": ["input"]}}}, set()),
        ({"communication": {"gradient": {"bits": 8}}}, {"gradient_error"}),
        ({"linear": W8 | A8, "communication": {"weight": {"mode": "codes"}}}, {"gradient_error"}),
        ({"optimizer": {"exp_avg": {"bits": 8}}}, set()),
        ({"linear": {**W8, **A8, **G8}}, {"quantization_error", "oscillation", "gradient_error"}),
    ],
)
def test_without_names_it_is_what_there_are_components_for(section, more):
    choice = chosen({}, **section)
    assert set(choice.kinds) == ALWAYS | more
    assert {line.partition(":")[0] for line in choice.left_out} == set(TRAINING_KINDS) - ALWAYS - more
    assert [recorder.kind for recorder in make_recorders(choice)] == [
        kind for kind in TRAINING_KINDS if kind in choice.kinds
    ]


@pytest.mark.parametrize("kind", sorted(set(TRAINING_KINDS) - ALWAYS))
def test_a_kind_by_name_without_its_component_is_refused(kind):
    with pytest.raises(ConfigError, match=f'^ds_quant.diagnostics.kinds: got "{kind}"; .* fix: take it out, or '):
        chosen({"kinds": ["outliers", kind]})


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        ({"weight": {"format": "nvfp4"}}, "weights in nvfp4, whose .* or use bits, mxint8 or nvint4"),
        (
            {**W8, **A8, "rotation": {}},
            r'rotation of the output, .* or leave "output" out of linear\.rotation\.used_for',
        ),
    ],
)
def test_oscillation_of_weights_that_have_no_thresholds_of_their_own_is_refused(linear, message):
    with pytest.raises(ConfigError, match=f'^ds_quant.diagnostics.kinds: got "oscillation"; .*{message}'):
        chosen({"kinds": ["oscillation"]}, linear=linear)


def test_a_kind_by_name_is_all_there_is():
    choice = chosen({"kinds": ["outliers"]}, linear={**W8, **A8, **G8})
    assert (choice.kinds, choice.left_out) == (("outliers",), ())


def test_gradients_of_a_full_precision_run_are_measured_with_a_quantizer_by_name():
    choice = chosen({"kinds": ["gradient_error"], "gradient": {"bits": 4}})
    (recorder,) = make_recorders(choice)
    assert (recorder.gradient.bits, recorder.wire) == (4, None)


@pytest.mark.parametrize(
    ("diagnostics", "section", "expected"),
    [
        ({}, {}, [(8, "float"), (4, "power"), (8, "linear")]),
        ({}, {"optimizer": {"exp_avg_sq": {"bits": 4}}}, [(4, "power")]),
        ({"exp_avg_sq": {"bits": 8, "map": "linear"}}, {"optimizer": {"exp_avg_sq": {"bits": 4}}}, [(8, "linear")]),
    ],
)
def test_moments_are_measured_as_stored_as_named_or_as_they_might_be(diagnostics, section, expected):
    assert [(item.bits, item.map) for item in chosen(diagnostics, **section).moments] == expected


def test_training_kinds_are_all_but_those_that_move_weights():
    assert set(KINDS) - set(TRAINING_KINDS) == {"sharpness", "landscape"}


def test_what_the_engine_does_not_do_with_hooks_is_refused():
    quant = QuantConfig.parse({"diagnostics": {"every": 5}})
    with pytest.raises(ConfigError, match=r"compile.deepcompile: got true; .*ds_quant.diagnostics"):
        check_refusals({"compile": {"deepcompile": True}}, quant)
    assert any("diagnostics" in row.parts for row in REFUSALS)


@pytest.mark.parametrize("kind", ["quantization_error", "oscillation"])
def test_weights_in_few_bits_are_not_looked_at(kind):
    with pytest.raises(ConfigError, match=r"communication\.weight, after which .* or remove communication\.weight"):
        chosen({"kinds": [kind]}, linear=W8, communication={"weight": {"mode": "codes"}})
