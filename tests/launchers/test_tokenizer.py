from __future__ import annotations

import importlib
import random
import sys
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from corpora import tokenizer
from survival.errors import LaunchError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
TRAINING = [(LIBRARY / name).read_text() for name in ("argparse.py", "ast.py", "dataclasses.py", "typing.py")]
OTHERS = [(LIBRARY / name).read_text() for name in ("textwrap.py", "string.py", "heapq.py", "this.py")]
HARD = [
    "\tif x:\n\t\treturn  1  \n\n\n",
    "    \n  leading and trailing  ",
    "\n",
    " ",
    "",
    "naïve 漢字 \U0001f389 \x00\x07 \r\n",
    "</s> <pad> <unk> are text",
]


@pytest.fixture(scope="module")
def processors() -> tuple[PreTrainedTokenizerFast, sentencepiece.SentencePieceProcessor]:
    kept: list[sentencepiece.SentencePieceProcessor] = []
    original = tokenizer.wrap

    def keep(processor: sentencepiece.SentencePieceProcessor) -> PreTrainedTokenizerFast:
        kept.append(processor)
        return original(processor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "wrap", keep)
        trained = tokenizer.train(TRAINING, vocab_size=1000)
    return trained, kept[0]


@pytest.mark.parametrize("text", [*HARD, *OTHERS], ids=lambda text: repr(text[:12]))
def test_round_trip_and_the_ids_of_sentencepiece(
    processors: tuple[PreTrainedTokenizerFast, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    ours, theirs = processors
    ids = ours(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == text
    assert ids == theirs.encode(text)


def test_random_text_round_trips(
    processors: tuple[PreTrainedTokenizerFast, sentencepiece.SentencePieceProcessor],
) -> None:
    ours, theirs = processors
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices(" \n\tabcdefself.()=:_é€\U0001f600", k=draw.randrange(60)))
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text
        assert ids == theirs.encode(text)


def test_it_is_loaded_again_from_its_folder(
    processors: tuple[PreTrainedTokenizerFast, sentencepiece.SentencePieceProcessor], tmp_path: Path
) -> None:
    ours, _ = processors
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(ours) == 1000
    for text in [*HARD, OTHERS[0]]:
        assert again(text)["input_ids"] == ours(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == text
    assert (again.eos_token_id, again.pad_token_id) == (1, 2)


def test_training_is_reproducible() -> None:
    first, second = (tokenizer.train(TRAINING[:1], vocab_size=500) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_errors_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="--vocab_size"):
        tokenizer.train(TRAINING[:1], vocab_size=100)
    with pytest.raises(LaunchError, match="from which no tokenizer could be loaded"):
        tokenizer.load(str(tmp_path / "nowhere"))
    ours = tokenizer.train(TRAINING[:1], vocab_size=500)
    ours.eos_token = None
    ours.save_pretrained(tmp_path)
    with pytest.raises(LaunchError, match="no end-of-sequence"):
        tokenizer.load(str(tmp_path))


def test_a_ready_tokenizer_needs_no_sentencepiece(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    module = importlib.reload(tokenizer)
    with pytest.raises(ImportError, match="sentencepiece"):
        module.train(["text"], vocab_size=300)
