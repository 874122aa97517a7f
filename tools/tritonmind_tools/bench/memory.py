"""`tritonmind bench memory`: how much of a card's memory an engine takes, running a full batch at full context.

Each row starts an engine in a process of its own, with a KV cache of exactly so many whole sessions, and runs as many
requests whose prompt and answer fill them. The figure is the most that the card had less free than before, as
nvidia-smi shows it: weights, cache, activations, graphs, and the process's CUDA context. Beside it stands the engine's
own plan. What loading the weights takes on the way is in the figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from tritonmind.errors import ConfigError
from tritonmind.random_model import INT4, PREFIX, SHAPES, known_shape
from tritonmind_tools.bench.options import add_engine_options, engine_overrides
from tritonmind_tools.bench.report import (
    Progress,
    Report,
    add_output_options,
    positive_numbers,
    precision,
    print_table,
)

if TYPE_CHECKING:
    from tritonmind.config import ModelConfig
    from tritonmind.engine.client import EngineClient

ANSWER = 16  # tokens generated at the end of each session
SAMPLE_SECONDS = 0.02
# An engine's memory is the card's again a moment after its process has ended.
RELEASE_SECONDS = 20.0
RELEASED_BYTES = 64 << 20  # what may still be missing then
BLOCK_SIZE = 64
MIB = 1 << 20
HEADER = (
    "model", "weights", "KV", "batch", "context", "MiB", "GB", "loading",
    "weights", "B each", "KV cache", "steps", "other",
)  # fmt: skip
STEPS = ("activations", "prompts' pages")  # of the plan's parts, what steps work in


class Case(NamedTuple):
    """An engine to start: the model's path or random:SHAPE, and what it is to hold."""

    model: str
    batch_size: int
    context: int
    quant_policy: int

    @property
    def name(self) -> str:
        return f"memory_batch{self.batch_size}_context{self.context}"


@dataclass(frozen=True)
class Row:
    """Memory of one engine, in MiB: `value` its peak; the peak until it was ready; parts of its plan; the rest.

    weight_bytes_each: bytes of each weight in linear layers of the decoder, with their share of scales and zeros.
    steps: what steps work in. other: CUDA context and graphs, of whose reserve in the plan little is used.
    memory_plan: all parts of the plan, bytes.
    """

    workload: str
    shape: str
    precision: str
    value: float
    unit: str
    quant_policy: int
    batch_size: int
    context: int
    loading: float
    weights: float
    kv_cache: float
    steps: float
    other: float
    weight_bytes_each: float
    memory_plan: dict[str, int]


def register(kinds: Any) -> None:
    """Add `bench memory`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "memory", help="memory of an engine by precision, batch and context", description=__doc__
    )
    parser.add_argument("models", nargs="*", help="workspaces or checkpoints")
    parser.add_argument("--shape", metavar="NAME,NAME...", help=f"random weights of {', '.join(sorted(SHAPES))}")
    parser.add_argument("--weights", default="16", help="bits of a shape's weights: 16, 4 or 16,4 (default 16)")
    parser.add_argument("--batch-sizes", default="1", help="sessions at once, comma-separated (default %(default)s)")
    parser.add_argument("--contexts", default="2048", help="tokens of a session, comma-separated (default 2048)")
    parser.add_argument("--quant-policy", default="0", help="0, 4, 8, comma-separated (default %(default)s)")
    add_engine_options(parser, one_quant_policy=False)
    add_output_options(parser, plots=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write files. Raises ConfigError for a wrong option, and without a GPU."""
    import torch

    all_cases = cases(args)
    if not torch.cuda.is_available():
        raise ConfigError("bench memory measures a GPU's memory, and there is none")
    report = Report.from_args(args)
    rows = []
    with Progress(len(all_cases)) as progress:
        for case in all_cases:
            progress.begin(f"{case.model} {case.name}, quant_policy {case.quant_policy}")
            rows.append(measure(case, args, lambda: torch.cuda.mem_get_info()[0]))
    print_rows(rows)
    report.notes["workload"] = f"each session: a prompt and {ANSWER} generated tokens that fill its context"
    report.print_facts()
    report.write([dataclasses.asdict(row) for row in rows])
    return 0


def cases(args: argparse.Namespace) -> list[Case]:
    """All combinations that the options ask for. Raises ConfigError for one that is wrong."""
    models = list(args.models)
    bits = args.weights.split(",")
    if not set(bits) <= {"16", "4"}:
        raise ConfigError(f"--weights={args.weights!r} must be 16, 4 or both, separated by a comma")
    for shape in map(known_shape, args.shape.split(",") if args.shape else ()):
        if shape not in SHAPES:
            raise ConfigError(f"--shape: {shape!r} is none of {', '.join(sorted(SHAPES))}")
        models += [PREFIX + shape + (f":{INT4}" if width == "4" else "") for width in bits]
    if not models:
        raise ConfigError("give workspaces (or checkpoints), or --shape NAME")
    policies = args.quant_policy.split(",")
    if not set(policies) <= {"0", "4", "8"}:
        raise ConfigError(f"--quant-policy={args.quant_policy!r}: known are 0 (16 bit), 4 and 8 (int8)")
    contexts = positive_numbers("--contexts", args.contexts)
    if min(contexts) <= ANSWER:
        raise ConfigError(f"--contexts={args.contexts!r}: each must be more than the {ANSWER} tokens of an answer")
    return [
        Case(model, batch_size, context, int(policy))
        for model in models
        for context in contexts
        for batch_size in positive_numbers("--batch-sizes", args.batch_sizes)
        for policy in policies
    ]


def measure(case: Case, args: argparse.Namespace, free_bytes: Callable[[], int]) -> Row:
    """Start the engine, run its batch, end it. free_bytes: of the card, asked all the time."""
    from tritonmind.engine.launch import start_engine
    from tritonmind.model_source import open_model
    from tritonmind_tools.bench.rounds import run_round

    overrides = engine_overrides(
        args,
        max_num_seqs=case.batch_size,
        max_model_len=case.context,
        block_size=BLOCK_SIZE,
        cache_max_entry_count=float(case.batch_size * -(-case.context // BLOCK_SIZE)),
        quant_policy=case.quant_policy,
    )
    model = open_model(case.model, dtype=overrides["dtype"]).model
    lengths = [(case.context - ANSWER, ANSWER)] * case.batch_size
    with MemoryWatch(free_bytes) as watch:
        client = start_engine(case.model, overrides)
        try:
            loading = watch.peak
            run_round(client, model, lengths, seed=case.name)
            if client.stats().num_preemptions:
                raise ConfigError(f"{case.model}: the cache was too small for {case.name}: leave its size alone")
            row = make_row(case, model, client, peak=watch.peak, loading=loading)
        finally:
            client.shutdown()
        watch.wait_released()
    return row


class MemoryWatch:
    """Looks every SAMPLE_SECONDS how much less memory is free than at the beginning."""

    def __init__(self, free_bytes: Callable[[], int]) -> None:
        self._free_bytes = free_bytes
        self._before = free_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self.peak = 0  # bytes

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def wait_released(self) -> None:
        """Until the card is as free as before, so that the next measurement begins there; at most RELEASE_SECONDS."""
        deadline = time.monotonic() + RELEASE_SECONDS
        while self._before - self._free_bytes() > RELEASED_BYTES and time.monotonic() < deadline:
            time.sleep(SAMPLE_SECONDS)

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._before - self._free_bytes())


def make_row(case: Case, model: ModelConfig, client: EngineClient, *, peak: int, loading: int) -> Row:
    """peak, loading: bytes."""
    from tritonmind_tools.bench.shapes import shape_name

    info = client.info
    plan = dict(info.memory_bytes)
    steps = sum(plan.get(name, 0) for name in STEPS)
    return Row(
        workload=case.name,
        shape=shape_name(model),
        precision=precision(model, info.dtype, case.quant_policy),
        value=peak / MIB,
        unit="MiB",
        quant_policy=case.quant_policy,
        batch_size=case.batch_size,
        context=case.context,
        loading=loading / MIB,
        weights=plan["weights"] / MIB,
        kv_cache=plan["KV cache"] / MIB,
        steps=steps / MIB,
        other=(peak - plan["weights"] - plan["KV cache"] - steps) / MIB,
        weight_bytes_each=bytes_of_a_weight(model, info.dtype, info.device),
        memory_plan=plan,
    )


def bytes_of_a_weight(model: ModelConfig, dtype: str, device: str) -> float:
    """What an engine that computes in `dtype` keeps of a linear weight on `device`, mean over the decoder's layers."""
    import torch

    from tritonmind.config import INT4_PER_WORD
    from tritonmind.kernels.w4_layout import packed_bytes
    from tritonmind.tensor_layout import tensor_specs

    if model.weight_type != INT4 or device == "cpu":
        return float(getattr(torch, dtype).itemsize)
    num_bytes = num_weights = 0
    for name, spec in tensor_specs(model, 1, 0).items():
        if name.endswith(".qweight"):
            k, n = spec.shape[0], spec.shape[1] * INT4_PER_WORD
            num_bytes += packed_bytes(n, k, model.group_size)
            num_weights += n * k
    return num_bytes / num_weights


def print_rows(rows: Sequence[Row]) -> None:
    """MiB, but for the peak that is also given in GB of 10^9 bytes."""
    print_table(
        HEADER,
        [
            (
                row.shape,
                row.precision.partition("+")[0],
                "16 bit" if row.quant_policy == 0 else f"int8 ({row.quant_policy})",
                str(row.batch_size),
                str(row.context),
                f"{row.value:.0f}",
                f"{row.value * MIB / 1e9:.2f}",
                f"{row.loading:.0f}",
                f"{row.weights:.0f}",
                f"{row.weight_bytes_each:.3f}",
                f"{row.kv_cache:.0f}",
                f"{row.steps:.0f}",
                f"{row.other:.0f}",
            )
            for row in rows
        ],
    )
