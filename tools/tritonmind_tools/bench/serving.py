"""`tritonmind bench serving`: the load of many clients on a running server, and what they see of it.

URL is HOST:PORT, a Triton server's gRPC port with a model of tritonmind, or http://HOST:PORT/v1, any OpenAI completions
endpoint that streams. --concurrency keeps so many requests under way: with --input-len and --output-len they are
submitted all at once, as `bench static` does, and the figure is generated tokens over wall time. --rate and --rates
send requests at random times, so many a second in the mean; the figure is answers a second in the second half of the
time in which they arrive, each counted by the share of its tokens that came then: take several times an answer's time.

Prompts are random and no prompt comes twice; answers are greedy and go on past eos. --self-host serves a workspace,
or random weights of --shape, with the embedded Triton server, or with the API server (--front-end api_server), and then
runs the same requests on a bare engine with the same settings.
"""

from __future__ import annotations

import argparse
from typing import Any

from tritonmind.errors import ConfigError
from tritonmind.random_model import AUTO
from tritonmind_tools.bench.options import add_dtype, add_quant_policy, check_tokenizer, refuse_int4
from tritonmind_tools.bench.report import Report, add_output_options, positive_numbers
from tritonmind_tools.bench.rounds import FIRST_PLAIN_TOKEN_ID
from tritonmind_tools.bench.self_host import FRONT_ENDS
from tritonmind_tools.bench.shapes import SHAPES, known_shape
from tritonmind_tools.embedded_server import MODEL_NAME

VOCAB_SIZE = 32000
NUM_PROCESSES, ROUNDS, MAX_BATCH = 4, 3, 256


def register(kinds: Any) -> None:
    """Add `bench serving`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "serving", help="latency and throughput of a running server", description=__doc__
    )
    parser.add_argument("url", nargs="?", metavar="URL", help="HOST:PORT (gRPC of a Triton server) or http://.../v1")
    parser.add_argument(
        "--self-host",
        nargs="?",
        const="",
        metavar="WORKSPACE",
        help="serve this, or random weights of --shape, and compare with the bare engine",
    )
    parser.add_argument(
        "--front-end", choices=FRONT_ENDS, default=FRONT_ENDS[0], help="of --self-host (default %(default)s)"
    )
    parser.add_argument("--concurrency", help="requests under way at once, comma-separated")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--rate", dest="rates", metavar="RATE", help="requests a second, arriving at random")
    rate.add_argument("--rates", help="several, comma-separated: throughput against offered load")
    parser.add_argument("--workload", help="mix1000, sharegpt3000, a CSV file of lengths, or ShareGPT's JSON")
    parser.add_argument("--tokenizer", metavar="DIR", help="counts the tokens of ShareGPT's JSON")
    parser.add_argument("--input-len", help="prompt tokens; several go with --concurrency's (default 128)")
    parser.add_argument("--output-len", help="tokens of an answer, likewise (default 128)")
    parser.add_argument("--num-requests", type=int, help="of a row (default: the workload's; all at once; 1000)")
    parser.add_argument("--duration", type=float, metavar="S", help="of a rate: for so long instead")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of requests all at once; the median counts")
    parser.add_argument("--processes", type=int, default=NUM_PROCESSES, help="of clients (default %(default)s)")
    parser.add_argument("--slo-ttft", type=float, metavar="MS", help="goodput: longest time to the first token")
    parser.add_argument("--slo-itl", type=float, metavar="MS", help="goodput: longest mean time between tokens")
    parser.add_argument("--model", default=MODEL_NAME, help="as the server names it (default %(default)s)")
    parser.add_argument(
        "--shape", type=known_shape, default="", help="the model's shape, for the rows, or what --self-host makes"
    )
    parser.add_argument("--precision", default="", help="the model's, for the rows (--self-host knows it)")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="ids are below it (default %(default)s)")
    parser.add_argument("--text-prompts", action="store_true", help="words, for an endpoint that takes no token ids")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and prompts (default %(default)s)")
    parser.add_argument("--max-batch", type=int, default=MAX_BATCH, help="of --self-host (default %(default)s)")
    add_dtype(parser)
    add_quant_policy(parser)
    parser.add_argument(
        "--engine-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of --self-host"
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write files. Raises ConfigError, and UnavailableError where nothing answers."""
    # Here, because they load NumPy.
    from tritonmind_tools.bench import serving_compare, serving_load

    _check(args)
    loads = serving_load.loads(args)
    report = Report.from_args(args)
    measure = serving_load.measure_url if args.self_host is None else serving_compare.measure_both
    rows = measure(args, report, loads)
    report.print_facts()
    report.write(rows)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Options that exclude or need each other, and their ranges. Raises ConfigError."""
    if (args.url is None) == (args.self_host is None):
        raise ConfigError("give either the URL of a running server or --self-host, and not both")
    if args.self_host == "" and args.shape not in SHAPES:
        raise ConfigError(
            f"--self-host without a WORKSPACE makes one: --shape={args.shape!r} must be one of {', '.join(SHAPES)}"
        )
    if args.self_host and args.shape:
        raise ConfigError(f"--shape={args.shape!r} and --self-host={args.self_host!r}: give one of them")
    if args.self_host:
        refuse_int4(args)
    if args.url is not None:
        from tritonmind_tools.bench.endpoints import check_url

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
    check_tokenizer(args)
    if args.vocab_size <= FIRST_PLAIN_TOKEN_ID:
        raise ConfigError(f"--vocab-size={args.vocab_size} must be more than {FIRST_PLAIN_TOKEN_ID}, the least id sent")
    if args.self_host is None:
        own = {
            "--dtype": args.dtype != AUTO,
            "--quant-policy": args.one_quant_policy is not None,
            "--engine-options": bool(args.engine_options),
        }
        if given := [name for name, is_given in own.items() if is_given]:
            raise ConfigError(f"{', '.join(given)}: for --self-host; a running server has its own")
