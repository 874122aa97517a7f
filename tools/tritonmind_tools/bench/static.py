"""`tritonmind bench static`: a batch of equal requests, all at once, over a grid of batch sizes.

Prompts are random token ids, decoding is greedy and goes on past eos, prefix caching is off. The figure is generated
tokens over wall time, prefill included. The roofline of decoding is the time to read the weights and the batch's K
and V once a step at the machine's copy bandwidth. With --transformers the same workload also runs in Hugging Face
Transformers' `generate`, one request at a time, with the same number of threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import queue
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.report import PRECISIONS, Report, positive_numbers
from tritonmind_tools.bench.shapes import shape_name

if TYPE_CHECKING:
    from tritonmind.config import ModelConfig
    from tritonmind.engine.client import EngineClient
    from tritonmind.messages import EngineRequest

FIRST_PLAIN_TOKEN_ID = 3  # below lie special tokens in common vocabularies
SEED = 0
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Row:
    """One measured cell. Times in seconds; tokens_per_second counts generated tokens, prefill time included.

    workload to roofline_fraction are the columns that rows of all benchmarks share; value is tokens_per_second.
    """

    workload: str
    shape: str
    precision: str
    value: float
    unit: str
    roofline_fraction: float
    engine: str
    batch_size: int
    input_len: int
    output_len: int
    tokens_per_second: float
    time_to_first_token: float
    step_time: float


def register(kinds: Any) -> None:
    """Add `bench static`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "static", help="tokens per second of a batch of equal requests", description=__doc__
    )
    parser.add_argument("workspace", help="workspace, or the checkpoint of one")
    parser.add_argument("--batch-sizes", default="1,16", help="comma-separated (default %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens of a request (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens it generates (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measured rounds; the median counts (default %(default)s)"
    )
    parser.add_argument("--num-threads", type=int, default=0, help="CPU threads, 0 for PyTorch's choice")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument(
        "--transformers", metavar="CHECKPOINT", help="compare with Transformers: a folder or .gguf file"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write JSON."""
    from tritonmind.engine.launch import start_engine
    from tritonmind.model_source import open_model
    from tritonmind_tools.bench import machine

    batch_sizes = positive_numbers("--batch-sizes", args.batch_sizes)
    model = open_model(args.workspace).model
    report = Report(args.json)
    bandwidth = machine.copy_bandwidth(args.num_threads)
    report.notes["copy bandwidth"] = f"{bandwidth / 1e9:.1f} GB/s"
    report.notes["workload"] = f"greedy, ignore_eos, random ids, prefix caching off, median of {args.rounds} rounds"
    rows = []
    overrides: dict[str, object] = {
        "enable_prefix_caching": False,
        "num_threads": args.num_threads,
        "dtype": args.dtype,
        "max_num_seqs": max(batch_sizes),
        "session_len": args.input_len + args.output_len,
    }
    client = start_engine(args.workspace, overrides)
    try:
        report.notes["engine"] = f"{client.info.device} {client.info.dtype}, {client.info.memory_plan}"
        for batch_size in batch_sizes:
            rounds = [_round(client, model, batch_size, args) for _ in range(args.rounds + 1)][1:]  # the first warms up
            rows.append(_row(model, client.info.dtype, batch_size, args, rounds, bandwidth))
            _print_row(rows[-1])
        stats = client.stats()
        report.notes["preemptions"] = str(stats.num_preemptions)
        report.notes["jit compiles"] = f"{stats.num_jit_compiles} after ready"
    finally:
        client.shutdown()
    if args.transformers:
        rows.append(_transformers_row(model, args, bandwidth))
        _print_row(rows[-1])
    report.print_facts()
    report.write_json([dataclasses.asdict(row) for row in rows])
    return 0


@dataclass(frozen=True)
class _Round:
    wall: float
    first: float


def _round(client: EngineClient, model: ModelConfig, batch_size: int, args: argparse.Namespace) -> _Round:
    from tritonmind.messages import TokenOutput

    outputs: queue.SimpleQueue[tuple[float, TokenOutput]] = queue.SimpleQueue()
    started = time.perf_counter()
    for prompt in random_prompts(model, batch_size, args.input_len):
        request = greedy_request(client.next_request_id(), prompt, args.output_len)
        client.submit(request, lambda output: outputs.put((time.perf_counter(), output)))
    first: dict[int, float] = {}
    num_tokens, num_finished, now = 0, 0, started
    while num_finished < batch_size:
        now, output = outputs.get()
        if output.error is not None:
            raise ConfigError(f"the engine failed during the measurement: {output.error}")
        first.setdefault(output.request_id, now - started)
        num_tokens += len(output.token_ids)
        num_finished += output.finish_reason is not None
    assert num_tokens == batch_size * args.output_len
    return _Round(wall=now - started, first=statistics.mean(first.values()))


def _transformers_row(model: ModelConfig, args: argparse.Namespace, bandwidth: float) -> Row:
    import torch
    from transformers import AutoModelForCausalLM

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    path = Path(args.transformers)
    source = {"gguf_file": path.name} if path.is_file() else {}
    where = path.parent if path.is_file() else path
    reference = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **source).eval()
    prompt = torch.tensor(random_prompts(model, 1, args.input_len))

    def generate(num_tokens: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            result = reference.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        assert result.shape[1] == prompt.shape[1] + num_tokens
        return time.perf_counter() - started

    generate(args.output_len)
    rounds = [_Round(wall=generate(args.output_len), first=generate(1)) for _ in range(args.rounds)]
    row = _row(model, "float32", 1, args, rounds, bandwidth)
    return dataclasses.replace(row, engine="Transformers generate")


def _row(
    model: ModelConfig, dtype: str, batch_size: int, args: argparse.Namespace, rounds: list[_Round], bandwidth: float
) -> Row:
    wall = statistics.median(r.wall for r in rounds)
    first = statistics.median(r.first for r in rounds)
    step_time = (wall - first) / max(1, args.output_len - 1)
    mean_context = args.input_len + args.output_len / 2
    ideal = step_bytes(model, DTYPE_BYTES[dtype], batch_size, mean_context) / bandwidth
    tokens_per_second = batch_size * args.output_len / wall
    return Row(
        workload=f"batch{batch_size}_{args.input_len}_{args.output_len}",
        shape=shape_name(model),
        precision=PRECISIONS[dtype],
        value=tokens_per_second,
        unit="tok/s",
        roofline_fraction=ideal / step_time if step_time else 0.0,
        engine="tritonmind",
        batch_size=batch_size,
        input_len=args.input_len,
        output_len=args.output_len,
        tokens_per_second=tokens_per_second,
        time_to_first_token=first,
        step_time=step_time,
    )


def step_bytes(model: ModelConfig, dtype_bytes: int, batch_size: int, context: float) -> float:
    """Fewest bytes one decode step must read: every weight once, and K and V of each sequence."""
    return weight_bytes(model, dtype_bytes) + kv_bytes(model, dtype_bytes, batch_size, context)


def weight_bytes(model: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of the weights that a decode step multiplies with."""
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer = model.hidden_size * (qkv + model.num_heads * model.head_dim + 3 * model.intermediate_size)
    return dtype_bytes * (model.num_layers * layer + model.vocab_size * model.hidden_size)


def kv_bytes(model: ModelConfig, dtype_bytes: int, batch_size: int, context: float) -> float:
    """Bytes of K and V of a batch of sequences with `context` tokens each."""
    return dtype_bytes * batch_size * context * 2 * model.num_layers * model.num_kv_heads * model.head_dim


def random_prompts(model: ModelConfig, batch_size: int, length: int) -> list[list[int]]:
    """The same prompts in every run: `batch_size` of `length` token ids."""
    draw = random.Random(SEED)
    return [[draw.randrange(FIRST_PLAIN_TOKEN_ID, model.vocab_size) for _ in range(length)] for _ in range(batch_size)]


def greedy_request(request_id: int, prompt: list[int], max_tokens: int) -> EngineRequest:
    """A request that takes the likeliest token `max_tokens` times, whatever it is."""
    from tritonmind.messages import EngineRequest

    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        stop_token_ids=[],
    )


def _print_row(row: Row) -> None:
    print(
        f"{row.engine:>22}  batch {row.batch_size:>3}  {row.input_len}/{row.output_len}  "
        f"{row.tokens_per_second:8.1f} tok/s  TTFT {row.time_to_first_token * 1e3:7.0f} ms  "
        f"step {row.step_time * 1e3:7.2f} ms  {row.roofline_fraction:5.0%} of the decode roofline",
        flush=True,
    )
