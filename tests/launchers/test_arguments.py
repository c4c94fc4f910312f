from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pretraining import arguments
from pretraining.deepspeed_json import DeepSpeedJson, fill_gaps
from survival import batches
from survival.errors import LaunchError

from ds_quant import ConfigError
from ds_quant.base import manifest

DS = "--deepspeed"


@pytest.fixture
def plain_json(tmp_path: Path) -> Path:
    """A DeepSpeed JSON without quantization."""
    path = tmp_path / "plain.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    return path


def parse(*argv: str, world_size: int = 1) -> arguments.Arguments:
    return arguments.parse(list(argv), world_size=world_size)[0]


def test_the_preset_fills_only_what_the_user_left_open(plain_json: Path) -> None:
    args = parse(DS, str(plain_json), "--learning_rate", "0.5", "--max_steps=7")
    assert args.model.preset == "tiny"
    assert (args.training["learning_rate"], args.training["max_steps"]) == (0.5, 7)
    assert args.training["output_dir"] == "runs/tiny"
    assert args.data.dataset_name == "python-source"
    # Its own default value, given by the user, still beats the preset.
    assert parse(DS, str(plain_json), "--adam_beta2", "0.999").training["adam_beta2"] == 0.999
    assert args.training["adam_beta2"] == 0.95


def test_the_paper_recipe(plain_json: Path) -> None:
    args = parse(DS, str(plain_json), "--preset", "paper", world_size=4)
    training = args.training
    assert training["max_steps"] == 300_000
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * 4 == 512
    expected = {
        "learning_rate": 6e-4,
        "warmup_steps": 1000,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "bf16": "auto",
    }
    assert {key: training[key] for key in expected} == expected
    assert (args.data.dataset_name, args.model.tokenizer_name) == ("Skylion007/openwebtext", "gpt2")
    assert args.data.context_length == 1024


def test_the_dtype_follows_the_device_unless_someone_decided(plain_json: Path, tmp_path: Path) -> None:
    def chosen(*argv: str, config: object = plain_json, fast: bool = True, saved: bool | None = None) -> object:
        args = parse(DS, str(config), *argv)
        checkpoint = None if saved is None else tmp_path / f"checkpoint-{int(saved)}"
        if checkpoint is not None:
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / manifest.NAME).write_text(json.dumps({"format": manifest.FORMAT, "files": [], "bf16": saved}))
        line = args.choose_dtype(checkpoint, is_bf16_fast=fast, device="CPU")
        return args.training.get("bf16", False), line and line.split(":")[0].split(",")[0]

    assert chosen() == (True, "Training in bf16")
    assert chosen(fast=False) == (False, "Training in fp32")
    assert chosen(fast=False, saved=True) == (True, "Training in bf16")
    assert chosen(saved=False) == (False, "Training in fp32")
    for decided in (True, False):
        assert chosen("--bf16", str(decided), fast=not decided) == (decided, None)
        fixed = json.dumps({"bf16": {"enabled": decided}})
        assert chosen(config=fixed, fast=not decided) == (decided, None)
    assert chosen("--fp16", "true") == (False, None)
    own = ("--config_name", "some/model", "--train_file", "a.txt")
    assert chosen(*own, config='{"bf16": {"enabled": "auto"}}') == (True, "Training in bf16")
    assert chosen(*own, config="{}") == (False, None)


def test_files_replace_the_data_of_a_preset_and_a_model_its_tokenizer(plain_json: Path) -> None:
    args = parse(DS, str(plain_json), "--preset", "paper", "--train_file", "a.txt", "b.txt", "--block_size", "64")
    assert (args.data.train_file, args.data.dataset_name) == (["a.txt", "b.txt"], None)
    assert args.data.context_length == 64
    args = parse(DS, str(plain_json), "--preset", "paper", "--model_name_or_path", "some/model")
    assert args.model.tokenizer_name is None


def test_a_model_without_a_preset_takes_none(plain_json: Path) -> None:
    args = parse(DS, str(plain_json), "--config_name", "some/model", "--train_file", "a.txt")
    assert args.model.preset is None
    with pytest.raises(LaunchError, match="no text to train on"):
        parse(DS, str(plain_json), "--config_name", "some/model")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rat", "1"], "the unknown flag --learning_rat; .*did you mean --learning_rate"),
        (["--preset", "papr"], "did you mean 'paper'"),
        (["--max_steps", "many"], "--max_steps.*many"),
        (["--global_batch_size", "3", "--per_device_train_batch_size", "2"], "does not make"),
        (["--validation_fraction", "1.5"], "between 0 and 1"),
        (["--model_name_or_path", "a", "--config_name", "b", "--train_file", "c.txt"], "one of them"),
        (["--train_file", "a.txt", "--streaming"], "--streaming: got no --dataset_name"),
        (["--context_length", "1"], "--context_length: got 1; allowed: 2 tokens or more"),
        (["--max_loss_rise", "0"], "--max_loss_rise: got 0.0; allowed: above 0"),
        (["--auto_find_batch_size", "true"], "would change the global batch"),
        (["--enable_jit_checkpoint", "true"], "would take SIGTERM away"),
        (["--save_on_each_node", "true"], "would have all nodes write the same files"),
        (["stray"], "'stray', which belongs to no flag"),
    ],
)
def test_bad_flags_are_named(plain_json: Path, argv: list[str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        parse(DS, str(plain_json), *argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--deepspeed", "X"],
        ["--deepspeed=X"],
        ["--deepspeed", "--deepspeed_config", "X"],
        ["--deepspeed_config", "X", "--deepspeed"],
        ["--deepspeed_config=X"],
        ["--deepspeed", "X", "--deepspeed_config", "X"],
    ],
)
def test_both_ways_to_name_the_json(argv: list[str]) -> None:
    assert arguments.join_deepspeed_flags(["--local_rank=1", *argv, "--bf16"]) == [
        "--local_rank=1",
        "--bf16",
        "--deepspeed",
        "X",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--deepspeed"], "got no path; allowed: the path of a JSON file"),
        (["--deepspeed_config"], "got no path; allowed: the path of a JSON file"),
        (["--deepspeed", "X", "--deepspeed_config", "Y"], "allowed: one DeepSpeed configuration"),
    ],
)
def test_half_given_json_flags(argv: list[str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        arguments.join_deepspeed_flags(argv)


def test_the_launcher_own_local_rank_is_taken(plain_json: Path) -> None:
    assert parse("--local_rank=1", DS, str(plain_json)).training["local_rank"] == 1


@pytest.mark.parametrize(("section", "flag"), [("scheduler", "--lr_scheduler_type"), ("optimizer", "--optim")])
def test_flags_that_the_trainer_would_drop_are_refused(tmp_path: Path, section: str, flag: str) -> None:
    config = tmp_path / "c.json"
    config.write_text(json.dumps({section: {"type": "AdamW", "params": {}}}))
    value = {"--lr_scheduler_type": "linear", "--optim": "adamw_torch"}[flag]
    with pytest.raises(LaunchError, match=f"{flag}: got what would be ignored.*{section}"):
        parse(DS, str(config), flag, value)
    parse(DS, str(config))  # the preset's own scheduler gives way without a word
    config.write_text("{}")
    parse(DS, str(config), flag, value)


def test_no_json_is_refused_unless_accelerate_has_one(monkeypatch: pytest.MonkeyPatch, plain_json: Path) -> None:
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    with pytest.raises(LaunchError, match=r"add --deepspeed ds_configs/w8a8\.json"):
        parse()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(plain_json))
    config = arguments.parse([], world_size=1)[1]
    assert config.from_accelerate
    assert config.content == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), ('{"a": [1, }', "line 1, column"), ("[]", "a JSON object"), ("", "an empty file")],
)
def test_broken_json_says_where(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        DeepSpeedJson.find(str(path))


def test_a_number_in_the_json_beats_the_preset_but_not_in_silence_the_user(tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    config.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 4,
                "optimizer": {"type": "AdamW", "params": {"lr": 0.25, "betas": [0.5, 0.6], "eps": "auto"}},
            }
        )
    )
    training = parse(DS, str(config)).training
    assert (training["learning_rate"], training["adam_beta1"], training["adam_beta2"]) == (0.25, 0.5, 0.6)
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (4, 8)
    args, found = arguments.parse([DS, str(config), "--learning_rate", "0.1", "--use_cpu"], world_size=1)
    with pytest.raises(LaunchError, match=r"differ:\n.*lr=0\.25 vs hf learning_rate=0\.1"):
        args.build_training_arguments(found)


def test_gaps_of_the_json_are_filled() -> None:
    content: dict[str, Any] = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5}
    fill_gaps(content)
    assert content["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert content["gradient_clipping"] == 0.5
    assert content["gradient_accumulation_steps"] == "auto"
    empty: dict[str, Any] = {}
    fill_gaps(empty)
    assert empty["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(
    ("values", "explicit", "world", "size", "steps"),
    [
        ({"global_batch_size": 512, "per_device_train_batch_size": 16}, set(), 4, 16, 8),
        ({"global_batch_size": 32, "per_device_train_batch_size": 32}, set(), 2, 16, 1),
        ({"global_batch_size": 48, "per_device_train_batch_size": 32}, set(), 1, 24, 2),
        ({"global_batch_size": 32, "per_device_train_batch_size": 2}, {"per_device_train_batch_size"}, 2, 2, 8),
        (
            {"global_batch_size": 32, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 4},
            {"gradient_accumulation_steps"},
            2,
            4,
            4,
        ),
        (
            {"global_batch_size": 32, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 5},
            {"per_device_train_batch_size", "gradient_accumulation_steps"},
            2,
            3,
            5,
        ),
    ],
)
def test_how_the_global_batch_is_cut(
    values: dict[str, Any], explicit: set[str], world: int, size: int, steps: int
) -> None:
    batches.resolve(values, explicit=frozenset(explicit), world_size=world)
    assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == (size, steps)


def test_a_global_batch_that_the_processes_cannot_share() -> None:
    with pytest.raises(LaunchError, match="cannot be divided among 3 processes"):
        batches.resolve({"global_batch_size": 512}, explicit=frozenset(), world_size=3)
