"""The schema of the section, its round trip, its page of the documentation, and what importing it takes."""

import json
import runpy
import subprocess
import sys

from config_files import load
from hypothesis import assume, given
from hypothesis import strategies as st

from ds_quant import config as config_module
from ds_quant.base.number_formats import FORMATS
from ds_quant.config import ConfigError, QuantConfig, json_schema
from ds_quant.config.section import Section


def test_the_schema_lists_every_key_with_its_meaning():
    schema = json_schema()
    models = {
        name: model
        for name, model in vars(config_module).items()
        if isinstance(model, type) and issubclass(model, Section) and "Config" in name
    }
    assert schema["$defs"].keys() | {"QuantConfig"} == models.keys()
    for name, model in models.items():
        node = schema if name == "QuantConfig" else schema["$defs"][name]
        assert node["additionalProperties"] is False
        assert node["properties"].keys() == model.model_fields.keys()
        for key, field in node["properties"].items():
            assert field.get("description"), f"{name}.{key}"
    assert (
        schema["$defs"]["WeightConfig"]["properties"]["bits"] | {"minimum": 2, "maximum": 8}
        == (schema["$defs"]["WeightConfig"]["properties"]["bits"])
    )


def optional(required, **keys):
    return st.fixed_dictionaries(required, optional=keys)


def operand(*granularities, **keys):
    return integers(*granularities, **keys) | optional({"format": st.sampled_from(list(FORMATS))}, **keys)


def integers(*granularities, **keys):
    plain = optional(
        {"bits": st.integers(2, 8)},
        granularity=st.sampled_from([g for g in granularities if g != "block"]),
        symmetric=st.booleans(),
        rounding=st.sampled_from(["nearest", "stochastic"]),
        **keys,
    )
    if "block" not in granularities:
        return plain
    sizes = st.sampled_from([16, 128, 4096])
    blocked = optional({"bits": st.integers(2, 8), "granularity": st.just("block")}, block_size=sizes)
    return plain | blocked


patterns = st.lists(st.sampled_from(["*", "lm_head", "model.layers.*"]), min_size=1)


def moments(*roundings):
    blocked = optional(
        {"bits": st.sampled_from([4, 8])},
        map=st.sampled_from(["power", "linear", "dynamic"]),
        block_size=st.sampled_from([32, 64, 4096]),
        rounding=st.sampled_from(roundings),
    )
    blocked |= optional({"bits": st.just(8)}, map=st.just("float"), block_size=st.sampled_from([32, 64, 4096]))
    return blocked | optional(
        {
            "bits": st.sampled_from([4, 8]),
            "map": st.just("linear"),
            "granularity": st.sampled_from(["tensor", "channel"]),
        },
        rounding=st.sampled_from(["nearest", "stochastic", None]),
    )


sections = optional(
    {
        "linear": optional(
            {"weight": operand("tensor", "channel", "block")},
            activation=operand("tensor", "token", "channel", "block"),
            gradient=operand(
                "tensor",
                "token",
                "channel",
                "outer",
                used_for=st.sampled_from([["weight"], ["input"], ["weight", "input"]]),
            ),
            backward_operands=st.sampled_from(["quantized", "original"]),
            include=patterns,
            exclude=patterns | st.just([]) | st.none(),
        )
    },
    enabled=st.just(True),
    optimizer=optional(
        {"exp_avg": moments("stochastic", None)},
        exp_avg_sq=moments("nearest", "stochastic", None),
        exclude=patterns | st.just([]),
    ),
    communication=st.fixed_dictionaries(
        {
            "gradient": optional(
                {"bits": st.sampled_from([4, 8])},
                block_size=st.sampled_from([32, 256]),
                error_feedback=st.booleans(),
                rotation=st.sampled_from(["none", "hadamard"]),
                hierarchical=st.booleans() | st.integers(2, 16),
            )
            | optional({"format": st.sampled_from(["fp4_e2m1", "mxfp4", "nvfp4", "nvint4"])}, rotation=st.just("none"))
        }
    ),
)


@given(sections)
def test_what_is_dumped_loads_to_the_same(section):
    try:
        quant = load(section)
    except ConfigError as error:
        assume("cannot fold" not in str(error))  # the one rule that the strategy does not know
        raise
    for options in ({}, {"mode": "json"}, {"mode": "json", "exclude_unset": True}, {"exclude_defaults": True}):
        dumped = quant.model_dump(**options)
        assert load(dumped) == quant
        if options.get("mode") == "json":
            assert load(json.loads(json.dumps(dumped))) == quant


any_json = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["linear", "weight", "bits", "gradient", "exp_avg", "used_for"]), inner)
    ),
    max_leaves=12,
)


@given(any_json)
def test_any_json_is_accepted_or_refused_in_our_words(section):
    try:
        quant = load(section)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith("ds_quant")
            assert "; allowed: " in line
            assert "; fix: " in line
    else:
        assert isinstance(quant, QuantConfig)


def test_importing_the_config_imports_no_framework():
    code = (
        "import sys, ds_quant.config, ds_quant.config.refusals; "
        "print({'torch', 'deepspeed', 'transformers', 'accelerate'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert run.stdout.strip() == "set()"


def test_the_documentation_has_every_key(root):
    """config-reference.md is what its script writes."""
    script = root / "docs" / "config_reference.py"
    names = runpy.run_path(str(script))
    page = (root / "docs" / "config-reference.md").read_text()
    assert page == names["page"](), "run python docs/config_reference.py"
    for definition in (json_schema(), *json_schema()["$defs"].values()):
        for key in definition["properties"]:
            assert f"| `{key}` |" in page, key
