"""`tritonmind bench serving`: the load of many clients on a running server, and what they see of it.

URL is HOST:PORT, a Triton server's gRPC port with a model of tritonmind, or http://HOST:PORT/v1, any OpenAI completions
endpoint that streams. --concurrency keeps so many requests under way: with --input-len and --output-len they are
submitted all at once, as `bench static` does, and the figure is generated tokens over wall time. --rate and --rates
send requests at random times, so many a second in the mean; the figure is answers a second in the second half of the
time in which they arrive, each counted by the share of its tokens that came then: take several times an answer's time.

Prompts are random and no prompt comes twice; answers are greedy and go on past eos. --self-host serves a workspace
with the embedded server first and then runs the same requests on a bare engine with the same settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.endpoints import check_url
from tritonmind_tools.bench.load import Target, poisson, run_load
from tritonmind_tools.bench.load_client import Request
from tritonmind_tools.bench.report import Progress, Report, add_output_options, positive_numbers, print_table
from tritonmind_tools.bench.serving_rows import BUSY_CLIENT, Served, Slo, median_of, served
from tritonmind_tools.bench.workloads import read_workload
from tritonmind_tools.embedded_server import MODEL_NAME

VOCAB_SIZE = 32000
NUM_PROCESSES, ROUNDS, MAX_BATCH = 4, 3, 256
INPUT_LEN, OUTPUT_LEN, NUM_REQUESTS = 128, 128, 1000
WARM_UP_TOKENS = 16
HEADER = (
    "workload", "value", "", "tok/s", "TTFT ms p50", "p90", "p99", "ITL ms p50", "p90", "p99", "gap ms p50", "p99",
    "E2E s p50", "p90", "p99", "tok/msg", "client CPU",
)  # fmt: skip


class Load(NamedTuple):
    """One row. rate: requests a second, 0 for num_slots requests at a time. lengths: prompt and answer tokens."""

    name: str
    lengths: Sequence[tuple[int, int]]
    num_slots: int = 0
    rate: float = 0.0

    @property
    def is_batch(self) -> bool:
        """Whether it is equal requests, all at once."""
        return self.num_slots == len(self.lengths) and len(set(self.lengths)) == 1


def register(kinds: Any) -> None:
    """Add `bench serving`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "serving", help="latency and throughput of a running server", description=__doc__
    )
    parser.add_argument("url", nargs="?", metavar="URL", help="HOST:PORT (gRPC of a Triton server) or http://.../v1")
    parser.add_argument("--self-host", metavar="WORKSPACE", help="serve this, and compare with the bare engine")
    parser.add_argument("--concurrency", help="requests under way at once, comma-separated")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--rate", dest="rates", metavar="RATE", help="requests a second, arriving at random")
    rate.add_argument("--rates", help="several, comma-separated: throughput against offered load")
    parser.add_argument("--workload", help="mix1000, sharegpt3000, a CSV file of lengths, or ShareGPT's JSON")
    parser.add_argument("--tokenizer", metavar="DIR", help="counts the tokens of ShareGPT's JSON")
    parser.add_argument("--input-len", help=f"prompt tokens; several go with --concurrency's (default {INPUT_LEN})")
    parser.add_argument("--output-len", help=f"tokens of an answer, likewise (default {OUTPUT_LEN})")
    parser.add_argument("--num-requests", type=int, help="of a row (default: the workload's; all at once; 1000)")
    parser.add_argument("--duration", type=float, metavar="S", help="of a rate: for so long instead")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of requests all at once; the median counts")
    parser.add_argument("--processes", type=int, default=NUM_PROCESSES, help="of clients (default %(default)s)")
    parser.add_argument("--slo-ttft", type=float, metavar="MS", help="goodput: longest time to the first token")
    parser.add_argument("--slo-itl", type=float, metavar="MS", help="goodput: longest mean time between tokens")
    parser.add_argument("--model", default=MODEL_NAME, help="as the server names it (default %(default)s)")
    parser.add_argument("--shape", default="", help="the model's shape, for the rows (--self-host knows it)")
    parser.add_argument("--precision", default="", help="likewise")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="ids are below it (default %(default)s)")
    parser.add_argument("--text-prompts", action="store_true", help="words, for an endpoint that takes no token ids")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and prompts (default %(default)s)")
    parser.add_argument("--max-batch", type=int, default=MAX_BATCH, help="of --self-host (default %(default)s)")
    parser.add_argument(
        "--engine-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of --self-host"
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write files. Raises ConfigError, and UnavailableError where nothing answers."""
    _check(args)
    loads = _loads(args)
    report = Report.from_args(args)
    if args.self_host:
        from tritonmind_tools.bench.serving_compare import measure_both

        rows = measure_both(args, report, loads)
    else:
        target = Target(args.url, args.model, args.vocab_size, args.processes, args.text_prompts)
        results = measure(target, args, report, loads)
        rows = [make_row(load, each, args.shape or args.model, args.precision) for load, each in results]
    report.print_facts()
    report.write(rows)
    return 0


def measure(target: Target, args: argparse.Namespace, report: Report, loads: list[Load]) -> list[tuple[Load, Served]]:
    """Put each load on the target, and print what came of it."""
    slo = Slo(*(None if limit is None else limit / 1e3 for limit in (args.slo_ttft, args.slo_itl)))
    results = []
    with Progress(len(loads)) as progress:
        for load in loads:
            progress.begin(load.name)
            results.append((load, _served(target, args, load, slo)))
    _print(results)
    _note(report, args, [each for _, each in results])
    return results


def make_row(load: Load, result: Served, shape: str, precision: str) -> dict[str, object]:
    """A row of results; of a rate it has the column rate, else concurrency."""
    offered = {"rate": load.rate} if load.rate else {"concurrency": load.num_slots}
    value, unit = _value(load, result)
    return {
        **result.row(load.name, shape, precision),
        "value": value,
        "unit": unit,
        "roofline_fraction": None,
        "engine": "server",
        **offered,
    }


def _value(load: Load, result: Served) -> tuple[float, str]:
    if load.rate:
        return result.sustained, "req/s"
    if len(set(load.lengths)) > 1:
        return result.requests_per_second, "req/s"
    return result.tokens_per_second, "tok/s"


def _served(target: Target, args: argparse.Namespace, load: Load, slo: Slo) -> Served:
    seed = f"{args.seed} {load.name}"
    if load.rate:
        arriving = poisson(load.lengths, load.rate, args.duration, args.seed)
        return served(run_load(target, arriving, seed=seed), slo)
    warm_up = [Request(prompt, min(answer, WARM_UP_TOKENS)) for prompt, answer in load.lengths[: load.num_slots]]
    run_load(target, warm_up, num_slots=load.num_slots, seed=f"{seed} warm-up")
    requests = [Request(*lengths) for lengths in load.lengths]
    return median_of(
        [
            served(run_load(target, requests, num_slots=load.num_slots, seed=f"{seed} {number}"), slo)
            for number in range(args.rounds if load.is_batch else 1)
        ]
    )


def _print(results: list[tuple[Load, Served]]) -> None:
    lines = []
    goodput = any(each.goodput is not None for _, each in results)
    for load, each in results:
        value, unit = _value(load, each)
        first, token, gap, whole = each.time_to_first_token, each.inter_token, each.message_gap, each.latency
        times = (first.p50, first.p90, first.p99, token.p50, token.p90, token.p99, gap.p50, gap.p99)
        cells = [load.name, f"{value:.5g}", unit, f"{each.tokens_per_second:.0f}"]
        cells += [f"{seconds * 1e3:.1f}" for seconds in times]
        cells += [f"{seconds:.2f}" for seconds in (whole.p50, whole.p90, whole.p99)]
        cells += [f"{each.tokens_per_message:.2f}", f"{each.client_cpu:.0%}"]
        lines.append([*cells, f"{each.goodput:.2f}"] if goodput else cells)
    print_table([*HEADER, "goodput req/s"] if goodput else HEADER, lines)


def _note(report: Report, args: argparse.Namespace, results: list[Served]) -> None:
    cached = max(each.prefix_cache_rate for each in results)
    report.notes["workload"] = "greedy, ignore_eos, random prompts, fresh each round and row"
    report.notes["prefix cache"] = f"at most {cached:.1%} of a row's prompt tokens were found there"
    report.notes["ITL"] = "per token: the gap between two messages over the tokens of the later; gap: between messages"
    busiest = max(each.client_cpu for each in results)
    report.notes["clients"] = f"{args.processes} processes, the busiest took {busiest:.0%} of a core"
    if busiest > BUSY_CLIENT:
        report.notes["warning"] = "a client process was too busy to be a fair observer: give more with --processes"
    late = max(each.late_p99 for each in results)
    report.notes["sent late"] = f"p99 {late * 1e3:.1f} ms after a request was due, which counts as waiting"
    num_failed, num_short = (sum(getattr(each, name) for each in results) for name in ("num_failed", "num_short"))
    if num_failed:
        first = next(each.first_error for each in results if each.first_error)
        report.notes["failed"] = f"{num_failed} requests, the first one: {first}"
    if num_short:
        report.notes["short"] = f"{num_short} answers ended before they had all tokens that were asked for"


def _check(args: argparse.Namespace) -> None:
    """Options that exclude or need each other, and their ranges. Raises ConfigError."""
    if (args.url is None) == (args.self_host is None):
        raise ConfigError("give either the URL of a running server or --self-host WORKSPACE, and not both")
    if args.url is not None:
        check_url(args.url)
    if not args.concurrency and not args.rates:
        raise ConfigError("say what load: --concurrency N, --rate R or --rates R,R,...")
    for name in ("rounds", "processes", "max_batch", *(["num_requests"] if args.num_requests is not None else [])):
        positive_numbers(f"--{name.replace('_', '-')}", str(getattr(args, name)))
    for name in ("duration", "slo_ttft", "slo_itl"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name):g} must be more than 0")
    if args.duration is not None and not args.rates:
        raise ConfigError(f"--duration={args.duration:g} is of --rate; --concurrency takes --num-requests")
    if args.workload and (args.input_len or args.output_len) and not (args.concurrency and args.rates):
        raise ConfigError("--workload has lengths of its own: leave out --input-len and --output-len")
    if args.engine_options and not args.self_host:
        raise ConfigError("--engine-options are for --self-host: a running server has its own")


def _loads(args: argparse.Namespace) -> list[Load]:
    """Rows in the order of the options, those of --concurrency first. Raises ConfigError."""
    streams = positive_numbers("--concurrency", args.concurrency) if args.concurrency else []
    rates = _rates(args.rates) if args.rates else []
    loads = []
    if args.input_len or args.output_len or not args.workload:
        for slots, (prompt, answer) in zip(streams, _equal_lengths(args, len(streams)), strict=True):
            lengths = [(prompt, answer)] * (args.num_requests or slots)
            loads.append(Load(f"server_{slots}_{prompt}_{answer}", lengths, num_slots=min(slots, len(lengths))))
        streams = []
    if args.workload:
        lengths = read_workload(args.workload, _counter(args))[: args.num_requests]
        name = f"server_{Path(args.workload).stem}"
    elif rates:
        ((prompt, answer),) = _equal_lengths(args, 1)
        lengths = [(prompt, answer)] * (args.num_requests or NUM_REQUESTS)
        name = f"server_{prompt}_{answer}"
    loads += [Load(f"{name}_concurrency{slots}", lengths, num_slots=slots) for slots in streams]
    return loads + [Load(f"{name}_rate{rate:g}", lengths, rate=rate) for rate in rates]


def _equal_lengths(args: argparse.Namespace, count: int) -> list[tuple[int, int]]:
    """Prompt and answer tokens for `count` rows."""
    prompts = _matching("--input-len", args.input_len or str(INPUT_LEN), count)
    answers = _matching("--output-len", args.output_len or str(OUTPUT_LEN), count)
    return list(zip(prompts, answers, strict=True))


def _matching(option: str, text: str, count: int) -> list[int]:
    """One number for all, or one each."""
    numbers = positive_numbers(option, text)
    if len(numbers) == 1:
        return numbers * count
    if len(numbers) != count:
        raise ConfigError(f"{option}={text!r} must be one number, or as many as --concurrency has, and one for a rate")
    return numbers


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"--rates={text!r} must be requests a second, more than 0, separated by commas")
    return rates


def _counter(args: argparse.Namespace) -> Any:
    if not args.tokenizer:
        return None
    from tritonmind.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(Path(args.tokenizer))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
