"""What `tritonmind bench tune` compiles and times: a kernel at the sizes of a model, with what follows it.

A product may leave partial sums to the kernel after it, which then has more to read: the two are timed together, and
those with 4-bit weights with all of a layer but its attention.
"""

from __future__ import annotations

import functools
import importlib
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as LateError
from typing import Any, NamedTuple

import torch

from tritonmind import kernels
from tritonmind.kernels import tuning
from tritonmind.kernels.tile_candidates import SEARCHES
from tritonmind.kernels.tile_table import KERNELS, Tile
from tritonmind_tools.bench import kernel_cases
from tritonmind_tools.bench.kernel_case import BLOCK_SIZE, EPS, KV_SUFFIX, Case, Kernel, Point, Setting
from tritonmind_tools.bench.timing import seconds_per_call

# The jit functions behind a kernel's tiles.
JITTED = {
    "linear": ("triton_linear._linear_kernel",),
    "gate_up": ("triton_linear._gate_up_kernel",),
    "int8_linear": ("triton_int8_linear._int8_linear_kernel",),
    "w4_linear": ("triton_w4_linear._w4_linear_kernel", "gluon_w4_linear._w4_many_rows_kernel"),
    "w4_gate_up": ("triton_w4_linear._w4_gate_up_kernel", "gluon_w4_linear._w4_many_rows_kernel"),
    "decode_attention": ("triton_decode_attention._decode_kernel", "triton_decode_int8._decode_int8_kernel"),
    "prefill_attention": ("triton_prefill_attention._prefill_kernel", "gluon_prefill_attention._long_prefill_kernel"),
}
# Context of decoding sequences: few are timed with long ones, many with what fits beside each other.
FEW_SEQS, LONG_CONTEXT, CONTEXT = 8, 2048, 512
# Bytes a thread may put aside, see tests/kernels/test_compile.py.
MAX_STACK = 16
WORD = 4


class Task(NamedTuple):
    """One search. sizes: of tile_table.KERNELS. rows: what is timed, for the step up to max_rows. product: its name
    in kernel_cases.KERNELS."""

    kernel: str
    product: str
    sizes: tuple[int, ...]
    max_rows: int
    rows: int

    @property
    def weight_precision(self) -> str | None:
        """Of a weight that is not in the type that is computed in."""
        return kernel_case(self.product).weight_precision

    def named_sizes(self) -> dict[str, int]:
        return dict(zip(KERNELS[self.kernel].sizes, self.sizes, strict=True))


# The products of a model by the kernel that computes them.
PRODUCTS = {
    "linear": ("w_qkv", "wo", "w2", "output"),
    "gate_up": ("w13",),
    "int8_linear": ("output int8",),
    "w4_linear": ("w_qkv w4", "wo w4", "w2 w4"),
    "w4_gate_up": ("w13 w4",),
    "decode_attention": ("paged_decode_attention", "paged_decode_attention" + KV_SUFFIX),
    "prefill_attention": ("paged_prefill_attention",),
}


INT4_PRODUCTS = ("w_qkv w4", "wo w4", "w13 w4", "w2 w4")  # in the order of a layer


def tasks(setting: Setting, names: Sequence[str]) -> list[Task]:
    """The searches for these kernels at the sizes of a model; each size once."""
    found: dict[tuple[str, tuple[int, ...], int], Task] = {}
    for kernel in names:
        for product in PRODUCTS[kernel]:
            sizes = _sizes(setting, kernel, product)
            for max_rows, rows in SEARCHES[kernel].rows:
                found.setdefault((kernel, sizes, max_rows), Task(kernel, product, sizes, max_rows, rows))
    return list(found.values())


def _sizes(setting: Setting, kernel: str, product: str) -> tuple[int, ...]:
    shape = setting.shape
    if kernel.endswith("attention"):
        group = shape.num_heads // shape.num_kv_heads
        itemsize = 1 if product.endswith(KV_SUFFIX) else setting.dtype.itemsize
        return shape.head_dim, group, BLOCK_SIZE, itemsize
    product, _, bits = product.partition(" ")
    sizes = {
        "w_qkv": (shape.qkv_size, shape.hidden_size),
        "wo": (shape.hidden_size, shape.hidden_size),
        "w2": (shape.hidden_size, shape.intermediate_size),
        "output": (shape.vocab_size, shape.hidden_size),
        "w13": (shape.intermediate_size, shape.hidden_size),
    }[product]
    return (*sizes, shape.group_size) if bits == "w4" else sizes


def point(task: Task) -> Point:
    """The sequences and lengths that a task is timed with."""
    if task.kernel == "prefill_attention":
        return Point(max(1, CONTEXT // task.rows), task.rows, max(CONTEXT, task.rows))
    is_long = task.kernel == "decode_attention" and task.rows <= FEW_SEQS
    return Point(task.rows, 1, LONG_CONTEXT if is_long else CONTEXT)


def kernel_case(product: str) -> Kernel:
    """What measures a product."""
    (kernel,) = (kernel for kernel in kernel_cases.KERNELS if kernel.name == product)
    return kernel


def case(setting: Setting, task: Task, at: Point) -> Case:
    """The task's work at a point, and what takes its partial sums.

    A product with 4-bit weights takes so little that what kernels fetch before others have ended is much of it: it is
    timed in a layer, with the others of it.
    """
    if task.product not in INT4_PRODUCTS:
        return _with_taker(setting, task.product, at)
    parts = [_with_taker(setting, product, at) for product in INT4_PRODUCTS]

    def make() -> Callable[[], object]:
        calls = [part.make() for part in parts]
        return lambda: [call() for call in calls]

    return Case(sum(part.num_bytes for part in parts), sum(part.num_flops for part in parts), make)


def _with_taker(setting: Setting, name: str, at: Point) -> Case:
    takers = {"w_qkv": _rotary, "wo": _add_norm, "w2": _add_norm}
    work = kernel_case(name).case(setting, at)
    product, _, _ = name.partition(" ")
    return takers[product](setting, at.num_tokens, work) if product in takers else work


def _add_norm(setting: Setting, rows: int, product: Case) -> Case:
    size, make = (rows, setting.shape.hidden_size), product.make

    def make_both() -> Callable[[], object]:
        call = make()
        residual = torch.zeros(size, dtype=setting.dtype, device=setting.device)
        weight = residual.new_ones(size[1])
        return lambda: kernels.add_rms_norm(_tensor(call()), residual, weight, eps=EPS)

    return product._replace(num_bytes=product.num_bytes + 3 * math.prod(size) * setting.dtype.itemsize, make=make_both)


def _rotary(setting: Setting, rows: int, product: Case) -> Case:
    shape, make = setting.shape, product.make
    num_blocks = -(-rows // BLOCK_SIZE)

    def make_both() -> Callable[[], object]:
        call, size = make(), (num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        pools = [torch.zeros(size, dtype=setting.dtype, device=setting.device) for _ in range(2)]
        slots = torch.arange(rows, dtype=torch.int32, device=setting.device)
        cos_sin = torch.randn(rows, shape.head_dim, device=setting.device)
        return lambda: kernels.rotary_kv_write(
            _tensor(call()), cos_sin, slots.long(), slots, *pools,
            num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        )  # fmt: skip

    written = rows * shape.qkv_size * setting.dtype.itemsize
    return product._replace(num_bytes=product.num_bytes + written, make=make_both)


def _tensor(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


def seconds(setting: Setting, task: Task, tile: Tile) -> float:
    """Time of the task's work with a tile; infinite where the card refuses it."""
    work = case(setting, task, point(task))
    try:
        with tuning.forced(task.kernel, task.sizes, tile), torch.inference_mode():
            return seconds_per_call(work.make, work.num_bytes, setting.device)
    except Exception as error:
        if not refused(error):
            raise
        return math.inf


def refused(error: Exception) -> bool:
    """Whether the compiler or the card does not take a tile, which is no failure of ours.

    Triton's compiler raises plain RuntimeErrors; a fault while a kernel runs is of a class of its own in torch.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError) or type(error) is RuntimeError:
        return True
    return type(error).__module__.startswith("triton.")


class Compilers:
    """Processes that compile tiles into Triton's cache, from where this process takes them."""

    def __init__(self, setting: Setting, num_processes: int) -> None:
        self._pool = ProcessPoolExecutor(
            num_processes, mp_context=multiprocessing.get_context("spawn"), initializer=_start, initargs=(setting,)
        )

    def usable(self, jobs: Sequence[tuple[Task, Tile]], time_left: Callable[[], float]) -> list[tuple[Task, Tile]]:
        """Those of the jobs that compile without spills within the time."""
        futures = [(job, self._pool.submit(compile_tile, *job)) for job in jobs]
        good = []
        for job, future in futures:
            try:
                if future.result(timeout=max(time_left(), 0)):
                    good.append(job)
            except LateError:
                future.cancel()
        return good

    def close(self) -> None:
        """End the processes; what they have not begun is left out."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _start(setting: Setting) -> None:
    global _setting
    _setting = setting


def compile_tile(task: Task, tile: Tile) -> bool:
    """Whether the tile compiles, is launched and keeps to its registers."""
    return tile.is_whole or _stack_bytes(task._replace(max_rows=0, rows=0), tile) <= MAX_STACK


@functools.cache
def _stack_bytes(task: Task, tile: Tile) -> float:
    """Of the task's kernel, launched for one row or sequence; infinite where the tile is refused."""
    work, before = case(_setting, task, Point(1, 1, CONTEXT)), _variants(task.kernel)
    try:
        with tuning.forced(task.kernel, task.sizes, tile), torch.inference_mode():
            work.make()()
            torch.cuda.synchronize()
    except Exception as error:
        if not refused(error):
            raise
        return math.inf
    finally:
        torch.cuda.empty_cache()
    # None is new where the kernel does without the setting in which this tile differs from one before.
    return max((WORD * found.n_spills for key, found in _variants(task.kernel).items() if key not in before), default=0)


def _variants(kernel: str) -> dict[tuple[str, object], Any]:
    """What this process has compiled of a kernel."""
    found = {}
    for name in JITTED[kernel]:
        module, _, function = name.partition(".")
        jitted = getattr(importlib.import_module(f"{kernels.__name__}.{module}"), function)
        compiled = jitted.device_caches[torch.cuda.current_device()][0]
        found.update({(name, key): variant for key, variant in compiled.items()})
    return found


_setting: Setting
