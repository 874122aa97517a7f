"""`tritonmind bench memory`: what it starts, what it reads off the card, what it refuses."""

from __future__ import annotations

import functools
import itertools
import json
import time
from pathlib import Path

import pytest
import torch

from tritonmind.engine import launch
from tritonmind.errors import ConfigError
from tritonmind.model_source import open_model
from tritonmind_tools.bench import memory
from tritonmind_tools.bench.memory import ANSWER, MIB, Case, MemoryWatch, measure
from tritonmind_tools.cli import build_parser, main


def args_of(*arguments: str) -> memory.argparse.Namespace:
    return build_parser().parse_args(["bench", "memory", *arguments])


def test_an_engine_holds_whole_sessions_and_its_row_says_where_the_memory_went(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and on a card that loses 100 MiB while the engine starts and 70 MiB more while it runs."""
    started: list[dict[str, object]] = []

    def start(path: str, overrides: dict[str, object]) -> object:
        started.append(overrides)
        lost[0] = 100 * MIB
        wait_for_peak(100 * MIB)
        client = launch_engine(path, overrides, in_process=True)
        run_round = client.submit_all

        def submit_all(*arguments: object) -> None:
            lost[0] = 170 * MIB
            wait_for_peak(170 * MIB)
            run_round(*arguments)  # type: ignore[arg-type]
            lost[0] = 150 * MIB

        monkeypatch.setattr(client, "submit_all", submit_all)
        return client

    def wait_for_peak(num_bytes: int) -> None:
        while watches[-1].peak < num_bytes:
            time.sleep(0.002)

    lost, watches = [0], []
    launch_engine = launch.start_engine
    monkeypatch.setattr(launch, "start_engine", start)
    monkeypatch.setattr(memory, "RELEASE_SECONDS", 0.1)
    monkeypatch.setattr(memory, "MemoryWatch", lambda free: watches.append(MemoryWatch(free)) or watches[-1])
    args = args_of("--shape", "tiny", "--dtype", "fp32", "--num-threads", "1")
    case = Case("random:tiny", batch_size=3, context=100, quant_policy=8)
    row = measure(case, args, lambda: 1000 * MIB - lost[0])
    assert started[0]["max_num_seqs"] == 3 and started[0]["cache_max_entry_count"] == 6  # two blocks a session
    assert (row.value, row.loading, row.unit) == (170, 100, "MiB")
    # Bytes and fp32 scales of K and V, 2 layers and 2 heads of 16 channels, 6 blocks of 64 tokens.
    assert row.kv_cache * MIB == 2 * 2 * 2 * 6 * 64 * (16 + 4)
    assert row.weights > 0 and row.steps > 0
    assert row.other == pytest.approx(170 - row.weights - row.kv_cache - row.steps)
    assert row.weight_bytes_each == 4
    assert (row.workload, row.shape, row.precision) == ("memory_batch3_context100", "tiny", "fp32+kv8")


def test_four_bit_weights_take_little_more_than_half_a_byte() -> None:
    for name in ("llama2-7b", "llama2-13b", "llama3-8b"):
        model = open_model(f"random:{name}:int4").model
        # 4 bits, and a 16-bit scale with a 16-bit zero for each group of 128; rows and columns are whole tiles.
        assert memory.bytes_of_a_weight(model, "float16", "cuda") == pytest.approx(0.5 + 4 / 128)


def test_the_watch_keeps_the_most_that_was_missing() -> None:
    free = itertools.chain([100 * MIB, 90 * MIB, 20 * MIB, 60 * MIB], itertools.repeat(95 * MIB))
    with MemoryWatch(functools.partial(next, free)) as watch:
        while watch.peak < 80 * MIB:
            time.sleep(0.002)
        watch.wait_released()
    assert watch.peak == 80 * MIB


def test_all_combinations_are_measured_and_wrong_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--weights", "16,4", "--batch-sizes", "1,8", "--contexts", "64,128", "--quant-policy", "0,8"]
    found = memory.cases(args_of("dir/workspace", "--shape", "tiny,llama-150m", *both))
    assert len(found) == len(set(found)) == 5 * 2 * 2 * 2
    assert {case.model for case in found} == {
        "dir/workspace",
        "random:tiny",
        "random:tiny:int4",
        "random:llama-150m",
        "random:llama-150m:int4",
    }
    for arguments, message in (
        ([], "give workspaces"),
        (["--shape", "llama-9"], "'llama-9' is none of"),
        (["--shape", "tiny", "--weights", "8"], "--weights='8'"),
        (["--shape", "tiny", "--quant-policy", "2"], "--quant-policy='2'"),
        (["--shape", "tiny", "--contexts", str(ANSWER)], "--contexts='16'"),
    ):
        with pytest.raises(ConfigError, match=message):
            memory.cases(args_of(*arguments))
    if not torch.cuda.is_available():
        assert main(["bench", "memory", "--shape", "tiny"]) == 1
        assert "and there is none" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_card_has_that_much_less_free(tmp_path: Path) -> None:
    arguments = ["--shape", "llama-150m", "--batch-sizes", "8,16", "--contexts", "2048", "--quant-policy", "0,8"]
    assert main(["bench", "memory", *arguments, "--json", str(tmp_path / "memory.json")]) == 0
    few, few_int8, many, many_int8 = json.loads((tmp_path / "memory.json").read_text())["rows"]
    for row in (few, few_int8, many, many_int8):
        assert row["weights"] + row["kv_cache"] <= row["value"] <= row["weights"] + row["kv_cache"] + 3000
    # 16 KiB a token in 16 bits; in 8 bits half of it, and a scale for each 64 channels.
    assert many["value"] - few["value"] == pytest.approx(8 * 2048 * 16 / 1024, rel=0.2)
    assert many_int8["kv_cache"] == pytest.approx(many["kv_cache"] * (64 + 4) / 128)
    assert many["value"] - many_int8["value"] == pytest.approx(many["kv_cache"] - many_int8["kv_cache"], abs=200)
