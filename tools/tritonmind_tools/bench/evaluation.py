"""Held-out texts, read by several models side by side: the same tokens in the same steps, out of paged KV caches.

Each model is the engine's own runner: its weights as they are stored, its kernels, its KV cache under its quant_policy.
A text's tokens are given (teacher forcing), in one of two ways. `decode`: a token of each text a step, through the
kernels that generate answers, which read all K and V, the newest too, out of the cache as it is stored. `prefill`:
chunks of each text, through the kernels that compute prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tritonmind.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from tritonmind.chat_template import ChatTemplate
    from tritonmind.model_inputs import ModelInputs
    from tritonmind.model_source import ModelSource
    from tritonmind.models.llama import HiddenStates
    from tritonmind.tokenizer import Tokenizer
    from tritonmind_tools.text_data import Document

Way = Literal["decode", "prefill"]
WAYS: tuple[Way, ...] = ("decode", "prefill")

MIN_TOKENS = 16  # of a text, to be worth its row
BLOCK_SIZE = 64  # of the KV cache: that of all models, so that they share a step's inputs
DECODE_ROWS = {"cpu": 64, "cuda": 256}  # texts of a step
PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}  # tokens of a step


class Step(NamedTuple):
    """Tokens that each model computes at once. texts: which text each is of. targets: the token that follows it."""

    inputs: ModelInputs
    texts: torch.Tensor  # [num_tokens] int64, on the host
    targets: torch.Tensor  # [num_tokens] int64


class Layout(NamedTuple):
    """How texts are put into steps: so many of them at once, so many tokens of each in a step."""

    num_rows: int
    chunk: int
    max_len: int

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], way: Way, device: torch.device) -> Layout:
        longest = max(map(len, texts))
        if way == "decode":
            return cls(min(len(texts), DECODE_ROWS[device.type]), 1, longest)
        tokens = PREFILL_TOKENS[device.type]
        chunk = min(longest, tokens)
        return cls(max(1, min(len(texts), tokens // chunk)), chunk, longest)

    @property
    def blocks_per_row(self) -> int:
        return -(-self.max_len // BLOCK_SIZE)


class ForcedModel:
    """A model in the engine's runner, with a cache for the rows of a layout. overrides: as LLM's. name: for errors."""

    def __init__(self, source: ModelSource, layout: Layout, overrides: dict[str, Any], *, name: str) -> None:
        from tritonmind.engine.model_runner import ModelRunner

        self.name = name

        config = source.engine_config(
            **{
                **overrides,
                "block_size": BLOCK_SIZE,
                "cache_max_entry_count": float(layout.num_rows * layout.blocks_per_row),
                "max_model_len": max(2, layout.max_len),
                "max_num_seqs": layout.num_rows,
                "max_num_batched_tokens": layout.num_rows * layout.chunk,
                "enable_prefix_caching": False,
                # Steps of prompts are no graphs, and those of decodes only would each have to be captured first.
                "enforce_eager": True,
            }
        )
        self.runner = ModelRunner(source, config)
        # The runner counts what is compiled while serving; here others may still be loaded beside it.
        self.runner.jit_alarm.disarm(self.runner.device)
        self.dtype = str(self.runner.dtype).removeprefix("torch.")

    def hidden_states(self, step: Step) -> HiddenStates:
        """Compute a step's tokens, and write their K and V."""
        return self.runner.model.hidden_states(step.inputs, self.runner.kv_caches)

    def logits(self, hidden: HiddenStates, rows: torch.Tensor) -> torch.Tensor:
        """-> [len(rows), vocab_size] fp32. rows: int32."""
        return self.runner.model.logits(hidden, rows).float()


def steps(texts: Sequence[Sequence[int]], layout: Layout, way: Way, device: torch.device) -> Iterator[Step]:
    """All tokens of all texts, but the last of each, which nothing follows. Caches are written anew for each batch."""
    longest_first = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    for begin in range(0, len(texts), layout.num_rows):
        batch = longest_first[begin : begin + layout.num_rows]
        num_steps = -(-(len(texts[batch[0]]) - 1) // layout.chunk)
        for start in range(0, num_steps * layout.chunk, layout.chunk):
            active = [number for number in batch if len(texts[number]) - 1 > start]
            yield _step(texts, active, start, layout, way, device)


def _step(
    texts: Sequence[Sequence[int]], active: list[int], start: int, layout: Layout, way: Way, device: torch.device
) -> Step:
    """The next chunk of texts whose first `start` tokens are in the cache; text number i of `active` is in row i."""
    import torch

    from tritonmind.model_inputs import AttentionMetadata, ModelInputs

    ends = [min(start + layout.chunk, len(texts[number]) - 1) for number in active]
    lengths = torch.tensor([end - start for end in ends])
    rows = torch.arange(len(active)).repeat_interleave(lengths)
    positions = torch.cat([torch.arange(start, end) for end in ends])
    # Blocks go round the rows, so that no row's lie side by side.
    tables = torch.arange(layout.num_rows * layout.blocks_per_row, dtype=torch.int32)
    tables = tables.view(layout.blocks_per_row, layout.num_rows).T[: len(active)]
    slots = tables[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    if device.type == "cpu":  # whose attention works through all columns
        tables = tables[:, : -(-max(ends) // BLOCK_SIZE)]
    contexts = torch.tensor(ends, dtype=torch.int32)
    num_decodes = len(active) if way == "decode" else 0
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths[num_decodes:].cumsum(0).to(torch.int32)])

    def tokens(shift: int) -> torch.Tensor:
        parts = [texts[number][start + shift : end + shift] for number, end in zip(active, ends, strict=True)]
        return torch.tensor(list(itertools.chain.from_iterable(parts)))

    inputs = ModelInputs(
        token_ids=tokens(0).to(device),
        positions=positions.to(device),
        logits_rows=None,
        attention=AttentionMetadata(
            num_decodes=num_decodes,
            slot_mapping=slots.to(torch.int32).to(device),
            decode_block_tables=tables[:num_decodes].contiguous().to(device),
            decode_context_lens=contexts[:num_decodes].to(device),
            prefill_block_tables=tables[num_decodes:].contiguous().to(device),
            prefill_context_lens=contexts[num_decodes:].to(device),
            prefill_cu_seqlens_q=cu_seqlens.to(device),
            max_query_len=0 if num_decodes else int(lengths.max()),
            prefill_lens=[] if num_decodes else list(zip(lengths.tolist(), ends, strict=True)),
        ),
    )
    return Step(inputs, torch.tensor(active)[rows], tokens(1).to(device))


def read_texts(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate | None, *, num_texts: int, max_len: int
) -> list[list[int]]:
    """Token ids of the first texts of a file: a conversation's first `max_len` tokens, and all of a text, in windows.

    Windows begin with what the model expects at the beginning of a prompt. Raises ConfigError for a file that holds
    none of MIN_TOKENS.
    """
    from tritonmind_tools.text_data import read_documents

    windows = itertools.chain.from_iterable(
        _windows(document, tokenizer, template, max_len) for document in read_documents(path)
    )
    texts = list(itertools.islice((window for window in windows if len(window) >= MIN_TOKENS), num_texts))
    if not texts:
        raise ConfigError(f"--data={str(path)!r} holds no text of at least {MIN_TOKENS} tokens")
    return texts


def _windows(
    document: Document, tokenizer: Tokenizer, template: ChatTemplate | None, max_len: int
) -> Iterator[list[int]]:
    from tritonmind_tools.text_data import encode

    if not isinstance(document, str):
        yield encode(document, tokenizer, template)[:max_len]
        return
    beginning = tokenizer.encode_prompt("")
    ids = tokenizer.encode(document, add_special_tokens=False)
    length = max_len - len(beginning)
    for start in range(0, len(ids), length):
        yield beginning + ids[start : start + length]
