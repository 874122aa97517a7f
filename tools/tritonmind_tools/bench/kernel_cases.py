"""What `tritonmind bench kernels` measures: one table, a line for each launcher and for each product of the model.

A case says at one size how many bytes the operation cannot avoid to move and how much arithmetic it does, and makes
its inputs. To add a kernel, write a function that gives a Case and list it in KERNELS.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch

from tritonmind import kernels
from tritonmind.kernels.awq_format import AwqWeight
from tritonmind.kernels.int8_linear import int8_tile
from tritonmind.layers.int4_linear import Int4GatedLinear, Int4Linear, share_scratch
from tritonmind.layers.linear import GatedLinear, Int8Linear, Linear
from tritonmind_tools.bench.kernel_cache_cases import CACHE_KERNELS
from tritonmind_tools.bench.kernel_case import (
    BLOCK_SIZE,
    EPS,
    Case,
    Kernel,
    Point,
    Setting,
    block_tables,
    context_lens,
    indices,
    random,
)
from tritonmind_tools.bench.shapes import Shape

EDITS_PER_ROW = 16
NUM_TOP_LOGPROBS = 5
TOKENS_PER_BLOCK_WRITE = BLOCK_SIZE  # a decoding sequence takes a new block once in so many steps
# Of tritonmind.kernels, but no launchers: sizes, and noise for the CPU; the card's is part of sample_tokens.
NOT_MEASURED = {
    "attention_variants", "gumbel_noise", "mask_words", "philox_uniform", "product_variants",
    "w4_scratch_elements", "w4_variants",
}  # fmt: skip


def launchers() -> set[str]:
    """Every launcher that the package has."""
    return {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))} - NOT_MEASURED


def _rms_norm(setting: Setting, point: Point) -> Case:
    size = point.num_tokens, setting.shape.hidden_size

    def make() -> Callable[[], object]:
        x, weight = random(setting, *size), random(setting, size[1])
        return lambda: kernels.rms_norm(x, weight, eps=EPS)

    return Case((2 * size[0] + 1) * size[1] * setting.dtype.itemsize, 0, make)


def _add_rms_norm(setting: Setting, point: Point) -> Case:
    size = point.num_tokens, setting.shape.hidden_size

    def make() -> Callable[[], object]:
        x, residual, weight = random(setting, *size), random(setting, *size), random(setting, size[1])
        return lambda: kernels.add_rms_norm(x, residual, weight, eps=EPS)

    return Case((4 * size[0] + 1) * size[1] * setting.dtype.itemsize, 0, make)


def _silu_mul(setting: Setting, point: Point) -> Case:
    size = point.num_tokens, 2 * setting.shape.intermediate_size

    def make() -> Callable[[], object]:
        x = random(setting, *size)
        return lambda: kernels.silu_mul(x)

    return Case(1.5 * size[0] * size[1] * setting.dtype.itemsize, 0, make)


def _linear(
    in_features: Callable[[Shape], int], out_features: Callable[[Shape], int], *, partial_sums: bool = True
) -> Callable[..., Case]:
    def case(setting: Setting, point: Point) -> Case:
        rows, k, n = point.num_tokens, in_features(setting.shape), out_features(setting.shape)

        def make() -> Callable[[], object]:
            linear = Linear(k, n, bias=False, dtype=setting.dtype, device=setting.device)
            assert linear.weight is not None
            linear.weight.normal_()
            linear.finalize()
            x = random(setting, rows, k)
            return lambda: linear(x, partial_sums=partial_sums)

        return Case((k * n + rows * (k + n)) * setting.dtype.itemsize, 2 * rows * k * n, make)

    return case


def _gate_up(setting: Setting, point: Point) -> Case:
    rows, k, n = point.num_tokens, setting.shape.hidden_size, setting.shape.intermediate_size

    def make() -> Callable[[], object]:
        linear = GatedLinear(k, n, dtype=setting.dtype, device=setting.device)
        assert linear.weight is not None
        linear.weight.normal_()
        linear.finalize()
        x = random(setting, rows, k)
        return lambda: linear(x)

    return Case((2 * k * n + rows * (k + n)) * setting.dtype.itemsize, 4 * rows * k * n, make)


def _int8_output(setting: Setting, point: Point) -> Case:
    rows, k, n = point.num_tokens, setting.shape.hidden_size, setting.shape.vocab_size

    def make() -> Callable[[], object]:
        linear = Int8Linear(k, n, bias=False, dtype=setting.dtype, device=setting.device)
        assert linear.weight is not None
        linear.weight.normal_()
        linear.finalize()
        if linear.int8 is not None and not int8_tile(linear.int8, rows, setting.device).is_whole:
            linear.weight = None  # not read: the memory is for more of them
        x = random(setting, rows, k)
        return lambda: linear(x)

    return Case(k * n + 4 * n + rows * (k + n) * setting.dtype.itemsize, 2 * rows * k * n, make)


def _int4_bytes(n: int, k: int, shape: Shape) -> float:
    """Of a 4-bit weight as it is stored, with a scale and a zero point for each group."""
    return n * k * (0.5 + 2.5 / shape.group_size)


def _filled(layer: Int4Linear, rows: int) -> Int4Linear:
    """The layer with random levels, ready for use with so many rows."""
    weight = AwqWeight(layer.qweight, layer.qzeros, layer.scales)  # type: ignore[arg-type]
    for words in (weight.qweight, weight.qzeros):
        words.random_(-(1 << 31), (1 << 31) - 1)
    weight.scales.uniform_(0.001, 0.01)
    layer.finalize()
    share_scratch([layer], rows)
    return layer


def _int4_linear(in_features: Callable[[Shape], int], out_features: Callable[[Shape], int]) -> Callable[..., Case]:
    def case(setting: Setting, point: Point) -> Case:
        rows, k, n = point.num_tokens, in_features(setting.shape), out_features(setting.shape)

        def make() -> Callable[[], object]:
            layer = Int4Linear(
                k, n, group_size=setting.shape.group_size, bias=False, dtype=setting.dtype, device=setting.device
            )
            linear, x = _filled(layer, rows), random(setting, rows, k)
            return lambda: linear(x, partial_sums=True)

        return Case(_int4_bytes(n, k, setting.shape) + rows * (k + n) * setting.dtype.itemsize, 2 * rows * k * n, make)

    return case


def _int4_gate_up(setting: Setting, point: Point) -> Case:
    rows, k, n = point.num_tokens, setting.shape.hidden_size, setting.shape.intermediate_size

    def make() -> Callable[[], object]:
        layer = Int4GatedLinear(k, n, group_size=setting.shape.group_size, dtype=setting.dtype, device=setting.device)
        linear, x = _filled(layer, rows), random(setting, rows, k)
        return lambda: linear(x)

    return Case(_int4_bytes(2 * n, k, setting.shape) + rows * (k + n) * setting.dtype.itemsize, 4 * rows * k * n, make)


def _gather_rows(setting: Setting, point: Point) -> Case:
    shape, rows = setting.shape, point.num_tokens
    table = functools.cache(lambda: random(setting, shape.vocab_size, shape.hidden_size))  # shared by the sets

    def make() -> Callable[[], object]:
        token_ids = torch.randint(shape.vocab_size, (rows,), device=setting.device)
        return lambda: kernels.gather_rows(table(), token_ids)

    return Case(2 * rows * shape.hidden_size * setting.dtype.itemsize, 0, make)


def _sampling(
    *, greedy: bool = False, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, penalty: float = 1.0
) -> Callable[..., Case]:
    def case(setting: Setting, point: Point) -> Case:
        rows, vocab_size = point.num_seqs, setting.shape.vocab_size

        def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((rows,), value, dtype=dtype, device=setting.device)

        def make() -> Callable[[], object]:
            state = kernels.SamplingState(
                temperature=full(temperature),
                top_k=full(top_k, torch.int32),
                top_p=full(top_p),
                min_p=full(0),
                repetition_penalty=full(penalty),
                presence_penalty=full(0),
                frequency_penalty=full(0),
                seed=full(7, torch.int64),
                token_counts=torch.zeros((rows, vocab_size), dtype=torch.int32, device=setting.device),
            )
            logits = random(setting, rows, vocab_size)
            slots, positions = indices(setting, rows), full(point.context, torch.int32)
            return lambda: kernels.sample_tokens(logits, slots, positions, state, greedy=greedy)

        counts = 4 if penalty != 1 else 0
        return Case(rows * vocab_size * (setting.dtype.itemsize + counts), 0, make)

    return case


def _token_logprobs(setting: Setting, point: Point) -> Case:
    rows, vocab_size = point.num_seqs, setting.shape.vocab_size

    def make() -> Callable[[], object]:
        logits = random(setting, rows, vocab_size)
        token_ids = torch.randint(vocab_size, (rows,), device=setting.device)
        return lambda: kernels.token_logprobs(logits, token_ids, num_top=NUM_TOP_LOGPROBS)

    return Case(rows * vocab_size * setting.dtype.itemsize, 0, make)


def _edit_logits(setting: Setting, point: Point) -> Case:
    """EDITS_PER_ROW biases for each row."""
    rows, vocab_size, count = point.num_seqs, setting.shape.vocab_size, point.num_seqs * EDITS_PER_ROW

    def make() -> Callable[[], object]:
        logits, slots = random(setting, rows, vocab_size), indices(setting, rows)
        row = indices(setting, count) // EDITS_PER_ROW
        ids = indices(setting, count) % vocab_size
        values, last = (
            torch.ones(count, device=setting.device),
            torch.zeros(rows, dtype=torch.int64, device=setting.device),
        )
        conditions = torch.full_like(ids, -1)
        return lambda: kernels.edit_logits(logits, row, ids, values, conditions, slots, last)

    return Case(count * (4 * 4 + 2 * setting.dtype.itemsize), 0, make)


def _mask_tokens(setting: Setting, point: Point) -> Case:
    """A mask for each row, which forbids every second token: as many bytes are written as if it were all."""
    rows, vocab_size = point.num_seqs, setting.shape.vocab_size
    num_words = kernels.mask_words(vocab_size)

    def make() -> Callable[[], object]:
        logits = random(setting, rows, vocab_size)
        masks = torch.full((rows, num_words), 0x55555555, dtype=torch.int32, device=setting.device)
        row = indices(setting, rows)
        return lambda: kernels.mask_tokens(logits, row, masks)

    return Case(rows * (num_words * 4 + vocab_size * setting.dtype.itemsize), 0, make)


def _prepare_tokens(setting: Setting, point: Point) -> Case:
    count = point.num_tokens

    def make() -> Callable[[], object]:
        slots = indices(setting, count) // point.query_len
        positions = indices(setting, count) % point.query_len + (point.context - point.query_len)
        ids = torch.full((count,), -1, dtype=torch.int32, device=setting.device)
        last = torch.zeros(point.num_seqs, dtype=torch.int64, device=setting.device)
        tables, long = block_tables(setting, point), ids.long()
        out = kernels.TokenInputs(long, long.clone(), ids.clone())
        return lambda: kernels.prepare_tokens(ids, positions, slots, last, tables, block_size=BLOCK_SIZE, out=out)

    return Case(count * (3 * 4 + 8 + 4 + 2 * 8 + 4), 0, make)


def _prepare_decodes(setting: Setting, point: Point) -> Case:
    count = point.num_seqs

    def make() -> Callable[[], object]:
        tables, slots = block_tables(setting, point), indices(setting, count)
        none = torch.full((count,), -1, dtype=torch.int32, device=setting.device)
        last, lengths = torch.zeros(count, dtype=torch.int64, device=setting.device), context_lens(setting, point)
        tokens = kernels.TokenInputs(none.long(), none.long(), none.clone())
        out = kernels.DecodeInputs(tokens, torch.empty_like(tables))
        return lambda: kernels.prepare_decodes(none, lengths, slots, none, last, tables, block_size=BLOCK_SIZE, out=out)

    return Case(count * (4 * 4 + 8 + 2 * 8 + 4 + 2 * 4 * -(-point.context // BLOCK_SIZE)), 0, make)


def _write_block_tables(setting: Setting, point: Point) -> Case:
    count = -(-point.num_tokens // TOKENS_PER_BLOCK_WRITE)

    def make() -> Callable[[], object]:
        tables, entries = block_tables(setting, point), indices(setting, count)
        return lambda: kernels.write_block_tables(tables, entries, entries)

    return Case(3 * 4 * count, 0, make)


KERNELS = (
    Kernel("prepare_tokens", "prepare_tokens", True, True, _prepare_tokens),
    Kernel("prepare_decodes", "prepare_decodes", True, False, _prepare_decodes),
    Kernel("write_block_tables", "write_block_tables", True, True, _write_block_tables),
    Kernel("gather_rows", "gather_rows", True, True, _gather_rows),
    Kernel("rms_norm", "rms_norm", True, True, _rms_norm),
    Kernel("add_rms_norm", "add_rms_norm", True, True, _add_rms_norm),
    Kernel("w_qkv", "linear", True, True, _linear(lambda s: s.hidden_size, lambda s: s.qkv_size)),
    *CACHE_KERNELS,
    Kernel("wo", "linear", True, True, _linear(lambda s: s.hidden_size, lambda s: s.hidden_size)),
    Kernel("w13", "gate_up", True, True, _gate_up),
    Kernel("silu_mul", "silu_mul", True, True, _silu_mul),
    Kernel("w2", "linear", True, True, _linear(lambda s: s.intermediate_size, lambda s: s.hidden_size)),
    Kernel(
        "output", "linear", True, False, _linear(lambda s: s.hidden_size, lambda s: s.vocab_size, partial_sums=False)
    ),
    Kernel("w_qkv w4", "w4_linear", True, True, _int4_linear(lambda s: s.hidden_size, lambda s: s.qkv_size)),
    Kernel("wo w4", "w4_linear", True, True, _int4_linear(lambda s: s.hidden_size, lambda s: s.hidden_size)),
    Kernel("w13 w4", "w4_gate_up", True, True, _int4_gate_up),
    Kernel("w2 w4", "w4_linear", True, True, _int4_linear(lambda s: s.intermediate_size, lambda s: s.hidden_size)),
    Kernel("output int8", "int8_linear", True, False, _int8_output),
    Kernel("sample greedy", "sample_tokens", True, False, _sampling(greedy=True, temperature=0.0)),
    Kernel("sample temperature", "sample_tokens", True, False, _sampling()),
    Kernel("sample top-k top-p", "sample_tokens", True, False, _sampling(top_k=50, top_p=0.9)),
    Kernel("sample penalties", "sample_tokens", True, False, _sampling(penalty=1.1)),
    Kernel("edit_logits", "edit_logits", True, False, _edit_logits),
    Kernel("mask_tokens", "mask_tokens", True, False, _mask_tokens),
    Kernel("token_logprobs", "token_logprobs", True, False, _token_logprobs),
)
