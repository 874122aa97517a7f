"""What a profiler's trace says about some steps: time by kernel and by kind of work, calls into CUDA, idle time.

The trace is the Chrome format that torch.profiler writes: events with a category, a name, a start and a duration in
microseconds. On a CPU the operators of PyTorch take the place of kernels, each without those it called.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
HOST_CATEGORIES = {"cuda_runtime", "cuda_driver"}
OPERATOR_CATEGORY = "cpu_op"
SYNCHRONISE = "cudaDeviceSynchronize"

# Kinds of work by what a kernel's short name holds; the first that fits counts.
GROUPS = (
    ("decode attention", re.compile(r"_decode_(int8_)?kernel|_plan_kernel|_combine_kernel|decode_attention")),
    ("prefill attention", re.compile(r"_prefill_kernel|_plan_group_kernel|_flatten_kernel|prefill_attention")),
    ("attention", re.compile(r"scaled_dot_product")),
    (
        "matrix products",
        re.compile(
            r"gemm|gemv|nvjet|cutlass|splitk|xmma|_linear_kernel|_gate_up_kernel|_many_rows_kernel|_w4_dequantize|::(add|b)?mm_?$",
            re.I,
        ),
    ),
    ("norm", re.compile(r"rms_norm")),
    ("rotary and KV write", re.compile(r"rotary|kv_write")),
    ("activation", re.compile(r"silu")),
    ("sampling", re.compile(r"_score_kernel|_choose_kernel|_edit_logits|_mask_tokens|logprob|argmax|topk", re.I)),
    ("step inputs", re.compile(r"_prepare_|_write_block_tables|gather_rows|embedding", re.I)),
    ("copies", re.compile(r"memcpy|memset|copy|fill", re.I)),
)
OTHER_GROUP = "other"


@dataclass(frozen=True)
class KernelTime:
    """One kernel over all steps of a trace. Times in microseconds, none of which counts twice; share is of all."""

    name: str
    group: str
    calls_per_step: float
    us_per_call: float
    us_per_step: float
    share: float


@dataclass(frozen=True)
class Account:
    """Kernels, the slowest first; microseconds a step by group; time a step in which at least one kernel ran; calls."""

    kernels: list[KernelTime]
    us_by_group: dict[str, float]
    busy_us_per_step: float
    host_calls_per_step: dict[str, float]


def account(events: Iterable[Mapping[str, Any]], num_steps: int, *, on_gpu: bool) -> Account:
    """Sum up a trace of `num_steps` steps."""
    complete = [event for event in events if event.get("ph") == "X"]
    if on_gpu:
        work = [event for event in complete if event.get("cat") in DEVICE_CATEGORIES]
        times = _exclusive_times(work)
    else:
        work = [event for event in complete if event.get("cat") == OPERATOR_CATEGORY]
        times = _own_times(work)
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, duration in times:
        by_name[name].append(duration)
    total = sum(duration for _, duration in times) or 1.0
    kernels = [
        KernelTime(
            name=name,
            group=group_of(name),
            calls_per_step=len(durations) / num_steps,
            us_per_call=sum(durations) / len(durations),
            us_per_step=sum(durations) / num_steps,
            share=sum(durations) / total,
        )
        for name, durations in by_name.items()
    ]
    us_by_group: dict[str, float] = defaultdict(float)
    host_calls: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        us_by_group[kernel.group] += kernel.us_per_step
    for name in _host_calls(complete):
        host_calls[name] += 1 / num_steps
    return Account(
        kernels=sorted(kernels, key=lambda kernel: -kernel.us_per_step),
        us_by_group=_largest_first(us_by_group),
        busy_us_per_step=_covered((float(event["ts"]), float(event["dur"])) for event in work) / num_steps,
        host_calls_per_step=_largest_first(host_calls),
    )


def group_of(name: str) -> str:
    """The kind of work of a kernel."""
    return next((group for group, pattern in GROUPS if pattern.search(name)), OTHER_GROUP)


def short_name(name: str) -> str:
    """A C++ kernel's name without result, PyTorch's namespaces, template and parameters; the functor in them is kept.

    Names of Triton kernels and of cuBLAS's own are returned as they are.
    """
    if "(" not in name and "<" not in name:
        return name
    if copied := re.match(r"Mem(?:cpy|set)(?: \w+)?", name):
        return copied[0]
    inner = re.search(r"cutlass_\w+|\w*Functor\w*|\w+Ops\b", name)
    base = re.sub(r"^void |\(anonymous namespace\)::|at::native::", "", name)
    base = re.split(r"[<(]", base)[0]
    return f"{base} {inner[0]}" if inner and inner[0] != base else base


def _host_calls(complete: list[Mapping[str, Any]]) -> list[str]:
    """Calls into CUDA in their order, without the synchronisations before and after the steps, which are not theirs."""
    events = [event for event in complete if event.get("cat") in HOST_CATEGORIES]
    names = [event["name"] for event in sorted(events, key=lambda event: event["ts"])]
    while names and names[-1] == SYNCHRONISE:
        names.pop()
    while names and names[0] == SYNCHRONISE:
        del names[0]
    return names


def _exclusive_times(work: list[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Name of each kernel, and how long it kept the card after those that ended earlier.

    With programmatic dependent launch a kernel starts while the one before still runs, and waits inside: its own
    duration counts that time twice.
    """
    times, end = [], float("-inf")
    for event in sorted(work, key=lambda event: float(event["ts"]) + float(event["dur"])):
        start, this_end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        times.append((short_name(event["name"]), this_end - max(start, end)))
        end = this_end
    return times


def _own_times(operators: list[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Name and duration of each operator, less what it spent in operators that it called on its thread."""
    times: list[tuple[str, float]] = []
    open_calls: dict[object, list[tuple[float, int]]] = defaultdict(list)  # by thread: end, and place in `times`
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        calls = open_calls[event.get("tid")]
        begin, duration = float(event["ts"]), float(event["dur"])
        while calls and calls[-1][0] <= begin:
            calls.pop()
        if calls:
            caller, own = times[calls[-1][1]]
            times[calls[-1][1]] = caller, max(0.0, own - duration)
        calls.append((begin + duration, len(times)))
        times.append((event["name"], duration))
    return times


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, length) intervals: kernels of two streams may overlap."""
    covered, end = 0.0, float("-inf")
    for start, length in sorted(intervals):
        covered += max(0.0, start + length - max(start, end))
        end = max(end, start + length)
    return covered


def _largest_first(sums: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
