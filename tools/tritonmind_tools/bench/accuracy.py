"""`tritonmind bench accuracy`: what quantisation costs, on held-out text, through the engine as it serves.

The reference and each candidate read the same texts: perplexity, the mean KL divergence of the candidate's
distribution from the reference's over the whole vocabulary, and how often both hold the same token the likeliest.
Candidates with one label are draws of one recipe, from other calibration samples for instance: they share a row, with
the spread among them.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.errors import ConfigError
from tritonmind_tools.bench.accuracy_rows import Candidate, Measured, as_entry, make_rows, print_rows
from tritonmind_tools.bench.evaluation import MIN_TOKENS, WAYS, ForcedModel, Layout, Way, read_texts, steps
from tritonmind_tools.bench.options import add_engine_options, engine_overrides
from tritonmind_tools.bench.report import Progress, Report, add_output_options, precision

if TYPE_CHECKING:
    import torch

    from tritonmind.model_source import ModelSource
    from tritonmind.tokenizer import Tokenizer
    from tritonmind_tools.bench.accuracy_scores import TokenScores

REFERENCE = "reference"
POLICIES = {"0", "4", "8"}  # of quant_policy
NUM_TEXTS, MAX_LEN = 128, 512
LOGITS_ROWS = 256  # tokens whose distributions are compared at a time
# A candidate's memory, as a multiple of its weights and cache: logits, and what reading the weights takes.
MEMORY_FACTOR = 1.5


def register(kinds: Any) -> None:
    """Add `bench accuracy`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "accuracy", help="what quantisation costs: perplexity, KL divergence, top-1 agreement", description=__doc__
    )
    parser.add_argument("reference", help="workspace or checkpoint that the others are held against")
    parser.add_argument(
        "candidates", nargs="*", metavar="[LABEL=]CANDIDATE[@P]",
        help="workspaces or checkpoints, one perhaps with a quant_policy: ./workspace@8",
    )  # fmt: skip
    parser.add_argument("--data", required=True, metavar="FILE", help="held-out .txt, .jsonl or ShareGPT's .json")
    parser.add_argument(
        "--quant-policy", metavar="P,P...", help="measure each candidate without @P under each of 0, 4, 8; without "
        "candidates the reference (default: as each workspace says)",
    )  # fmt: skip
    parser.add_argument("--texts", type=int, default=NUM_TEXTS, help="how many (default %(default)s)")
    parser.add_argument("--max-len", type=int, default=MAX_LEN, help="tokens of a text (default %(default)s)")
    parser.add_argument(
        "--via", choices=WAYS, default=WAYS[0],
        help="decode: token by token, as answers are generated; prefill: in chunks, as prompts are computed "
        "(default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--together", type=int, default=0, help="candidates loaded at once (default: what fits)")
    add_engine_options(parser, one_quant_policy=False)
    add_output_options(parser, plots=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write files. Raises ConfigError for a wrong option or a candidate that does not fit."""
    import torch

    from tritonmind.chat_template import load_chat_template
    from tritonmind.model_source import open_model
    from tritonmind.tokenizer import Tokenizer
    from tritonmind_tools.bench.shapes import shape_name

    for name, least in (("texts", 1), ("max_len", MIN_TOKENS)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} must be at least {least}")
    candidates = _candidates(args)
    report = Report.from_args(args)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    reference = open_model(args.reference, dtype=args.dtype)
    tokenizer = Tokenizer.from_dir(reference.tokenizer_dir)
    template = load_chat_template(reference.tokenizer_dir, tokenizer.special_tokens)
    texts = read_texts(Path(args.data), tokenizer, template, num_texts=args.texts, max_len=args.max_len)
    sources = [open_model(candidate.path, dtype=args.dtype) for candidate in candidates]
    for candidate, source in zip(candidates, sources, strict=True):
        _check_same_tokens(candidate, source, reference, tokenizer, texts[0])
    num_tokens = sum(len(text) - 1 for text in texts)
    how = {"decode": "token by token, out of the cache", "prefill": "in chunks of prompts"}[args.via]
    report.notes["text"] = f"{args.data}: {len(texts)} texts, {num_tokens} tokens predicted, {how}"
    with torch.inference_mode():
        measured = _measure(args, reference, list(zip(candidates, sources, strict=True)), texts)
    shape = shape_name(reference.model)
    rows = make_rows(measured, shape=shape, num_texts=len(texts), num_tokens=num_tokens, way=args.via)
    print_rows(rows)
    report.print_facts()
    report.write([asdict(row) for row in rows], candidates=[as_entry(one) for one in measured])
    return 0


def _candidates(args: argparse.Namespace) -> list[Candidate]:
    """As the command line names them, each with each quant_policy. Raises ConfigError for one that is none."""
    policies: list[int | None] = [None]
    if args.quant_policy is not None:
        if not set(args.quant_policy.split(",")) <= POLICIES:
            raise ConfigError(f"--quant-policy={args.quant_policy!r}: known are 0 (16 bit), 4 and 8 (int8)")
        policies = [int(text) for text in args.quant_policy.split(",")]
    candidates = []
    for text in args.candidates or [args.reference] * (args.quant_policy is not None):
        label, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            label, path = "", text
        before, at, policy = path.rpartition("@")
        own = at and policy in POLICIES and not Path(path).exists()
        path = before if own else path
        candidates += [
            Candidate(label or Path(path).name, path, chosen) for chosen in ([int(policy)] if own else policies)
        ]
    return candidates


def _check_same_tokens(
    candidate: Candidate, source: ModelSource, reference: ModelSource, tokenizer: Tokenizer, ids: list[int]
) -> None:
    """Distributions over different tokens cannot be compared. Raises ConfigError naming the candidate."""
    from tritonmind.tokenizer import Tokenizer

    sizes = source.model.vocab_size, reference.model.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{candidate.path}: vocab_size={sizes[0]}, but the reference has {sizes[1]}")
    theirs = Tokenizer.from_dir(source.tokenizer_dir)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if theirs.encode(text, add_special_tokens=False) != tokenizer.encode(text, add_special_tokens=False):
        raise ConfigError(f"{candidate.path}: its tokenizer is not the reference's; compare models of one family")


def _measure(
    args: argparse.Namespace,
    reference: ModelSource,
    candidates: list[tuple[Candidate, ModelSource]],
    texts: Sequence[Sequence[int]],
) -> list[Measured]:
    """The reference first, then the candidates in their order, as many at a time as fit beside it."""
    from tritonmind.engine.device import free_bytes, resolve_device, weight_bytes
    from tritonmind_tools.bench.accuracy_scores import summarise

    options = engine_overrides(args)
    device = resolve_device(str(options.get("device", "auto")))
    layout = Layout.of(texts, args.via, device)

    def load(candidate: Candidate, source: ModelSource) -> ForcedModel:
        policy = candidate.quant_policy
        progress.begin(candidate.label + ("" if policy is None else f", quant_policy {policy}"))
        chosen = {} if policy is None else {"quant_policy": policy}
        return ForcedModel(source, layout, {**options, **chosen}, name=candidate.label)

    measured: list[Measured] = []
    with Progress(1 + len(candidates)) as progress:
        first = Candidate(REFERENCE, args.reference, 0)
        model = load(first, reference)
        its_bytes = (
            weight_bytes(model.runner.config, model.runner.dtype, model.runner.device)
            + model.runner.memory_plan.cache_bytes
        )
        at_once = max(1, args.together or int(free_bytes(device) / (MEMORY_FACTOR * its_bytes)))
        for begin in range(0, max(1, len(candidates)), at_once):
            batch = candidates[begin : begin + at_once]
            models = [model, *(load(candidate, source) for candidate, source in batch)]
            scores = _read(models, texts, layout, args.via)
            facts = [_facts(one) for one in models]
            del models  # the next ones need their memory
            gc.collect()
            for candidate, its_scores, its_facts in zip(
                [first, *(candidate for candidate, _ in batch)], scores, facts, strict=True
            ):
                if candidate is not first or not measured:
                    measured.append(Measured(candidate, summarise(scores[0], its_scores), *its_facts))
    return measured


def _read(models: Sequence[ForcedModel], texts: Sequence[Sequence[int]], layout: Layout, way: Way) -> list[TokenScores]:
    """What each scores, the reference first, whose divergence from itself is 0."""
    import torch

    from tritonmind_tools.bench.accuracy_scores import TokenScores, score

    parts: list[list[TokenScores]] = [[] for _ in models]
    for step in steps(texts, layout, way, models[0].runner.device):
        hidden = [model.hidden_states(step) for model in models]
        for rows in torch.arange(len(step.targets), dtype=torch.int32).split(LOGITS_ROWS):
            on_device = rows.to(step.targets.device)
            targets, numbers = step.targets[on_device], step.texts[rows]
            expected: torch.Tensor | None = None
            for model, states, scores in zip(models, hidden, parts, strict=True):
                logits = model.logits(states, on_device)
                expected = logits if expected is None else expected
                scores.append(score(expected, logits, targets, numbers, name=model.name))
    return [TokenScores.joined(scores) for scores in parts]


def _facts(model: ForcedModel) -> tuple[str, str, int]:
    """What the rows of results call its precision, its weights, and how its K and V are stored."""
    config = model.runner.config
    policy = int(config.cache.quant_policy)
    quantised = config.model.weight_type == "int4"
    weights = f"int4 g{config.model.group_size}" if quantised else precision(config.model, model.dtype)
    return precision(config.model, model.dtype, policy), weights, policy
