"""Small vocabularies in the formats of tokenizer.model and qwen.tiktoken, trained on the spot."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tritonmind.vocabularies.library import _BYTE_OF
from tritonmind.vocabularies.tiktoken_file import QWEN_PATTERN

TEXTS = (
    "The capital of France is Paris.",
    "  leading, trailing and   inner spaces \n\n\ttabs ",
    "Größe, naïve, façade, Ωmega, Привет, мир!",
    "你好,世界。日本語の文章です。안녕하세요 세계",
    "مرحبا بالعالم, שלום עולם, नमस्ते दुनिया, ሰላም ለዓለም",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈🇫🇷 e\u0301 \u200d\ufeff end",
    "code: for (int i = 0; i < n; ++i) { a[i] += '\\u00e9'; }",
    "\ufffd is a character like any other \ufffd\ufffd",
    "abababa aaaaaaa aabaabaab nananana \u2581 x\u2581y 12345",
)
# InternLM v1 has its roles in the vocabulary itself.
INTERNLM_SYMBOLS = ("<|System|>", "<|User|>", "<|Bot|>", "<eoh>", "<eoa>")


def train_sentencepiece(path: Path, *, vocab: int = 700, symbols: tuple[str, ...] = (), **options: Any) -> None:
    """Write tokenizer.model to the directory, as Llama's are made unless options say otherwise."""
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines() * 3 if line.strip()]),
        model_writer=model,
        vocab_size=vocab,
        user_defined_symbols=list(symbols),
        hard_vocab_limit=False,
        minloglevel=2,
        **(settings | options),
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(model.getvalue())


def write_config(path: Path, **config: Any) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def train_tiktoken(path: Path, *, vocab: int = 500) -> None:
    """Write qwen.tiktoken to the directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(_BYTE_OF[character] for character in token) for token, _ in by_id]
    ranks = [*(bytes([byte]) for byte in range(256)), *(token for token in merged if len(token) > 1)]
    path.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (path / "qwen.tiktoken").write_text("".join(lines))
