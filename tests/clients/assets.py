"""What the clients train on: tiny models with random weights, a tokenizer and texts, all made here."""

import json
from pathlib import Path

import torch
from conftest import ROOT

VOCABULARY = 384
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"


def make(folder: Path) -> Path:
    """The folders llama, gpt2 (model and tokenizer), texts, conversations and preferences in `folder`, once."""
    if (folder / "whole").exists():
        return folder
    words = (ROOT / "LICENSE").read_text().split()
    texts = [" ".join(words[i : i + 60]) for i in range(0, len(words), 60)]
    tokenizer = _tokenizer(texts)
    for name, model in _models(tokenizer).items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    _write(folder / "texts", [{"text": text} for text in texts * 8])
    halves = [(" ".join(text.split()[:10]), " ".join(text.split()[10:30])) for text in texts]
    _write(folder / "completions", [{"prompt": prompt, "completion": " " + rest} for prompt, rest in halves])
    pairs = [{"prompt": p, "chosen": " " + rest, "rejected": " " + " ".join(rest.split()[::-1])} for p, rest in halves]
    _write(folder / "preferences", pairs)
    (folder / "whole").touch()
    return folder


def _tokenizer(texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT
    return tokenizer


def _models(tokenizer):
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    configs = {
        "llama": LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            **ids,
        ),
        "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256, **ids),
    }
    models = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        models[name] = AutoModelForCausalLM.from_config(config)
    return models


def _write(folder, rows):
    """The first tenth is for testing."""
    folder.mkdir(parents=True, exist_ok=True)
    num_test = max(4, len(rows) // 10)
    for name, part in (("test", rows[:num_test]), ("train", rows[num_test:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
