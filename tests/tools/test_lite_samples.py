"""What calibration samples are drawn from, and how."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.checkpoints import make_tokenizer

from tritonmind.chat_template import load_chat_template
from tritonmind.errors import ConfigError
from tritonmind.tokenizer import Tokenizer
from tritonmind_tools.lite.samples import NAMED, draw_samples, open_documents
from tritonmind_tools.text_data import Document

TEXTS: list[Document] = [f"number {index} of many, and some more words" for index in range(200)]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory, vocab=320)
    return directory


def draw(tokenizer_dir: Path, documents: list[Document], *, seed: int = 0, seqlen: int = 40) -> torch.Tensor:
    tokenizer = Tokenizer.from_dir(tokenizer_dir)
    template = load_chat_template(tokenizer_dir, tokenizer.special_tokens)
    return draw_samples(iter(documents), tokenizer, template, num_samples=4, seqlen=seqlen, seed=seed)


def test_samples_begin_with_documents_and_follow_the_seed(tokenizer_dir: Path) -> None:
    first, again, other = draw(tokenizer_dir, TEXTS), draw(tokenizer_dir, TEXTS), draw(tokenizer_dir, TEXTS, seed=1)
    assert first.shape == (4, 40) and first.dtype == torch.int32
    assert torch.equal(first, again) and not torch.equal(first, other)
    tokenizer = Tokenizer.from_dir(tokenizer_dir)
    texts = [tokenizer.decode(sample) for sample in first.tolist()]
    assert all(text.startswith("number ") and text.count("number ") == 2 for text in texts), texts
    assert len({text[:12] for text in texts}) == 4


def test_conversations_go_through_the_template_and_long_texts_are_cut(tokenizer_dir: Path) -> None:
    turns = [{"role": "user", "content": f"Is {index} even?"} for index in range(200)]
    samples = draw(tokenizer_dir, [[turn] for turn in turns])
    start = Tokenizer.from_dir(tokenizer_dir).encode("<|im_start|>user\n", add_special_tokens=False)
    assert (samples[:, : len(start)] == torch.tensor(start)).all()

    book = "\n".join(f"line {index} of a book" for index in range(2000))
    texts = [Tokenizer.from_dir(tokenizer_dir).decode(sample) for sample in draw(tokenizer_dir, [book]).tolist()]
    assert all(text.startswith("line ") for text in texts) and len(set(texts)) == 4
    with pytest.raises(ConfigError, match=r"has \d+ tokens, enough for 0 samples of --calib_seqlen=500"):
        draw(tokenizer_dir, TEXTS[:2], seqlen=500)


def test_long_conversations_are_as_good_as_many_short_ones(tokenizer_dir: Path) -> None:
    """A sample takes the beginning of each: what is read of a large dataset must not depend on their ends."""
    samples = draw(tokenizer_dir, [[{"role": "user", "content": f"{index} " * 2000}] for index in range(100, 200)])
    assert len({tuple(sample) for sample in samples.tolist()}) == 4


def test_named_datasets_come_from_a_file_or_with_leave_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "c4.jsonl"
    local.write_text(json.dumps({"text": "local"}))
    assert list(open_documents("c4", local, allow_download=False)) == ["local"]
    assert list(open_documents(str(local), None, allow_download=False)) == ["local"]
    with pytest.raises(ConfigError, match=r"--calib_path is for the datasets c4, ptb, wikitext2, pileval"):
        open_documents(str(local), local, allow_download=False)
    with pytest.raises(ConfigError, match=r"--calib_dataset=ptb: name a local copy with --calib_path FILE"):
        open_documents("ptb", None, allow_download=False)

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package datasets: pip install 'tritonmind\[quant\]'"):
        next(open_documents("c4", None, allow_download=True))
    asked: list[dict[str, Any]] = []

    def load_dataset(**arguments: Any) -> list[dict[str, str]]:
        asked.append(arguments)
        return [{"text": "a\n", "sentence": "a"}, {"text": "", "sentence": " "}, {"text": "b\n", "sentence": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = {name: list(open_documents(name, None, allow_download=True)) for name in NAMED}
    assert found == {"c4": ["a\n", "b\n"], "ptb": ["a\nb"], "wikitext2": ["a\nb"], "pileval": ["a\n", "b\n"]}
    assert asked[0] == {"path": "allenai/c4", "name": "en", "split": "train", "streaming": True}

    def unreachable(**arguments: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(ConfigError, match=r"c4 cannot be downloaded \(no route\): .* give --calib_path FILE"):
        next(open_documents("c4", None, allow_download=True))
