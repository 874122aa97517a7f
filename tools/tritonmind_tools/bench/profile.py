"""`tritonmind bench profile`: where the time of a step goes.

An engine in this process brings a batch of equal greedy requests to decoding, then makes steps: first as it serves,
for the time of a step and what the host does in it, then under the profiler, for the time of each kernel and the calls
into CUDA. Idle is the time of an unprofiled step less the time in which a kernel ran. With --prompts new prompts, each
answered by one token, come with every step.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.options import (
    add_engine_options,
    add_model_options,
    engine_dtype,
    engine_overrides,
    model_path,
)
from tritonmind_tools.bench.report import (
    Report,
    add_output_options,
    check_file,
    positive_numbers,
    precision,
    prompt_sizes,
)
from tritonmind_tools.bench.roofline import DTYPE_BYTES, kv_bytes, prefill_flops, weight_bytes
from tritonmind_tools.bench.rounds import greedy_request, random_prompts
from tritonmind_tools.bench.shapes import shape_name

if TYPE_CHECKING:
    from tritonmind.engine.core import EngineCore
    from tritonmind.model_source import ModelSource
    from tritonmind_tools.bench.trace import Account

PREFILL_TOKENS = 4096  # of a step, beside the decodes
NUM_WARM_UPS = 3
MARGIN_STEPS = 4
NUM_PRINTED_KERNELS = 30
PARTS = ("schedule", "execute", "wait", "update", "message")
# CPU time of a step that the engine's thread may take on a GPU, by the largest batch size that it is for.
HOST_TARGETS = {32: 0.3e-3, 256: 0.5e-3}


class Timing(NamedTuple):
    """Seconds of an unprofiled step, of CPU time in its thread without waiting, and by the clock of its parts."""

    wall: float
    host: float
    parts: dict[str, float]


def register(kinds: Any) -> None:
    """Add `bench profile`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "profile", help="where the time of a step goes", description=__doc__
    )
    add_model_options(parser)
    parser.add_argument(
        "--batch-size", type=int, default=64, help="sequences, 0 for --prompts alone (default %(default)s)"
    )
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of each (default %(default)s)")
    parser.add_argument("--prompts", metavar="SxT,...", help="prompts x tokens of each that come with every step")
    parser.add_argument("--steps", type=int, default=10, help="steps timed, then profiled (default %(default)s)")
    add_engine_options(parser)
    add_output_options(parser, plots=False)
    parser.add_argument("--trace", metavar="FILE", help="keep the profiler's trace, for chrome://tracing or Perfetto")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the account, write files. Raises ConfigError for a wrong option or a batch that does not fit."""
    import torch

    from tritonmind.model_source import open_model
    from tritonmind_tools.bench import machine

    groups = prompt_sizes("--prompts", args.prompts) if args.prompts else []
    prompts = [num_tokens for num_prompts, num_tokens in groups for _ in range(num_prompts)]
    for name in ("context", "steps") if prompts and not args.batch_size else ("batch_size", "context", "steps"):
        positive_numbers(f"--{name.replace('_', '-')}", str(getattr(args, name)))
    source = open_model(model_path(args), dtype=engine_dtype(args))
    if args.shape is None and args.context > source.model.max_position_embeddings:
        raise ConfigError(
            f"--context={args.context} is more than the model's max_position_embeddings, "
            f"{source.model.max_position_embeddings}"
        )
    report = Report.from_args(args)
    check_file("--trace", args.trace)
    bandwidth = machine.copy_bandwidth()
    report.notes["copy bandwidth"] = f"{bandwidth / 1e9:.1f} GB/s"
    core, context, step = _working_core(source, args, prompts)
    gc.collect()
    gc.freeze()  # as the engine's own process does when it starts
    report.notes["engine"] = f"{core.info.device} {core.info.dtype}, {core.info.memory_plan}"
    timing = _timed(core, step, args.steps)
    account = _profiled(step, args.steps, Path(args.trace) if args.trace else None)
    gc.unfreeze()
    stats = core.stats()
    assert stats.num_running >= args.batch_size and not stats.num_preemptions, "the batch changed on the way"
    report.notes["jit compiles"] = f"{stats.num_jit_compiles} after ready"
    dtype_bytes = DTYPE_BYTES[core.info.dtype]
    num_bytes = {
        "decode attention": kv_bytes(
            source.model, dtype_bytes, args.batch_size, context + args.steps, core.info.quant_policy
        ),
        "matrix products": float(weight_bytes(source.model, dtype_bytes)),
    }
    _print_account(account, num_bytes, timing)
    target = None if core.info.device == "cpu" or prompts else _host_target(args.batch_size)
    _print_host(timing, target)
    roofline = sum(num_bytes.values()) / bandwidth
    workload = f"decode step B={args.batch_size} L={round(context)}"
    if prompts:
        # The products of prompts are bound by arithmetic, those of the decodes beside them come for nothing.
        rate = machine.matmul_rate(getattr(torch, core.info.dtype))
        report.notes["matmul rate"] = f"{rate / 1e12:.0f} TFLOP/s"
        roofline = num_bytes["decode attention"] / bandwidth + max(
            num_bytes["matrix products"] / bandwidth, prefill_flops(source.model, prompts) / rate
        )
        workload = f"step B={args.batch_size} L={round(context)} {args.prompts}"
    report.print_facts()
    row = {
        "workload": workload,
        "shape": shape_name(source.model),
        "precision": precision(source.model, core.info.dtype, core.info.quant_policy),
        "value": timing.wall * 1e6,
        "unit": "us",
        "roofline_fraction": roofline / timing.wall,
    }
    report.write(
        [row],
        host_seconds={**timing._asdict(), "target": target},
        bytes_by_group=num_bytes,
        **dataclasses.asdict(account),
    )
    return 0


def _working_core(
    source: ModelSource, args: argparse.Namespace, prompts: list[int]
) -> tuple[EngineCore, float, Callable[[], Any]]:
    """An engine in which every request decodes, the mean number of tokens that one has then, and what makes a step."""
    from tritonmind.engine.core import EngineCore

    # The first request decodes while the others' prompts are computed; the margin is for steps in flight.
    num_prefill_steps = -(-args.batch_size * args.context // PREFILL_TOKENS)
    max_tokens = num_prefill_steps + 2 * (NUM_WARM_UPS + args.steps) + MARGIN_STEPS
    # Of the prompts that came with a step some are in flight when the next come.
    num_seqs = args.batch_size + MARGIN_STEPS * len(prompts)
    overrides = engine_overrides(
        args,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(PREFILL_TOKENS, sum(prompts)) + num_seqs,
        max_model_len=max(args.context + max_tokens, *(length + 1 for length in prompts), 2),
    )
    core = EngineCore(source, source.engine_config(**overrides))
    size = core.info.block_size
    num_blocks = args.batch_size * -(-(args.context + max_tokens) // size)
    num_blocks += MARGIN_STEPS * sum(-(-(length + 1) // size) for length in prompts)
    if num_blocks > core.info.num_blocks:
        named = f"--batch-size={args.batch_size} with --context={args.context}"
        if prompts:
            named += f" and --prompts={args.prompts}"
        raise ConfigError(
            f"{named} needs {num_blocks} blocks, the KV cache has {core.info.num_blocks}; lower one of them"
        )
    for number, prompt in enumerate(random_prompts(source.model, [args.context] * args.batch_size)):
        if prompt:
            core.add(greedy_request(number, prompt, max_tokens))
    generated: dict[int, int] = defaultdict(int)
    num_more = NUM_WARM_UPS
    while num_more:
        num_more -= len(generated) == args.batch_size
        for output in core.step():
            assert output.finish_reason is None
            generated[output.request_id] += len(output.token_ids)
    # Drawn before: on the card's time nobody waits for them.
    num_steps = NUM_WARM_UPS + 2 * args.steps if prompts else 0
    arrivals = [random_prompts(source.model, prompts, f"step {number}") for number in range(num_steps)]
    request_ids = itertools.count(args.batch_size)

    def step() -> Any:
        for prompt in arrivals.pop() if arrivals else ():
            core.add(greedy_request(next(request_ids), prompt, 1))
        return core.step()

    for _ in range(NUM_WARM_UPS if prompts else 0):
        step()
    return core, args.context + sum(generated.values()) / max(args.batch_size, 1), step


def _timed(core: EngineCore, step: Callable[[], Any], num_steps: int) -> Timing:
    """Steps as they are when the engine serves; the clocks around their parts cost the host a microsecond each."""
    seconds: dict[str, float] = defaultdict(float)

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any) -> Any:
            started = time.perf_counter()
            result = call(*args)
            seconds[name] += time.perf_counter() - started
            return result

        return timed_call

    class ClockedHandle:
        def __init__(self, handle: Any) -> None:
            self.wait, self.draw = clocked("wait", handle.wait), handle.draw

    scheduler, executor = core.scheduler, core.executor
    execute = clocked("execute", executor.execute)
    before = scheduler.schedule, executor.execute, scheduler.update
    scheduler.schedule = clocked("schedule", scheduler.schedule)  # type: ignore[method-assign]
    scheduler.update = clocked("update", scheduler.update)  # type: ignore[method-assign]
    executor.execute = lambda output: ClockedHandle(execute(output))  # type: ignore[method-assign, assignment, return-value]
    encode = clocked("message", msgspec.msgpack.Encoder().encode)  # what sends the step's tokens, but for the socket
    _synchronise()
    host = -core.stats().step_cpu_s
    started = time.perf_counter()
    for _ in range(num_steps):
        encode(step())
    _synchronise()
    wall = time.perf_counter() - started
    host += core.stats().step_cpu_s + seconds["message"]
    scheduler.schedule, executor.execute, scheduler.update = before  # type: ignore[method-assign]
    parts = {name: seconds[name] / num_steps for name in PARTS}
    return Timing(wall=wall / num_steps, host=host / num_steps, parts=parts)


def _profiled(step: Callable[[], Any], num_steps: int, path: Path | None) -> Account:
    import torch
    from torch.profiler import ProfilerActivity

    from tritonmind_tools.bench.trace import account

    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    _synchronise()
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(num_steps):
            step()
        _synchronise()
    with tempfile.TemporaryDirectory() as directory:
        path = path or Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return account(events, num_steps, on_gpu=on_gpu)


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _print_account(account: Account, num_bytes: dict[str, float], timing: Timing) -> None:
    print(f"{'kernel':<60}{'calls/step':>11}{'us each':>10}{'us/step':>10}{'share':>7}")
    for kernel in account.kernels[:NUM_PRINTED_KERNELS]:
        print(
            f"{kernel.name[:58]:<60}{kernel.calls_per_step:11.1f}{kernel.us_per_call:10.2f}"
            f"{kernel.us_per_step:10.1f}{kernel.share:7.1%}"
        )
    others = account.kernels[NUM_PRINTED_KERNELS:]
    if others:
        print(f"{f'{len(others)} more':<60}{'':21}{sum(kernel.us_per_step for kernel in others):10.1f}")
    print(f"\n{'kind of work':<60}{'us/step':>10}{'MB':>10}{'TB/s':>8}")
    for group, us in account.us_by_group.items():
        read = num_bytes.get(group)
        rate = f"{read / 1e6:10.1f}{read / us / 1e6:8.3f}" if read else ""
        print(f"{group:<60}{us:10.1f}{rate}")
    wall, busy = timing.wall * 1e6, account.busy_us_per_step
    # Profiled steps come later, and may be slower than the unprofiled ones.
    print(f"\nstep {wall:.1f} us, of it {busy:.1f} us busy and {max(0.0, wall - busy):.1f} us idle")
    calls = ", ".join(f"{name} {count:g}" for name, count in account.host_calls_per_step.items())
    print(f"calls into CUDA a step: {calls or 'none'}")


def _host_target(batch_size: int) -> float | None:
    """Seconds of CPU time that a step of so many decodes may take; None where nothing is laid down."""
    return next((seconds for size, seconds in HOST_TARGETS.items() if batch_size <= size), None)


def _print_host(timing: Timing, target: float | None) -> None:
    parts = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in timing.parts.items())
    wanted = (
        "" if target is None else f" of at most {target * 1e6:.0f}: {'kept' if timing.host <= target else 'MISSED'}"
    )
    print(f"host: {timing.host * 1e6:.1f} us of CPU time a step without waiting{wanted}; us by the clock: {parts}")
