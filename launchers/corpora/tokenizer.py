"""The tokenizer: a given one, or a SentencePiece BPE trained on the training documents.

The trained one is lossless (identity normalization, every space kept, unknown characters as bytes), because
indentation carries meaning in source code. It is stored as an ordinary Hugging Face tokenizer, so that loading the
model folder needs none of our code.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from survival.errors import mistake
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

if TYPE_CHECKING:
    import sentencepiece

UNK, EOS, PAD = "<unk>", "</s>", "<pad>"
SPACE = "\u2581"  # SentencePiece's visible stand-in for a space
MAX_TRAINING_CHARACTERS = 20_000_000
"""More text hardly changes a vocabulary of a few thousand pieces and costs minutes."""


def train(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A lossless BPE tokenizer of at most `vocab_size` pieces, learned from `texts`."""
    # Imported here because a run with a ready tokenizer does not need the package.
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            # A small corpus may have fewer pieces than requested.
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=100_000,
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=2,
            eos_piece=EOS,
            pad_piece=PAD,
            # More threads would split the counts differently, and the pieces must not depend on the machine.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise mistake(
            "--vocab_size",
            f"{vocab_size} pieces, which could not be trained on the training text ({_last_line(error)})",
            "300 or more, and as many as the text has",
            "give more text or another number, or name a ready tokenizer with --tokenizer_name",
        ) from error
    return wrap(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))


def wrap(processor: sentencepiece.SentencePieceProcessor) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer that gives the same ids as a SentencePiece BPE `processor`."""
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(processor), unk_token=UNK, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(token, special=True, normalized=False) for token in (UNK, EOS, PAD)]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        # "</s>" in a document is text; only packing adds the real token.
        split_special_tokens=True,
    )


def load(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or a folder. It must have an end-of-document token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise mistake(
            "--tokenizer_name",
            f"{name!r}, from which no tokenizer could be loaded ({_last_line(error)})",
            "the name of a tokenizer, or a folder that holds one",
            "correct it, or check that the Hugging Face hub can be reached",
        ) from error
    if tokenizer.eos_token_id is None:
        raise mistake(
            "--tokenizer_name",
            f"{name!r}, which has no end-of-sequence token",
            "tokenizers with one, since it separates documents",
            "set `eos_token` in its tokenizer_config.json, or name another",
        )
    return tokenizer


def _lines(texts: Iterable[str]) -> Iterator[str]:
    # SentencePiece drops the newline at the end of a "sentence". At the start of the next line it is kept, and forms
    # one piece with the indentation that follows.
    characters = 0
    for text in texts:
        for number, line in enumerate(text.split("\n")):
            yield line if number == 0 else "\n" + line
        characters += len(text)
        if characters > MAX_TRAINING_CHARACTERS:
            return


def _merges(processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    # SentencePiece merges the pair whose union has the best score; a BPE file lists the same pairs in that order.
    count = processor.get_piece_size()
    normal = [
        i for i in range(count) if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
    ]
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in normal}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, left, right))
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
