"""A DeepSpeed JSON as a path, a dict or base64, and broken ones."""

import base64
import json
import os

import pytest
from config_files import W8, write

from ds_quant.config import ConfigError, QuantConfig, read_deepspeed_config


def test_sources(tmp_path):
    config = {"train_batch_size": 4, "ds_quant": {"linear": W8}}
    path = write(tmp_path / "ds.json", json.dumps(config))
    encoded = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    for source in (config, path, str(path), encoded):
        assert read_deepspeed_config(source) == config
        assert QuantConfig.load(source).linear.weight.bits == 8


def test_base64_is_url_safe():
    config = {"x": "??>>~~ÿÿ", "y": "~~~???"}
    encoded = base64.urlsafe_b64encode(json.dumps(config, ensure_ascii=False).encode()).decode()
    assert {"-", "_"} & set(encoded)
    assert read_deepspeed_config(encoded) == config


def test_a_dict_is_copied():
    config = {"zero_optimization": {"stage": 1}}
    read_deepspeed_config(config)["zero_optimization"]["stage"] = 2
    assert config == {"zero_optimization": {"stage": 1}}


def test_comments_as_in_deepspeed(tmp_path):
    text = '{\n  # a comment\n  "train_batch_size": 4, // another\n  /* and one more */ "steps_per_print": 10,\n}\n'
    assert read_deepspeed_config(write(tmp_path / "ds.json", text)) == {"train_batch_size": 4, "steps_per_print": 10}


def failure(source) -> str:
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_config(source)
    assert "fix: " in str(caught.value)
    return str(caught.value)


def test_broken_files_are_named_with_the_fix(tmp_path):
    broken = write(tmp_path / "broken.json", '{\n  "train_batch_size": 4,\n  "optimizer": {"type": "AdamW"\n')
    message = failure(broken)
    assert f"{broken}: broken JSON at line " in message
    assert ", column " in message
    no_colon = write(tmp_path / "colon.json", '{\n  "a": 1,\n  "b" 2\n}\n')
    assert "broken JSON at line 3, column 7 (" in failure(no_colon)
    unclosed = write(tmp_path / "unclosed.json", '{\n  "a: 1\n}\n')
    assert "%r" not in failure(unclosed)
    for text in ("", " \n"):
        assert "got an empty file" in failure(write(tmp_path / "empty.json", text))
    assert 'list.json: got ["ds_quant"]; allowed: a JSON object' in failure(
        write(tmp_path / "list.json", '["ds_quant"]')
    )
    assert "cannot be read" in failure(tmp_path)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read as text" in failure(binary)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path):
    path = write(tmp_path / "secret.json", "{}")
    path.chmod(0)
    assert "cannot be read" in failure(path)


@pytest.mark.parametrize(
    "name", ["nothere.json", "configs/w8a8.json", "abcd", "ds_quant", "dsconfig", "e30", "aGVsbG8g"]
)
def test_a_missing_file_is_called_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = failure(name)
    assert message.startswith(f"{name}: got no such file")
    assert str(tmp_path) in message
    assert failure(tmp_path / name).startswith(f"{tmp_path / name}: got no such file")


def test_broken_base64_text_says_where():
    encoded = base64.urlsafe_b64encode(b'{"a": [1, 2}').decode()
    assert "base64 config: broken JSON at line 1, column " in failure(encoded)


@pytest.mark.parametrize("source", [None, 3, ["a"]])
def test_other_sources_are_refused(source):
    assert "allowed: a path, a dict or base64" in failure(source)


def test_a_key_twice_is_an_error_at_any_depth(tmp_path):
    text = '{"ds_quant": {"linear": {"weight": {"bits": 8}, "weight": {"bits": 4}}}}'
    message = failure(write(tmp_path / "twice.json", text))
    assert "got weight twice" in message
    assert "twice.json" in message
    assert "got weight twice" in failure(base64.urlsafe_b64encode(text.encode()).decode())
