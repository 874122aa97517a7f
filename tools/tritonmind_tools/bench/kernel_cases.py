"""What `tritonmind bench kernels` measures: one table, a line for each launcher and for each product of the model.

A case says at one size how many bytes the operation cannot avoid to move and how much arithmetic it does, and makes
its inputs. To add a kernel, write a function that gives a Case and list it in KERNELS.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from tritonmind import kernels
from tritonmind.kernels.awq_format import AwqWeight
from tritonmind.layers.int4_linear import Int4GatedLinear, Int4Linear, share_scratch
from tritonmind.layers.linear import GatedLinear, Linear
from tritonmind_tools.bench.shapes import Shape

BLOCK_SIZE = 64
EPS = 1e-5
MAX_POSITIONS = 4096  # rows of the rotary table; what is beyond costs nothing
EDITS_PER_ROW = 16
NUM_TOP_LOGPROBS = 5
TOKENS_PER_BLOCK_WRITE = BLOCK_SIZE  # a decoding sequence takes a new block once in so many steps
# Of tritonmind.kernels, but no launchers: a list of sizes, and noise for the CPU; the card's is part of sample_tokens.
NOT_MEASURED = {
    "attention_variants",
    "gumbel_noise",
    "philox_uniform",
    "plan_flat_pages",
    "product_variants",
    "w4_variants",
}


class Setting(NamedTuple):
    """The model and where it computes."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device


class Point(NamedTuple):
    """`num_seqs` sequences with `query_len` new tokens each, after which each has `context` tokens."""

    num_seqs: int
    query_len: int
    context: int

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.query_len

    def __str__(self) -> str:
        return f"B={self.num_seqs} L={self.context}" if self.query_len == 1 else f"{self.num_seqs}x{self.query_len}"


class Case(NamedTuple):
    """num_bytes: read and written at least, per call. make: new inputs, and the call on them."""

    num_bytes: float
    num_flops: float
    make: Callable[[], Callable[[], object]]


class Kernel(NamedTuple):
    """launcher: the name in tritonmind.kernels that a case measures."""

    name: str
    launcher: str
    decode: bool
    prefill: bool
    case: Callable[[Setting, Point], Case]

    @property
    def is_int4(self) -> bool:
        """Whether it multiplies with 4-bit weights."""
        return self.launcher.startswith("w4_")

    def can_run(self, setting: Setting) -> bool:
        """On a GPU 4-bit weights are multiplied in 16 bits; on a CPU they are dequantised."""
        return not self.is_int4 or setting.device.type == "cpu" or setting.dtype.itemsize == 2


def launchers() -> set[str]:
    """Every launcher that the package has."""
    return {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))} - NOT_MEASURED


def _random(setting: Setting, *size: int) -> torch.Tensor:
    return torch.randn(size, dtype=setting.dtype, device=setting.device)


def _indices(setting: Setting, count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32, device=setting.device)


def _block_tables(setting: Setting, point: Point) -> torch.Tensor:
    """Pages in random order, as they are after a while of serving."""
    blocks_each = -(-point.context // BLOCK_SIZE)
    order = torch.randperm(point.num_seqs * blocks_each, device=setting.device)
    return order.to(torch.int32).view(point.num_seqs, blocks_each)


def _kv_pools(setting: Setting, point: Point) -> tuple[torch.Tensor, torch.Tensor]:
    num_blocks = point.num_seqs * -(-point.context // BLOCK_SIZE)
    size = (num_blocks, setting.shape.num_kv_heads, BLOCK_SIZE, setting.shape.head_dim)
    return _random(setting, *size), _random(setting, *size)


def _context_lens(setting: Setting, point: Point) -> torch.Tensor:
    return torch.full((point.num_seqs,), point.context, dtype=torch.int32, device=setting.device)


def _kv_bytes(setting: Setting, point: Point) -> int:
    shape = setting.shape
    return point.num_seqs * point.context * 2 * shape.num_kv_heads * shape.head_dim * setting.dtype.itemsize


def _rms_norm(setting: Setting, point: Point) -> Case:
    size = point.num_tokens, setting.shape.hidden_size

    def make() -> Callable[[], object]:
        x, weight = _random(setting, *size), _random(setting, size[1])
        return lambda: kernels.rms_norm(x, weight, eps=EPS)

    return Case((2 * size[0] + 1) * size[1] * setting.dtype.itemsize, 0, make)


def _add_rms_norm(setting: Setting, point: Point) -> Case:
    size = point.num_tokens, setting.shape.hidden_size

    def make() -> Callable[[], object]:
        x, residual, weight = _random(setting, *size), _random(setting, *size), _random(setting, size[1])
        return lambda: kernels.add_rms_norm(x, residual, weight, eps=EPS)

    return Case((4 * size[0] + 1) * size[1] * setting.dtype.itemsize, 0, make)


def _silu_mul(setting: Setting, point: Point) -> Case:
    size = point.num_tokens, 2 * setting.shape.intermediate_size

    def make() -> Callable[[], object]:
        x = _random(setting, *size)
        return lambda: kernels.silu_mul(x)

    return Case(1.5 * size[0] * size[1] * setting.dtype.itemsize, 0, make)


def _rotary_kv_write(setting: Setting, point: Point) -> Case:
    shape = setting.shape
    pools = functools.cache(lambda: _kv_pools(setting, point))  # large, little of it is touched: the sets share it

    def make() -> Callable[[], object]:
        qkv = _random(setting, point.num_tokens, shape.qkv_size)
        cos_sin = torch.randn(MAX_POSITIONS, shape.head_dim, device=setting.device)
        first = point.context - point.query_len
        positions = (_indices(setting, point.num_tokens) % point.query_len + first).long()
        tables = _block_tables(setting, point).repeat_interleave(point.query_len, dim=0)
        blocks = tables.gather(1, (positions // BLOCK_SIZE).unsqueeze(1)).squeeze(1)
        slot_mapping = (blocks * BLOCK_SIZE + positions % BLOCK_SIZE).to(torch.int32)
        positions %= MAX_POSITIONS
        return lambda: kernels.rotary_kv_write(
            qkv, cos_sin, positions, slot_mapping, *pools(),
            num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        )  # fmt: skip

    angles = min(point.num_tokens, point.context) * shape.head_dim * 4
    return Case(2 * point.num_tokens * shape.qkv_size * setting.dtype.itemsize + angles, 0, make)


def _plan(setting: Setting, context_lens: torch.Tensor) -> kernels.DecodePlan | None:
    shape = setting.shape
    return kernels.plan_decode(
        context_lens, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        block_size=BLOCK_SIZE, dtype=setting.dtype,
    )  # fmt: skip


def _plan_decode(setting: Setting, point: Point) -> Case:
    def make() -> Callable[[], object]:
        lengths = _context_lens(setting, point)
        return lambda: _plan(setting, lengths)

    return Case(point.num_seqs * 4 * (1 + 4 + setting.shape.num_kv_heads), 0, make)


def _decode_attention(setting: Setting, point: Point) -> Case:
    """One layer's; the plan is made once a step."""
    shape = setting.shape

    def make() -> Callable[[], object]:
        q = _random(setting, point.num_seqs, shape.num_heads, shape.head_dim)
        pools, tables = _kv_pools(setting, point), _block_tables(setting, point)
        lengths, scale = _context_lens(setting, point), shape.head_dim**-0.5
        plan = _plan(setting, lengths)
        return lambda: kernels.paged_decode_attention(q, *pools, tables, lengths, softmax_scale=scale, plan=plan)

    q_bytes = point.num_seqs * shape.hidden_size * setting.dtype.itemsize
    num_flops = 4 * point.num_seqs * point.context * shape.hidden_size
    return Case(_kv_bytes(setting, point) + 2 * q_bytes, num_flops, make)


def _prefill_attention(setting: Setting, point: Point) -> Case:
    shape, length = setting.shape, point.query_len

    def make() -> Callable[[], object]:
        q = _random(setting, point.num_tokens, shape.num_heads, shape.head_dim)
        pools, tables = _kv_pools(setting, point), _block_tables(setting, point)
        lengths, scale = _context_lens(setting, point), shape.head_dim**-0.5
        starts = _indices(setting, point.num_seqs + 1) * length
        return lambda: kernels.paged_prefill_attention(
            q, *pools, tables, starts, lengths, max_query_len=length, softmax_scale=scale
        )

    q_bytes = point.num_tokens * shape.hidden_size * setting.dtype.itemsize
    # Query i sees the tokens before the run and i + 1 of it.
    num_pairs = point.num_seqs * (length * (point.context - length) + length * (length + 1) / 2)
    return Case(_kv_bytes(setting, point) + 2 * q_bytes, 4 * num_pairs * shape.hidden_size, make)


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
            x = _random(setting, rows, k)
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
        x = _random(setting, rows, k)
        return lambda: linear(x)

    return Case((2 * k * n + rows * (k + n)) * setting.dtype.itemsize, 4 * rows * k * n, make)


def _int4_bytes(n: int, k: int, shape: Shape) -> float:
    """Of a 4-bit weight as it is stored, with a scale and a zero point for each group."""
    return n * k * (0.5 + 2.5 / shape.group_size)


def _filled(layer: Int4Linear) -> Int4Linear:
    """The layer with random levels, ready for use."""
    weight = AwqWeight(layer.qweight, layer.qzeros, layer.scales)  # type: ignore[arg-type]
    for words in (weight.qweight, weight.qzeros):
        words.random_(-(1 << 31), (1 << 31) - 1)
    weight.scales.uniform_(0.001, 0.01)
    layer.finalize()
    share_scratch([layer])
    return layer


def _int4_linear(in_features: Callable[[Shape], int], out_features: Callable[[Shape], int]) -> Callable[..., Case]:
    def case(setting: Setting, point: Point) -> Case:
        rows, k, n = point.num_tokens, in_features(setting.shape), out_features(setting.shape)

        def make() -> Callable[[], object]:
            layer = Int4Linear(
                k, n, group_size=setting.shape.group_size, bias=False, dtype=setting.dtype, device=setting.device
            )
            linear, x = _filled(layer), _random(setting, rows, k)
            return lambda: linear(x, partial_sums=True)

        return Case(_int4_bytes(n, k, setting.shape) + rows * (k + n) * setting.dtype.itemsize, 2 * rows * k * n, make)

    return case


def _int4_gate_up(setting: Setting, point: Point) -> Case:
    rows, k, n = point.num_tokens, setting.shape.hidden_size, setting.shape.intermediate_size

    def make() -> Callable[[], object]:
        layer = Int4GatedLinear(k, n, group_size=setting.shape.group_size, dtype=setting.dtype, device=setting.device)
        linear, x = _filled(layer), _random(setting, rows, k)
        return lambda: linear(x)

    return Case(_int4_bytes(2 * n, k, setting.shape) + rows * (k + n) * setting.dtype.itemsize, 4 * rows * k * n, make)


def _gather_rows(setting: Setting, point: Point) -> Case:
    shape, rows = setting.shape, point.num_tokens
    table = functools.cache(lambda: _random(setting, shape.vocab_size, shape.hidden_size))  # shared by the sets

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
            logits = _random(setting, rows, vocab_size)
            slots, positions = _indices(setting, rows), full(point.context, torch.int32)
            return lambda: kernels.sample_tokens(logits, slots, positions, state, greedy=greedy)

        counts = 4 if penalty != 1 else 0
        return Case(rows * vocab_size * (setting.dtype.itemsize + counts), 0, make)

    return case


def _token_logprobs(setting: Setting, point: Point) -> Case:
    rows, vocab_size = point.num_seqs, setting.shape.vocab_size

    def make() -> Callable[[], object]:
        logits = _random(setting, rows, vocab_size)
        token_ids = torch.randint(vocab_size, (rows,), device=setting.device)
        return lambda: kernels.token_logprobs(logits, token_ids, num_top=NUM_TOP_LOGPROBS)

    return Case(rows * vocab_size * setting.dtype.itemsize, 0, make)


def _edit_logits(setting: Setting, point: Point) -> Case:
    """EDITS_PER_ROW biases for each row."""
    rows, vocab_size, count = point.num_seqs, setting.shape.vocab_size, point.num_seqs * EDITS_PER_ROW

    def make() -> Callable[[], object]:
        logits, slots = _random(setting, rows, vocab_size), _indices(setting, rows)
        row = _indices(setting, count) // EDITS_PER_ROW
        ids = _indices(setting, count) % vocab_size
        values, last = (
            torch.ones(count, device=setting.device),
            torch.zeros(rows, dtype=torch.int64, device=setting.device),
        )
        conditions = torch.full_like(ids, -1)
        return lambda: kernels.edit_logits(logits, row, ids, values, conditions, slots, last)

    return Case(count * (4 * 4 + 2 * setting.dtype.itemsize), 0, make)


def _prepare_tokens(setting: Setting, point: Point) -> Case:
    count = point.num_tokens

    def make() -> Callable[[], object]:
        slots = _indices(setting, count) // point.query_len
        positions = _indices(setting, count) % point.query_len + (point.context - point.query_len)
        ids = torch.full((count,), -1, dtype=torch.int32, device=setting.device)
        last = torch.zeros(point.num_seqs, dtype=torch.int64, device=setting.device)
        tables, long = _block_tables(setting, point), ids.long()
        out = kernels.TokenInputs(long, long.clone(), ids.clone())
        return lambda: kernels.prepare_tokens(ids, positions, slots, last, tables, block_size=BLOCK_SIZE, out=out)

    return Case(count * (3 * 4 + 8 + 4 + 2 * 8 + 4), 0, make)


def _prepare_decodes(setting: Setting, point: Point) -> Case:
    count = point.num_seqs

    def make() -> Callable[[], object]:
        tables, slots = _block_tables(setting, point), _indices(setting, count)
        none = torch.full((count,), -1, dtype=torch.int32, device=setting.device)
        last, lengths = torch.zeros(count, dtype=torch.int64, device=setting.device), _context_lens(setting, point)
        tokens = kernels.TokenInputs(none.long(), none.long(), none.clone())
        out = kernels.DecodeInputs(tokens, torch.empty_like(tables))
        return lambda: kernels.prepare_decodes(none, lengths, slots, none, last, tables, block_size=BLOCK_SIZE, out=out)

    return Case(count * (4 * 4 + 8 + 2 * 8 + 4 + 2 * 4 * -(-point.context // BLOCK_SIZE)), 0, make)


def _write_block_tables(setting: Setting, point: Point) -> Case:
    count = -(-point.num_tokens // TOKENS_PER_BLOCK_WRITE)

    def make() -> Callable[[], object]:
        tables, indices = _block_tables(setting, point), _indices(setting, count)
        return lambda: kernels.write_block_tables(tables, indices, indices)

    return Case(3 * 4 * count, 0, make)


KERNELS = (
    Kernel("prepare_tokens", "prepare_tokens", True, True, _prepare_tokens),
    Kernel("prepare_decodes", "prepare_decodes", True, False, _prepare_decodes),
    Kernel("write_block_tables", "write_block_tables", True, True, _write_block_tables),
    Kernel("gather_rows", "gather_rows", True, True, _gather_rows),
    Kernel("rms_norm", "rms_norm", True, True, _rms_norm),
    Kernel("add_rms_norm", "add_rms_norm", True, True, _add_rms_norm),
    Kernel("w_qkv", "linear", True, True, _linear(lambda s: s.hidden_size, lambda s: s.qkv_size)),
    Kernel("rotary_kv_write", "rotary_kv_write", True, True, _rotary_kv_write),
    Kernel("plan_decode", "plan_decode", True, False, _plan_decode),
    Kernel("paged_decode_attention", "paged_decode_attention", True, False, _decode_attention),
    Kernel("paged_prefill_attention", "paged_prefill_attention", False, True, _prefill_attention),
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
    Kernel("sample greedy", "sample_tokens", True, False, _sampling(greedy=True, temperature=0.0)),
    Kernel("sample temperature", "sample_tokens", True, False, _sampling()),
    Kernel("sample top-k top-p", "sample_tokens", True, False, _sampling(top_k=50, top_p=0.9)),
    Kernel("sample penalties", "sample_tokens", True, False, _sampling(penalty=1.1)),
    Kernel("edit_logits", "edit_logits", True, False, _edit_logits),
    Kernel("token_logprobs", "token_logprobs", True, False, _token_logprobs),
)
