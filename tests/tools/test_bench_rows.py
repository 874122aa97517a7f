"""From arrivals to rows, from recorded files to ratios and plots: known answers, no engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.model_configs import LLAMA_2_7B

from tritonmind.errors import ConfigError, UnavailableError
from tritonmind.messages import TokenOutput
from tritonmind_tools.bench import grid
from tritonmind_tools.bench.grid import Facts, Workload, make_row
from tritonmind_tools.bench.plot import _figure, _offered_load, newest_rows
from tritonmind_tools.bench.recorded import OUR_ENGINE, last_recorded, ratios, read_results
from tritonmind_tools.bench.roofline import decode_bytes, prefill_flops, step_bytes
from tritonmind_tools.bench.rounds import Round, random_prompts, run_round
from tritonmind_tools.bench.shapes import SHAPES
from tritonmind_tools.bench.workloads import read_workload
from tritonmind_tools.cli import main

FACTS = Facts(LLAMA_2_7B, "float16", bandwidth=3e12, flops=7e14, max_batch=2)


def round_of(lengths: list[tuple[int, int]], arrivals: list[list[float]], **more: Any) -> Round:
    return Round(lengths, arrivals, [[5] * len(times) for times in arrivals], max(t[-1] for t in arrivals), **more)


def test_steady_steps_begin_when_all_decode_and_end_with_the_first() -> None:
    """The second request's prompt takes two steps of 1 s; then steps of 0.1 s, of which the first one has five."""
    first = [1.0, 2.0, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5]
    second = [3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 4.5, 5.5]
    steady = round_of([(10, 8), (20, 8)], [first, second]).steady()
    assert steady is not None
    assert steady.step_time == pytest.approx(0.1)
    assert steady.num_steps == 5
    # At 3.0 s the first has 10 + 3 tokens, the second 20 + 1: the steps read a mean of 17, 18, 19, 20, 21.
    assert steady.context == pytest.approx(19)


def test_a_row_of_rounds() -> None:
    workload = grid.batch(2, 10, 3)
    rounds = [
        round_of(list(workload.lengths), [[1.0 * k, 2.0 * k, 3.0 * k], [1.0 * k, 2.0 * k, 3.0 * k]], step_cpu=k / 1000)
        for k in (1, 2, 4)
    ]
    row = make_row(workload, rounds, FACTS)
    assert (row.workload, row.shape, row.precision, row.unit) == ("batch2_10_3", "llama2-7b", "fp16", "tok/s")
    assert row.value == pytest.approx(6 / 6.0) and row.wall == 6.0
    assert row.step_time == pytest.approx(2.0) and row.steady_steps == 2
    assert row.context == pytest.approx(11.5)
    assert row.roofline_fraction == pytest.approx(step_bytes(LLAMA_2_7B, 2, 2, 11.5) / 3e12 / 2.0)
    assert row.time_to_first_token == 2.0 and row.inter_token_p99 == pytest.approx(2.0)
    assert row.step_cpu == 0.002
    assert row.spread == pytest.approx((2.0 - 0.5) / 1.0)


@pytest.mark.parametrize(("policy", "token_kib", "name"), [(8, 264, "fp16+kv8"), (4, 256, "fp16+kv4")])
def test_int8_kv_is_in_precision_and_roofline(policy: int, token_kib: int, name: str) -> None:
    facts = FACTS._replace(quant_policy=policy)
    workload = grid.batch(2, 10, 3)
    row = make_row(workload, [round_of(list(workload.lengths), [[1.0, 2.0, 3.0]] * 2)], facts)
    num_bytes = step_bytes(LLAMA_2_7B, 2, 2, 0) + 2 * 11.5 * token_kib * 1024
    assert row.precision == name and row.roofline_fraction == pytest.approx(num_bytes / 3e12 / 1.0)
    mixed = Workload("mine", "requests", [(10, 5)])
    rounds = [round_of(list(mixed.lengths), [[1.0, 2.0, 3.0, 4.0, 5.0]])]
    num_bytes = 4 * step_bytes(LLAMA_2_7B, 2, 1, 0) + 4 * 12.5 * token_kib * 1024
    compute = prefill_flops(LLAMA_2_7B, [10]) / 7e14
    assert make_row(mixed, rounds, facts).roofline_fraction == pytest.approx((compute + num_bytes / 3e12) / 5.0)


def test_what_prefills_and_lists_of_requests_are_held_against() -> None:
    prefill = grid.batch(2, 1000, 1)
    row = make_row(prefill, [round_of(list(prefill.lengths), [[0.5], [1.0]])], FACTS)
    assert (row.workload, row.value) == ("prefill_2x1000", 2000)
    # Per prompt: 6.476 G weights of layers twice a token, a triangle of 4 * 4096 a layer, 0.131 G of the head twice.
    flops = 2 * (2 * 1000 * 6.476e9 + 32 * 4 * 4096 * 1000 * 1001 / 2 + 2 * 0.131e9)
    assert prefill_flops(LLAMA_2_7B, [1000, 1000]) == pytest.approx(flops, rel=1e-3)
    assert row.roofline_fraction == pytest.approx(flops / 7e14 / 1.0, rel=1e-3)
    assert row.inter_token_p50 is None

    mixed = Workload("mine", "requests", [(10, 5), (20, 3), (30, 1)])
    row = make_row(mixed, [round_of(list(mixed.lengths), [[1, 2, 3, 4, 5], [1, 2, 3], [2.5]])], FACTS)
    assert (row.value, row.unit, row.batch_size) == (3 / 5, "req/s", 0)
    # Two at once: 6 tokens after the first ones, but the longest answer alone needs 4 steps. K and V of each token:
    # 11 to 14 and 21 to 22 tokens.
    kv = (11 + 12 + 13 + 14 + 21 + 22) * 512 * 1024
    num_bytes = 4 * step_bytes(LLAMA_2_7B, 2, 1, 0) + kv
    assert decode_bytes(LLAMA_2_7B, 2, mixed.lengths, 2) == pytest.approx(num_bytes)
    seconds = prefill_flops(LLAMA_2_7B, [10, 20, 30]) / 7e14 + num_bytes / 3e12
    assert row.roofline_fraction == pytest.approx(seconds / 5)


def test_a_full_batch_takes_more_steps_than_its_longest_answer() -> None:
    lengths = [(1, 3)] * 8
    assert decode_bytes(LLAMA_2_7B, 2, lengths, 2) == pytest.approx(
        8 * step_bytes(LLAMA_2_7B, 2, 1, 0) + 8 * (2 + 3) * 512 * 1024
    )


def test_prompts_differ_between_rounds_and_are_the_same_again() -> None:
    first, again, other = (random_prompts(LLAMA_2_7B, [50, 70], seed) for seed in ("a 1", "a 1", "a 2"))
    assert [len(prompt) for prompt in first] == [50, 70]
    assert first == again != other
    assert all(3 <= token_id < 32000 for prompt in other for token_id in prompt)
    assert all(type(token_id) is int for token_id in other[0])


def test_a_failing_engine_ends_the_round() -> None:
    def submit_all(requests: Any, on_output: Any) -> None:
        for request in requests:
            on_output(
                TokenOutput(request_id=request.request_id, token_ids=[], finish_reason="error", error="out of luck")
            )

    stats = SimpleNamespace(num_steps=0, step_cpu_s=0.0)
    client: Any = SimpleNamespace(next_request_id=lambda count: 0, stats=lambda: stats, submit_all=submit_all)
    with pytest.raises(UnavailableError, match="failed during the measurement: out of luck"):
        run_round(client, LLAMA_2_7B, [(3, 3), (3, 3)], seed="")


def results(card: str, date: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"card": card, "date": date, "commit": "abc", "rows": list(rows)}


def row(workload: str, value: float, **more: Any) -> dict[str, Any]:
    return {"workload": workload, "shape": "tiny", "precision": "fp16", "unit": "tok/s", "value": value, **more}


def test_the_last_record_is_the_newest_of_the_same_card_and_kind(tmp_path: Path) -> None:
    files = {
        "1.json": results("A", "2026-02-01T00:00:00+00:00", row("x", 30.0), row("x", 99.0, precision="fp16+kv8")),
        "2.json": results("A", "2026-01-01T00:00:00+00:00", row("x", 20.0), row("y", 10.0)),
        "3.json": results("B", "2026-03-01T00:00:00+00:00", row("x", 1.0)),
        "4.json": results("A", "2026-03-01T00:00:00+00:00", row("x", 2.0, engine="Transformers generate")),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    recorded = last_recorded(tmp_path, "A")
    measured = [row("x", 33.0, engine="tritonmind"), row("y", 5.0), row("z", 5.0), row("x", 3.0, shape="llama2-7b")]
    assert ratios(measured, recorded) == [pytest.approx(1.1), 0.5, None, None]
    assert ratios(measured, last_recorded(tmp_path, "C")) == [None] * 4


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "Expecting property name"),
        ('{"card": "A", "rows": []}', "'date' is missing"),
        ('{"card": "A", "date": "yesterday", "rows": []}', "yesterday"),
        ('{"card": "A", "date": "2026-01-01T00:00:00+00:00", "rows": [{"workload": "x"}]}', "'value' is missing"),
    ],
)
def test_a_file_that_holds_no_results_is_named(
    tmp_path: Path, content: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ConfigError, match="holds no results"):
        last_recorded(tmp_path, "A")
    assert main(["bench", "plot", str(tmp_path / "bad.json"), "--plot", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "bad.json" in error and named in error


def test_plots_of_what_results_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = {"requests_per_second": 4.0, "time_to_first_token_p50": 0.1, "time_to_first_token_p99": 0.5}
    contents = {
        "load.json": [row(f"server_sharegpt3000_rate{rate}", 100.0, **served) for rate in ("2", "4.5")],
        "rows.json": [row("batch1_1_512", 170.0, roofline_fraction=0.9)],
        "theirs.json": [row("batch1_1_512", 150.0, engine="another"), row("mix1000", 30.0, engine="another")],
        "steps.json": [
            row(f"decode_batch{size}_context256", 9.0, step_time=0.005 * size, roofline_fraction=0.8)
            for size in (1, 2, 256)
        ],
    }
    for name, rows in contents.items():
        (tmp_path / name).write_text(json.dumps(results("A", "2026-01-01T00:00:00+00:00", *rows)))
    files = [str(tmp_path / name) for name in contents]
    assert main(["bench", "plot", *files, "--plot", str(tmp_path / "plots")]) == 0
    drawn = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.name for path in drawn] == [
        "step_time_by_batch.png", "roofline.png", "engines.png", "offered_load.png"
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    (tmp_path / "none.json").write_text(json.dumps(results("A", "2026-01-01T00:00:00+00:00", row("x", 1, unit="us"))))
    assert main(["bench", "plot", str(tmp_path / "none.json"), "--plot", str(tmp_path)]) == 1
    assert "no rows of static, throughput or serving" in capsys.readouterr().err


def test_plots_without_matplotlib_are_refused_before_the_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "static", "--shape", "tiny", "--plot", "plots"]) == 1
    assert "--plot needs matplotlib: pip install 'tritonmind[bench]'" in capsys.readouterr().err


def test_the_newest_of_equal_rows_is_drawn() -> None:
    old = results("A", "2026-01-01T00:00:00+00:00", row("x", 1.0), row("y", 2.0))
    new = results("A", "2026-01-02T00:00:00+00:00", row("x", 3.0))
    for order in ([old, new], [new, old]):
        assert {drawn["workload"]: drawn["value"] for drawn in newest_rows(order)} == {"x": 3.0, "y": 2.0}


def test_a_line_of_offered_load_is_of_one_run() -> None:
    times = {"time_to_first_token_p50": 0.1, "time_to_first_token_p99": 0.5}
    runs = [
        results("A", f"2026-01-0{day}T00:00:00+00:00", *(row(f"mix_rate{rate}", 1.0, **times) for rate in rates))
        for day, rates in ((1, (1, 3)), (2, (2, 4)))
    ]
    drawn = _offered_load(newest_rows(runs[::-1]), _figure())
    assert [found["workload"] for found in drawn] == ["mix_rate2", "mix_rate4"]


def test_lengths_of_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("\ufeffuser, output_tokens, prompt_tokens\r\na, 4, 3\r\nb, 6, 5\r\n", newline="")
    assert read_workload(str(path)) == [(3, 4), (5, 6)]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no column prompt_tokens, output_tokens"),
        (b"prompt_tokens,output_tokens\n", "names no requests"),
        (b"prompt_tokens,tokens\n3,4\n", "no column output_tokens"),
        (b"prompt_tokens,output_tokens\n3,4\n0,4\n", "line 3: .* must be two positive whole numbers"),
        (b"prompt_tokens,output_tokens\n3\n", "line 2: .* must be two positive whole numbers"),
        (b"prompt_tokens,output_tokens\n3,4,5\n", "line 2: more values than"),
        (b"\xc5\x00\x01", "no CSV file in UTF-8"),
    ],
)
def test_a_wrong_csv_file_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"mine\.csv.* {named}"):
        read_workload(str(path))


SHAREGPT = [
    {"conversations": [{"from": "human", "value": "a " * 10}, {"from": "gpt", "value": "b " * 20}, {"value": "c"}]},
    {"conversations": [{"from": "human", "value": "too short"}, {"from": "gpt", "value": "b " * 20}]},
    {"conversations": [{"from": "human", "value": "a " * 1025}, {"from": "gpt", "value": "b " * 20}]},
    {"conversations": [{"from": "human", "value": "a " * 1024}, {"from": "gpt", "value": "b " * 1025}]},
    {"conversations": [{"from": "human", "value": "alone"}]},
    {"id": "no conversation"},
    {"conversations": [{"from": "human", "value": "a " * 1024}, {"from": "gpt", "value": "b " * 1024}]},
]


def count_words(text: str) -> int:
    return len(text.split())


def test_sharegpt_is_read_by_the_rule(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(SHAREGPT))
    assert read_workload(str(path), count_words) == [(10, 20), (1024, 1024)]
    with pytest.raises(ConfigError, match="--tokenizer DIR"):
        read_workload(str(path))
    path.write_text(json.dumps(SHAREGPT[1:3]))
    with pytest.raises(ConfigError, match="none of 2 entries"):
        read_workload(str(path), count_words)
    path.write_text("no json")
    with pytest.raises(ConfigError, match="none of 0 entries"):
        read_workload(str(path), count_words)


def test_a_cut_off_sharegpt_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(SHAREGPT)[:-3000])
    assert read_workload(str(path), count_words) == [(10, 20)]
    assert "is cut off" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ijson", None)
    with pytest.raises(ConfigError, match=r"no whole JSON .*pip install ijson"):
        read_workload(str(path), count_words)
    path.write_text(json.dumps(SHAREGPT))
    assert read_workload(str(path), count_words) == [(10, 20), (1024, 1024)]
    path.write_text("{}")
    with pytest.raises(ConfigError, match="no JSON array"):
        read_workload(str(path), count_words)


def test_shipped_workloads() -> None:
    assert len(read_workload("mix1000")) == 1000
    assert grid.requests("mix1000", 250).name == "mix1000_first250"
    assert grid.requests("sharegpt3000").name == "sharegpt3000"
    assert grid.requests("sharegpt3000").max_len <= 2048


def test_the_peers_rows_have_the_names_of_the_targets() -> None:
    assert [workload.name for workload in grid.peers()] == [
        "batch1_1_512", "batch1_2048_128", "batch8_128_256", "batch32_128_512", "batch64_128_512",
        "batch128_128_256", "batch256_128_256", "prefill_64x1024", "mix1000_first250",
    ]  # fmt: skip


def test_the_peers_of_the_h100_are_results_of_known_workloads() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "peers_h100.json"
    names = {workload.name for workload in grid.peers()} | {"mix1000"}
    found: dict[tuple[str, str], set[str]] = {}
    for peer in read_results(path)["rows"]:
        assert peer["shape"] in SHAPES and peer["engine"] != OUR_ENGINE
        found.setdefault((peer["engine"], peer["precision"]), set()).add(peer["workload"])
    for key, workloads in found.items():
        assert workloads == names - {"mix1000_first250"} or key[0] == "Transformers generate"
