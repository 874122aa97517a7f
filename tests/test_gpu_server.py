"""The real Triton server on a card under load: 64 gRPC streams of mixed requests, one in eight given up on the way.

TRITONMIND_SOAK_SECONDS says how long (20). TRITONMIND_GPU_WORKSPACE names a workspace to serve; else a random Llama of
150 M parameters is made, and its greedy answers are held against Transformers.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch

from tests.server_fixture import assert_accounts, running
from tests.soak_client import FIRST_PLAIN_TOKEN_ID, Outcome, Plan, Probe
from tests.workspaces import convert
from tritonmind.workspace import Workspace
from tritonmind_tools.triton_client import TritonClient

SOAK_SECONDS = float(os.environ.get("TRITONMIND_SOAK_SECONDS", "20"))
GIVEN_WORKSPACE = os.environ.get("TRITONMIND_GPU_WORKSPACE")
NUM_PROCESSES, STREAMS_EACH = 4, 16  # a Python process takes a few thousand responses a second
NUM_PROBES, PROBE_PROMPT, PROBE_TOKENS = 8, 300, 64
# The logits of the random model spread over about 2; fp16 moves one by hundredths.
LOGIT_TOLERANCE = 0.1
# Of the probes, how many may not begin as they do alone: batches of other sizes round otherwise, near ties fall apart.
MAX_OTHER_BEGINNINGS = 0.2

pytestmark = [pytest.mark.gpu, pytest.mark.server, pytest.mark.timeout(600 + 2 * int(SOAK_SECONDS))]


class Soak(NamedTuple):
    """What came of it, the server being stopped again. checkpoint: of the random model, None when one was given."""

    outcomes: list[Outcome]
    probes: list[Probe]
    alone: list[list[int]]
    log_path: Path
    checkpoint: Path | None


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    directory = tmp_path_factory.mktemp("soak")
    checkpoint, workspace = None, Path(GIVEN_WORKSPACE or directory / "workspace")
    if not GIVEN_WORKSPACE:
        # Imported here, where a card is: it takes a moment and makes its weights there.
        from tritonmind_tools.bench import random_checkpoint

        checkpoint = directory / "checkpoint"
        random_checkpoint.write("llama-150m", checkpoint)
        convert(checkpoint, workspace, model_name="llama2")
    vocab_size = Workspace.open(workspace).model.vocab_size
    probes = [
        Probe(number, random.choices(range(FIRST_PLAIN_TOKEN_ID, vocab_size), k=PROBE_PROMPT), PROBE_TOKENS)
        for number in range(NUM_PROBES)
    ]
    with running(workspace) as server:
        alone = [answer_alone(server.address, probe) for probe in probes]
        outcomes = load(server.address, vocab_size, probes)
    yield Soak(outcomes, probes, alone, server.log_path, checkpoint)


def answer_alone(address: str, probe: Probe) -> list[int]:
    options = {"temperature": 0, "ignore_eos": True, "max_tokens": probe.num_tokens}
    with TritonClient(address) as client:
        (answer,) = client.generate(input_ids=probe.prompt, stream=False, options=options)
    return answer.token_ids


def load(address: str, vocab_size: int, probes: list[Probe], seconds: float = SOAK_SECONDS) -> list[Outcome]:
    """All requests of all processes; a failed process fails the test with its errors."""
    processes = []
    for _ in range(NUM_PROCESSES):
        plan = Plan(address, STREAMS_EACH, seconds, random.randrange(2**31), vocab_size, probes)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak_client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(plan))
        process.stdin.close()
        processes.append(process)
    outcomes: list[Outcome] = []
    for process in processes:
        assert process.stdout is not None
        written = process.stdout.read()
        assert process.wait() == 0, "a client process failed, see its errors"
        outcomes += msgspec.json.decode(written, type=list[Outcome])
    return outcomes


def test_every_request_ends_as_it_was_asked_to(soak: Soak) -> None:
    kept = [outcome for outcome in soak.outcomes if not outcome.cancelled]
    cancelled = len(soak.outcomes) - len(kept)
    first_tokens = sorted(outcome.first_token for outcome in kept)
    num_tokens = sum(len(outcome.token_ids) for outcome in soak.outcomes)
    percentiles = statistics.quantiles(first_tokens, n=100)
    print(
        f"\n{len(soak.outcomes)} requests, {cancelled} cancelled, {num_tokens} tokens, "
        f"{num_tokens / SOAK_SECONDS:.0f} tok/s, time to first token p50 {percentiles[49] * 1e3:.0f} ms, "
        f"p99 {percentiles[98] * 1e3:.0f} ms"
    )
    assert cancelled > len(soak.outcomes) / 40
    for outcome in soak.outcomes:
        assert not outcome.error
        assert outcome.num_finals == (not outcome.cancelled)
        assert len(outcome.token_ids) <= outcome.num_asked
    for outcome in kept:
        assert (len(outcome.token_ids), outcome.finish_reason) == (outcome.num_asked, "length")


def test_the_servers_accounts_are_even(soak: Soak) -> None:
    assert_accounts(soak.log_path)
    accepted = re.search(r"requests accepted: (\d+)", soak.log_path.read_text())
    assert accepted
    # A request that is given up at once may not have reached the server.
    sent = NUM_PROBES + len(soak.outcomes)
    at_least = sent - sum(outcome.cancelled and not outcome.token_ids for outcome in soak.outcomes)
    assert at_least <= int(accepted[1]) <= sent


def test_probes_begin_in_the_load_as_alone(soak: Soak) -> None:
    answered = [outcome for outcome in soak.outcomes if outcome.probe is not None]
    assert len(answered) >= NUM_PROBES
    others = [outcome for outcome in answered if outcome.token_ids[0] != soak.alone[outcome.probe][0]]
    assert len(others) <= MAX_OTHER_BEGINNINGS * len(answered)


@pytest.mark.skipif(GIVEN_WORKSPACE is not None, reason="the checkpoint of TRITONMIND_GPU_WORKSPACE is not known")
def test_each_token_of_a_probe_in_the_load_is_the_references_choice(soak: Soak) -> None:
    """In fp32 over the same tokens, so that a near tie which rounding decided does not count for what came after it."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = AutoModelForCausalLM.from_pretrained(soak.checkpoint, dtype=torch.float32).eval().to(device)
    for probe in soak.probes:
        answers = {tuple(outcome.token_ids) for outcome in soak.outcomes if outcome.probe == probe.number}
        for token_ids in {*answers, tuple(soak.alone[probe.number])}:
            with torch.inference_mode():
                logits = reference(torch.tensor([[*probe.prompt, *token_ids]], device=device)).logits[0]
            logits = logits[len(probe.prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(token_ids, device=device).unsqueeze(1)).squeeze(1)
            assert (logits.max(dim=1).values - chosen).max() < LOGIT_TOLERANCE
