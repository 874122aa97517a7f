"""`tritonmind bench kernels`: every kernel and matrix product of a model, alone, beside what the card could do.

On a GPU a time is that of one launch inside a CUDA graph, gap to the next launch included, with inputs that are not in
the cache. The roofline is the larger of two times: that of the bytes which cannot be avoided, at the measured copy
bandwidth, and that of the arithmetic, at the measured rate of a large matrix product.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.options import add_layers_shape
from tritonmind_tools.bench.report import Report, add_output_options, positive_numbers, prompt_sizes
from tritonmind_tools.bench.shapes import SHAPES

if TYPE_CHECKING:
    from tritonmind_tools.bench.kernel_case import Case, Kernel, Point, Setting


@dataclass(frozen=True)
class Row:
    """One kernel at one size. workload to roofline_fraction are the columns that rows of all benchmarks share."""

    workload: str
    shape: str
    precision: str
    value: float
    unit: str
    roofline_fraction: float
    kernel: str
    size: str
    num_bytes: float
    num_flops: float
    is_compute_bound: bool


def register(kinds: Any) -> None:
    """Add `bench kernels`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "kernels", help="each kernel alone, against the roofline", description=__doc__
    )
    add_layers_shape(parser)
    parser.add_argument(
        "--batch-sizes", default="1,8,64,256", metavar="N,...", help="of decode steps (default %(default)s)"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens of a decoding sequence (default %(default)s)")
    parser.add_argument(
        "--prefills", default="1x2048,8x512", metavar="SxT,...", help="prompts x tokens each (default %(default)s)"
    )
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="default %(default)s")
    parser.add_argument("--only", metavar="TEXT", help="kernels whose name contains it")
    add_output_options(parser, plots=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write files. Raises ConfigError for a wrong option; 1 when a kernel was not measured."""
    import torch

    from tritonmind_tools.bench import machine
    from tritonmind_tools.bench.kernel_case import Point, Setting
    from tritonmind_tools.bench.kernel_cases import KERNELS

    (context,) = positive_numbers("--context", str(args.context))
    points = [Point(size, 1, context) for size in positive_numbers("--batch-sizes", args.batch_sizes)]
    points += [Point(num_seqs, length, length) for num_seqs, length in prompt_sizes("--prefills", args.prefills)]
    chosen = [kernel for kernel in KERNELS if (args.only or "") in kernel.name]
    if not chosen:
        names = ", ".join(kernel.name for kernel in KERNELS)
        raise ConfigError(f"--only={args.only!r} is in no kernel's name; they are {names}")
    report = Report.from_args(args)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth, rate = machine.copy_bandwidth(), machine.matmul_rate(dtype)
    report.notes["copy bandwidth"] = f"{bandwidth / 1e9:.1f} GB/s"
    report.notes["matrix product"] = f"{rate / 1e12:.2f} TFLOP/s"
    setting = Setting(SHAPES[args.shape], dtype, device)
    chosen = [kernel for kernel in chosen if kernel.can_run(setting)]
    print(f"{'kernel':<24}{'size':<14}{'us':>10}{'MB':>10}{'TB/s':>8}{'TFLOP/s':>9}{'roofline':>10}")
    rows = []
    left_out = []
    for kernel, point in _grid(chosen, points):
        case = kernel.case(setting, point)
        try:
            seconds = _seconds(case, setting)
        except torch.cuda.OutOfMemoryError:
            left_out.append(f"{kernel.name} {point}: the card has too little memory for its inputs")
            print(f"{kernel.name:<24}{point!s:<14} not measured: out of memory", flush=True)
            continue
        rows.append(_row(kernel, point, case, seconds, args, bandwidth, rate))
        _print_row(rows[-1])
    report.print_facts()
    report.write([dataclasses.asdict(row) for row in rows], not_measured=left_out)
    return 1 if left_out else 0


def _grid(chosen: list[Kernel], points: list[Point]) -> Iterator[tuple[Kernel, Point]]:
    for kernel in chosen:
        for point in points:
            if kernel.decode if point.query_len == 1 else kernel.prefill:
                yield kernel, point


def _seconds(case: Case, setting: Setting) -> float:
    import torch

    from tritonmind_tools.bench.timing import seconds_per_call

    with torch.inference_mode():
        seconds = seconds_per_call(case.make, case.num_bytes, setting.device)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return seconds


def _row(
    kernel: Kernel, point: Point, case: Case, seconds: float, args: argparse.Namespace, bandwidth: float, rate: float
) -> Row:
    from tritonmind_tools.bench.kernel_case import kv_precision

    moving, computing = case.num_bytes / bandwidth, case.num_flops / rate
    return Row(
        workload=f"{kernel.name} {point}",
        shape=args.shape,
        precision=(kernel.weight_precision or args.dtype) + kv_precision(kernel.name),
        value=seconds * 1e6,
        unit="us",
        roofline_fraction=max(moving, computing) / seconds,
        kernel=kernel.name,
        size=str(point),
        num_bytes=case.num_bytes,
        num_flops=case.num_flops,
        is_compute_bound=computing > moving,
    )


def _print_row(row: Row) -> None:
    seconds = row.value / 1e6
    arithmetic = f"{row.num_flops / seconds / 1e12:9.1f}" if row.is_compute_bound else f"{'':>9}"
    print(
        f"{row.kernel:<24}{row.size:<14}{row.value:10.2f}{row.num_bytes / 1e6:10.3f}"
        f"{row.num_bytes / seconds / 1e12:8.3f}{arithmetic}{row.roofline_fraction:10.0%}",
        flush=True,
    )
