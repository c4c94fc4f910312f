"""What the tests of the evaluation evaluate: small trained models, texts and tasks, all made here."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from corpora import tokenizer as tokenizers
from helpers.samples import WORDS, write_corpus
from transformers import LlamaConfig, LlamaForCausalLM

import ds_quant
from ds_quant.cli import evaluate

CONTEXT = 32
W8A8 = {"weight": {"bits": 8}, "activation": {"bits": 8}}


def section(linear: dict, **others: dict) -> dict:
    """A DeepSpeed JSON that quantizes."""
    return {"zero_optimization": {"ds_quant_required": True}, "ds_quant": {"linear": linear, **others}}


def write_json(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_model(folder: Path, linear: dict | None, *, seed: int = 1, step: int = 40, dtype=torch.float32) -> Path:
    """The `model` folder of a run that has trained a small Llama for some steps, in W8A8 for instance."""
    corpus = write_corpus(folder.parent / "corpus.jsonl")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    tokenizer = tokenizers.train(texts, vocab_size=320)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    if linear is not None:
        ds_quant.convert(model, linear)
    # Far enough from where it began that quantizing to four bits is seen.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    ids = torch.tensor(tokenizer(texts[0], add_special_tokens=False)["input_ids"][: 8 * CONTEXT]).view(8, CONTEXT)
    for _ in range(step):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.to(dtype).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_json(folder / "summary.json", {"steps": step, "seed": seed})
    return folder


def write_tasks(folder: Path) -> Path:
    """Two tasks on local data: a multiple choice with examples, and the last word."""
    folder.mkdir()
    chance = random.Random(0)
    rows = [
        {"question": " ".join(chance.choices(WORDS, k=4)), "choices": chance.sample(WORDS, 3), "answer": number % 3}
        for number in range(18)
    ]
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "words.yaml").write_text(
        "task: local_words\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}\n"
        "output_type: multiple_choice\n"
        "training_split: train\n"
        "test_split: test\n"
        'doc_to_text: "{{question}}:"\n'
        "doc_to_target: answer\n"
        "doc_to_choice: choices\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "last.yaml").write_text(
        "task: local_last\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "output_type: loglikelihood\n"
        "test_split: test\n"
        "doc_to_text: \"{{question.split(' ')[:-1]|join(' ')}}\"\n"
        "doc_to_target: \"{{' '+question.split(' ')[-1]}}\"\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]\n"
    )
    return folder


def refused(argv, capsys):
    """What is said in a refusal, after the bars of `datasets`."""
    assert evaluate.main(list(map(str, argv))) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said[said.index("error: ") :]
