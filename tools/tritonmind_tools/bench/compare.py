"""`tritonmind bench compare`: Hugging Face Transformers against this engine, in one run on one machine.

Both get the same batches of equal requests, the same random ids, the same weights in the same type, greedy;
Transformers by `generate`, which has the machine to itself and leaves before the engine starts. The figure is generated
tokens over wall time, prompts included.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.errors import ConfigError
from tritonmind.random_model import INT4
from tritonmind_tools.bench import grid
from tritonmind_tools.bench.measure import Plan, measure, print_rows, round_seed
from tritonmind_tools.bench.options import add_engine_options, add_model_options, engine_overrides, model_path
from tritonmind_tools.bench.report import Progress, Report, add_output_options, positive_numbers
from tritonmind_tools.bench.rounds import Round, random_prompts

if TYPE_CHECKING:
    import torch

    from tritonmind.model_source import ModelSource

ENGINE = "Transformers generate"
BATCH_SIZES = "32,64"
WARM_UP_TOKENS = 8
PAD_TOKEN_ID = 0


def register(kinds: Any) -> None:
    """Add `bench compare`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "compare", help="Transformers against this engine in one run", description=__doc__
    )
    add_model_options(parser, "checkpoint of Transformers: a folder or a .gguf file")
    parser.add_argument("--batch-sizes", default=BATCH_SIZES, help="comma-separated (default %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens of a request (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens it generates (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of each; the median counts (default %(default)s)")
    add_engine_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure both, print a table with ratios, write files. Raises ConfigError for a wrong option."""
    for name in ("input_len", "output_len", "rounds"):
        positive_numbers(f"--{name.replace('_', '-')}", str(getattr(args, name)))
    batch_sizes = positive_numbers("--batch-sizes", args.batch_sizes)
    workloads = [grid.batch(size, args.input_len, args.output_len) for size in batch_sizes]
    report = Report.from_args(args)
    theirs = _transformers_rounds(args, workloads)
    plan = Plan(workloads, args.rounds, max(batch_sizes), warm_up_tokens=WARM_UP_TOKENS)
    measured = measure(args, report, plan)
    ours = {row.workload: row for row in measured.rows}
    rows, entries = [], []
    ratios: dict[str, float] = {}
    for workload in workloads:
        reference = grid.make_row(workload, theirs[workload.name], measured.facts, engine=ENGINE)
        row = ours[workload.name]
        ratios[workload.name] = row.value / reference.value
        rows += [reference, row]
        entries += [dataclasses.asdict(reference), {**dataclasses.asdict(row), "ratio": ratios[workload.name]}]
    print_rows(
        rows,
        {"engine": lambda row: row.engine, "ratio": lambda row: _ratio(row, ratios)},
    )
    report.notes["same first tokens"] = _agreement(theirs, measured.rounds)
    report.print_facts()
    report.write(entries)
    return 0


def _ratio(row: grid.Row, ratios: dict[str, float]) -> str:
    return "" if row.engine == ENGINE else f"{ratios[row.workload]:.2f}"


def _transformers_rounds(args: argparse.Namespace, workloads: Sequence[grid.Workload]) -> dict[str, list[Round]]:
    """Rounds of each workload. The model's memory is free again afterwards."""
    import torch

    from tritonmind.engine.device import resolve_device, resolve_dtype
    from tritonmind.model_source import open_model

    if args.dtype == INT4:
        raise ConfigError(f"--dtype={INT4}: Transformers is given no 4-bit weights here; compare in 16 bits")
    source = open_model(model_path(args), dtype=args.dtype)
    config = source.engine_config(**engine_overrides(args))
    device = resolve_device(config.device)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model = _transformers_model(args, source, resolve_dtype(config, device), device)
    rounds: dict[str, list[Round]] = {}
    with Progress(len(workloads)) as progress:
        for workload in workloads:
            progress.begin(f"{ENGINE}: {workload.name}")
            _generate(model, source, workload, "warm-up", WARM_UP_TOKENS)
            seeds = [round_seed(workload.name, number) for number in range(args.rounds)]
            rounds[workload.name] = [_generate(model, source, workload, seed) for seed in seeds]
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rounds


def _transformers_model(args: argparse.Namespace, source: ModelSource, dtype: torch.dtype, device: torch.device) -> Any:
    """The model that our engine will read, as Transformers runs it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tritonmind.random_model import RandomModel
    from tritonmind.workspace import Workspace
    from tritonmind_tools.bench.random_checkpoint import hf_config, hf_tensors

    if not isinstance(source, RandomModel):
        path = Path(args.workspace)
        if isinstance(source, Workspace):
            raise ConfigError(f"{path} is a workspace: Transformers reads the checkpoint that it was converted from")
        where, file = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        read: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **file)
        return read.to(device).eval()
    # Without an end `generate` has nothing to look for at each step.
    config = LlamaConfig(**{**hf_config(source.model), "eos_token_id": None})
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to(device).eval()  # norms were once found on the CPU nevertheless
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in hf_tensors(source):
            parameters.pop(name).copy_(tensor)
    assert not parameters, f"nothing for {', '.join(parameters)}"
    return model


def _generate(model: Any, source: ModelSource, workload: grid.Workload, seed: str, max_tokens: int = 0) -> Round:
    """One call of `generate` for the whole batch, with the time at which each step's tokens were there."""
    import torch
    from transformers import StoppingCriteriaList

    prompt_len, num_tokens = workload.lengths[0]
    num_tokens = min(num_tokens, max_tokens or num_tokens)
    prompts = random_prompts(source.model, [prompt_len] * len(workload.lengths), seed)
    ids = torch.tensor(prompts, device=model.device)
    moments: list[float] = []

    def note_time(input_ids: torch.Tensor, scores: object, **more: object) -> torch.Tensor:
        input_ids[0, -1].item()  # waits for the step, as `generate` itself does next
        moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    started = time.perf_counter()
    with torch.inference_mode():
        result = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
            do_sample=False, pad_token_id=PAD_TOKEN_ID, stopping_criteria=StoppingCriteriaList([note_time]),
        )  # fmt: skip
        answers = result[:, prompt_len:].tolist()
    wall = time.perf_counter() - started
    assert {len(answer) for answer in answers} == {num_tokens}
    times = [moment - started for moment in moments]
    lengths = [(prompt_len, num_tokens)] * len(prompts)
    return Round(lengths, [times] * len(prompts), answers, wall)


def _agreement(theirs: dict[str, list[Round]], ours: dict[str, list[Round]]) -> str:
    """How many requests begin alike: almost all, or the two do not compute the same."""
    pairs = [
        (their_ids[0], our_ids[0])
        for name, rounds in theirs.items()
        for their_round, our_round in zip(rounds, ours[name], strict=True)
        for their_ids, our_ids in zip(their_round.token_ids, our_round.token_ids, strict=True)
    ]
    return f"{sum(theirs == ours for theirs, ours in pairs)} of {len(pairs)}"
