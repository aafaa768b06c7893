"""A tiny base and toy data for the verbs that run a model."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOPICS = {"animals": ("cat", "dog", "bird", "fish"), "food": ("bread", "rice", "soup", "tea"), "sky": ("sun", "moon", "star", "cloud")}


def make_base(path: Path, *, seed: int = 0) -> Path:
    """A two-layer BERT over letters, with tokenizer and masked-LM head, as a folder."""
    path.mkdir(parents=True, exist_ok=True)
    letters = LETTERS + "0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), ".", ","]
    (path / "vocab.txt").write_text("\n".join(words), "utf-8")
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=128
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertForMaskedLM(config).save_pretrained(path)
    return path


def make_topics(path: Path, rows: int, seed: int) -> Path:
    """Sentences whose words tell their label, as csv."""
    draw = random.Random(seed)
    lines = ["text,label"]
    for _ in range(rows):
        label = draw.choice(sorted(TOPICS))
        lines.append(f"{' '.join(draw.choices(TOPICS[label], k=draw.randint(2, 6)))} {draw.randint(0, 10**6)},{label}")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def make_tags(path: Path, rows: int, seed: int) -> Path:
    """Sentences with tags in CoNLL form."""
    draw = random.Random(seed)
    words = {word: "B-ANIMAL" if word in TOPICS["animals"] else "O" for group in TOPICS.values() for word in group}
    blocks = ["\n".join(f"{w}\t{words[w]}" for w in draw.choices(sorted(words), k=draw.randint(3, 8))) for _ in range(rows)]
    path.write_text("\n\n".join(blocks) + "\n", "utf-8")
    return path
