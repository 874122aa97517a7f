"""Workloads by name: what requests each has, what its figure counts, and what the roofline of that is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from tritonmind.config import QuantPolicy
from tritonmind_tools.bench.report import precision
from tritonmind_tools.bench.roofline import DTYPE_BYTES, decode_bytes, prefill_flops, step_bytes
from tritonmind_tools.bench.rounds import Lengths, Round, Steady, percentile
from tritonmind_tools.bench.shapes import shape_name
from tritonmind_tools.bench.workloads import CountTokens, read_workload, workload_name

if TYPE_CHECKING:
    from tritonmind.config import ModelConfig

# batch: generated tokens a second, prompts included. prefill: prompt tokens a second. step: generated tokens a second
# of the steps in which all decode. requests: requests a second.
Kind = Literal["batch", "prefill", "step", "requests"]

SWEEP_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SWEEP_CONTEXT = 256  # at which 256 sequences of Llama-2-7B fit an 80 GB card
SWEEP_CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
CONTEXT_BATCHES = (1, 8)
STEADY_STEPS, ARRIVAL_STEPS = 32, 8  # of a sweep's row
PEER_BATCHES = (
    (1, 1, 512),
    (1, 2048, 128),
    (8, 128, 256),
    (32, 128, 512),
    (64, 128, 512),
    (128, 128, 256),
    (256, 128, 256),
)
PEER_PREFILL = (64, 1024)
SHORT_MIX = 250  # requests: enough to fill the batch, and done in seconds


class Workload(NamedTuple):
    """Requests that are submitted at once: prompt and answer tokens of each."""

    name: str
    kind: Kind
    lengths: Lengths

    @property
    def max_len(self) -> int:
        return max(prompt + answer for prompt, answer in self.lengths)

    def num_blocks(self, block_size: int) -> int:
        """Blocks of the KV cache in which all of it lies at once."""
        return sum(-(-(prompt + answer) // block_size) for prompt, answer in self.lengths)


class Facts(NamedTuple):
    """What rows are measured on and against.

    bandwidth: bytes a second. flops: a second. max_batch: of a step. quant_policy: of the KV cache.
    """

    model: ModelConfig
    dtype: str  # as torch names it
    bandwidth: float
    flops: float
    max_batch: int
    quant_policy: int = QuantPolicy.NONE


@dataclass(frozen=True)
class Row:
    """One measured cell: medians over its rounds, times in seconds, percentiles over the requests of a round.

    workload to roofline_fraction are the columns that rows of all benchmarks share. batch_size, input_len, output_len:
    0 where the requests differ. inter_token: None where answers have one token. step_time, context: of the steady_steps
    in which all requests decode; where there are none, of all between first and last token. step_cpu: None where the
    engine does not count it. spread: (largest - least value) / median.
    """

    workload: str
    shape: str
    precision: str
    value: float
    unit: str
    roofline_fraction: float
    engine: str
    num_requests: int
    batch_size: int
    input_len: int
    output_len: int
    tokens_per_second: float
    total_tokens_per_second: float
    requests_per_second: float
    time_to_first_token: float
    time_to_first_token_p50: float
    time_to_first_token_p99: float
    inter_token_p50: float | None
    inter_token_p99: float | None
    latency_p50: float
    latency_p99: float
    step_time: float
    context: float
    steady_steps: int
    step_cpu: float | None
    wall: float
    num_rounds: int
    spread: float


def batch(batch_size: int, input_len: int, output_len: int) -> Workload:
    """Equal requests; those of a single token measure the computation of prompts."""
    if output_len == 1:
        return Workload(f"prefill_{batch_size}x{input_len}", "prefill", [(input_len, 1)] * batch_size)
    name = f"batch{batch_size}_{input_len}_{output_len}"
    return Workload(name, "batch", [(input_len, output_len)] * batch_size)


def steps(batch_size: int, context: int, max_num_batched_tokens: int) -> Workload:
    """Some STEADY_STEPS decode steps of a batch whose prompts are all computed.

    The first request decodes while the others' prompts are computed, in what the decodes leave of each step: a quarter
    more, because a step may not be full, and a few for those that begin before all requests have arrived.
    """
    num_prefill_steps = -(-batch_size * context // max(1, max_num_batched_tokens - batch_size))
    output_len = num_prefill_steps * 5 // 4 + ARRIVAL_STEPS + STEADY_STEPS
    return Workload(f"decode_batch{batch_size}_context{context}", "step", [(context, output_len)] * batch_size)


def requests(name: str, limit: int = 0, count_tokens: CountTokens | None = None) -> Workload:
    """The requests of a named workload or a file, or the first `limit` of them. Raises ConfigError."""
    lengths = read_workload(name, count_tokens)
    called = workload_name(name)
    if limit and limit < len(lengths):
        return Workload(f"{called}_first{limit}", "requests", lengths[:limit])
    return Workload(called, "requests", lengths)


def peers() -> list[Workload]:
    """The rows that other engines are compared on, and the short mix that --quick takes for the long one."""
    return [*(batch(*sizes) for sizes in PEER_BATCHES), batch(*PEER_PREFILL, 1), requests("mix1000", SHORT_MIX)]


def make_row(workload: Workload, rounds: Sequence[Round], facts: Facts, engine: str = "tritonmind") -> Row:
    """The row of a workload's rounds."""
    num_prompt = sum(prompt for prompt, _ in workload.lengths)
    num_generated = sum(answer for _, answer in workload.lengths)
    num_requests = len(workload.lengths)
    sizes = set(workload.lengths)
    input_len, output_len = sizes.pop() if len(sizes) == 1 else (0, 0)
    found = [round_.steady() for round_ in rounds]
    steady = [one or _on_average(round_) for one, round_ in zip(found, rounds, strict=True)]

    def median(of: list[float]) -> float:
        return statistics.median(of)

    def over_rounds(values_of: list[list[float]], percent: float) -> float:
        return median([percentile(values, percent) for values in values_of])

    wall, step_time = median([round_.wall for round_ in rounds]), median([one.step_time for one in steady])
    context = median([one.context for one in steady])
    values = {
        "batch": [num_generated / round_.wall for round_ in rounds],
        "prefill": [num_prompt / round_.wall for round_ in rounds],
        "step": [num_requests / one.step_time if one.step_time else 0.0 for one in steady],
        "requests": [num_requests / round_.wall for round_ in rounds],
    }[workload.kind]
    value = median(values)
    firsts, lasts = [round_.firsts for round_ in rounds], [round_.lasts for round_ in rounds]
    gaps = [round_.gaps for round_ in rounds]
    cpu = [round_.step_cpu for round_ in rounds if round_.step_cpu is not None]
    return Row(
        workload=workload.name,
        shape=shape_name(facts.model),
        precision=precision(facts.model, facts.dtype, facts.quant_policy),
        value=value,
        unit="req/s" if workload.kind == "requests" else "tok/s",
        roofline_fraction=_roofline_fraction(workload, facts, wall, step_time, context),
        engine=engine,
        num_requests=num_requests,
        batch_size=num_requests if input_len else 0,
        input_len=input_len,
        output_len=output_len,
        tokens_per_second=num_generated / wall,
        total_tokens_per_second=(num_prompt + num_generated) / wall,
        requests_per_second=num_requests / wall,
        time_to_first_token=median([statistics.mean(round_.firsts) for round_ in rounds]),
        time_to_first_token_p50=over_rounds(firsts, 50),
        time_to_first_token_p99=over_rounds(firsts, 99),
        inter_token_p50=over_rounds(gaps, 50) if all(gaps) else None,
        inter_token_p99=over_rounds(gaps, 99) if all(gaps) else None,
        latency_p50=over_rounds(lasts, 50),
        latency_p99=over_rounds(lasts, 99),
        step_time=step_time,
        context=context,
        steady_steps=min(one.num_steps for one in found if one) if all(found) else 0,
        step_cpu=median(cpu) if cpu else None,
        wall=wall,
        num_rounds=len(rounds),
        spread=(max(values) - min(values)) / value if value else 0.0,
    )


def _on_average(round_: Round) -> Steady:
    """Of a round without steady steps: what lies between first and last token, shared out."""
    num_steps = max(answer for _, answer in round_.lengths) - 1
    between = round_.wall - statistics.mean(round_.firsts)
    context = statistics.mean(prompt + answer / 2 for prompt, answer in round_.lengths)
    return Steady(between / num_steps if num_steps else 0.0, num_steps, context)


def _roofline_fraction(workload: Workload, facts: Facts, wall: float, step_time: float, context: float) -> float:
    """The least time over the time it took: of a step, of all prompts, or of all prompts and all steps."""
    model, dtype_bytes = facts.model, DTYPE_BYTES[facts.dtype]
    compute = prefill_flops(model, [prompt for prompt, _ in workload.lengths]) / facts.flops
    if workload.kind == "prefill":
        return compute / wall
    if workload.kind == "requests":
        num_bytes = decode_bytes(model, dtype_bytes, workload.lengths, facts.max_batch, facts.quant_policy)
        return (compute + num_bytes / facts.bandwidth) / wall
    num_bytes = step_bytes(model, dtype_bytes, len(workload.lengths), context, facts.quant_policy)
    return num_bytes / facts.bandwidth / step_time if step_time else 0.0
