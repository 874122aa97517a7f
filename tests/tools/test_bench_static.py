"""`bench static`, `throughput` and `compare`: what they run, what they write, and what they refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tests.tools.test_bench import assert_facts

from tritonmind_tools.bench import grid, machine
from tritonmind_tools.bench.random_checkpoint import write
from tritonmind_tools.cli import build_parser, main

MODEL = ["--shape", "tiny", "--num-threads", "1"]
CACHE = ["--engine-options", "cache_max_entry_count=64"]
ROW = {"shape": "tiny", "precision": "fp32"}


def bench(kind: str, *options: str) -> int:
    return main(["bench", kind, *MODEL, *options, *CACHE])


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    results = json.loads(path.read_text())
    assert_facts(results)
    return {row["workload"]: row for row in results["rows"]}


def test_sweeps_measure_steady_steps_and_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine for both sweeps, each pair once; what the cache cannot hold is left out by name."""
    monkeypatch.setattr(grid, "SWEEP_CONTEXTS", (128, 512))
    monkeypatch.setattr(grid, "CONTEXT_BATCHES", (1, 8))
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc1234")
    monkeypatch.setattr(machine, "_output", lambda *command: "")
    options = ["--sweep", "batch", "--sweep", "context", "--batch-sizes", "1,3", "--input-len", "128"]
    table, plots = tmp_path / "rows.csv", tmp_path / "plots"
    outputs = ["--record", "--results", str(tmp_path), "--csv", str(table), "--plot", str(plots)]
    assert bench("static", *options, *outputs) == 0
    (recorded,) = tmp_path.glob("*.json")
    results = json.loads(recorded.read_text())
    assert recorded.name == f"{results['date'][:16].replace('-', '').replace(':', '')}-abc1234.json"
    rows = rows_of(recorded)
    assert list(rows) == [
        f"decode_batch{batch}_context{context}" for batch, context in ((1, 128), (3, 128), (1, 512), (8, 128))
    ]
    assert results["notes"]["preemptions"] == "0"
    assert results["notes"]["left out"].startswith("decode_batch8_context512: ")
    for row in rows.values():
        # Fewer than STEADY_STEPS on a machine so busy that requests take long to arrive, never none.
        assert 2 <= row["steady_steps"] < row["output_len"]
        assert row["input_len"] < row["context"] < row["input_len"] + row["output_len"]
        assert row["value"] == pytest.approx(row["batch_size"] / row["step_time"])
        assert row["step_cpu"] > 0 and row["roofline_fraction"] > 0
    with table.open() as file:
        written = list(csv.DictReader(file))
    assert [row["workload"] for row in written] == list(rows)
    assert [float(row["value"]) for row in written] == [row["value"] for row in rows.values()]
    assert {path.name for path in plots.iterdir()} == {"step_time_by_batch.png", "step_time_by_context.png"}


def test_a_sweep_that_does_not_fit_at_all_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("static", "--sweep", "batch", "--batch-sizes", "64", "--input-len", "100") == 1
    assert "none of decode_batch64_context100 fits the KV cache: " in capsys.readouterr().err


def record(folder: Path, name: str, date: str, values: dict[str, float], **more: Any) -> None:
    rows = [{"workload": key, **ROW, "value": value, "unit": "tok/s"} for key, value in values.items()]
    (folder / name).write_text(json.dumps({"card": machine.card(), "date": date, "rows": rows, **more}))


def test_quick_holds_each_row_against_its_last_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grid, "PEER_BATCHES", ((1, 1, 8), (3, 16, 8)))
    monkeypatch.setattr(grid, "PEER_PREFILL", (2, 32))
    monkeypatch.setattr(grid, "SHORT_MIX", 1)
    record(tmp_path, "z.json", "2026-01-01T00:00:00+00:00", {"batch1_1_8": 5.0, "batch3_16_8": 0.001})
    record(tmp_path, "a.json", "2026-02-01T00:00:00+00:00", {"batch1_1_8": 1e9, "prefill_2x32": 0.002})
    record(tmp_path, "b.json", "2026-03-01T00:00:00+00:00", {"batch1_1_8": 1.0}, card="another card")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    report = tmp_path.parent / "quick.json"
    assert bench("static", "--quick", "--fail-below", "0.9", "--results", str(tmp_path), "--json", str(report)) == 1
    rows = rows_of(report)
    assert list(rows) == ["batch1_1_8", "batch3_16_8", "prefill_2x32", "mix1000_first1"]
    expected = {"batch1_1_8": 1e9, "batch3_16_8": 0.001, "prefill_2x32": 0.002}
    for name, recorded in expected.items():
        assert rows[name]["ratio"] == pytest.approx(rows[name]["value"] / recorded)
    assert rows["mix1000_first1"]["ratio"] is None and rows["mix1000_first1"]["unit"] == "req/s"
    assert rows["prefill_2x32"]["value"] == pytest.approx(64 / rows["prefill_2x32"]["wall"])
    shown = capsys.readouterr().out
    assert "below 90.0% of the last recorded: batch1_1_8 0.0%\n" in shown
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files, "a quick run was recorded"


def test_throughput_of_a_csv_file(tmp_path: Path) -> None:
    """With its engine as the options have it: four at once, two blocks a step less than the cache would hold."""
    workload = tmp_path / "mine.csv"
    workload.write_text("prompt_tokens,output_tokens\n" + "20,6\n30,4\n40,9\n" * 4)
    report = tmp_path / "report.json"
    arguments = ["--workload", str(workload), "--limit", "7", "--max-batch", "4", "--json", str(report)]
    assert bench("throughput", *arguments, "--engine-options", "max_context_token_num=32") == 0
    (row,) = rows_of(report).values()
    assert (row["workload"], row["unit"], row["num_requests"]) == ("mine_first7", "req/s", 7)
    generated, prompts = 6 + 4 + 9 + 6 + 4 + 9 + 6, 20 + 30 + 40 + 20 + 30 + 40 + 20
    assert row["value"] == pytest.approx(7 / row["wall"])
    assert row["tokens_per_second"] == pytest.approx(generated / row["wall"])
    assert row["total_tokens_per_second"] == pytest.approx((generated + prompts) / row["wall"])
    assert 0 < row["time_to_first_token_p50"] < row["time_to_first_token_p99"] < row["latency_p99"] <= row["wall"]
    assert 0 < row["inter_token_p50"] < row["inter_token_p99"]
    notes = json.loads(report.read_text())["notes"]
    assert notes["prefix cache"] == f"0.0% of {2 * prompts} prompt tokens were found there"
    assert notes["workload"].endswith("4 at once")


@pytest.mark.parametrize("given", ["shape", "checkpoint"])
def test_compare_runs_the_same_requests_in_both(tmp_path: Path, given: str) -> None:
    """The same first tokens from the same weights: neither engine measures another model or other prompts."""
    model = MODEL
    if given == "checkpoint":
        write("tiny", tmp_path / "checkpoint")
        model = [str(tmp_path / "checkpoint"), "--num-threads", "1"]
    report = tmp_path / "report.json"
    sizes = ["--batch-sizes", "2,3", "--input-len", "9", "--output-len", "5", "--rounds", "1"]
    assert main(["bench", "compare", *model, *sizes, "--json", str(report), *CACHE]) == 0
    results = json.loads(report.read_text())
    assert results["notes"]["same first tokens"] == "5 of 5"
    rows = results["rows"]
    assert [(row["workload"], row["engine"]) for row in rows] == [
        (f"batch{size}_9_5", engine) for size in (2, 3) for engine in ("Transformers generate", "tritonmind")
    ]
    for theirs, ours in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert ours["ratio"] == pytest.approx(ours["value"] / theirs["value"])
        assert theirs["value"] == pytest.approx(theirs["batch_size"] * 5 / theirs["wall"])
        assert 0 < theirs["time_to_first_token"] < theirs["wall"] and theirs["step_time"] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["static"], "give either a workspace (or checkpoint) or --shape NAME"),
        (["throughput", "somewhere", "--shape", "tiny", "--workload", "mix1000"], "and not both"),
        (["static", "nowhere"], "nowhere does not exist"),
        (["static", "--shape", "tiny", "--rounds=0"], "--rounds='0'"),
        (["static", "--shape", "tiny", "--output-len=-1"], "--output-len='-1'"),
        (["static", "--shape", "tiny", "--grid", "peers", "--quick"], "--grid and --quick: give one"),
        (["static", "--shape", "tiny", "--quick", "--sweep", "batch"], "--quick and --sweep: give one"),
        (["static", "--shape", "tiny", "--grid", "peers", "--batch-sizes", "4"], "--batch-sizes=4: --grid has its own"),
        (["static", "--shape", "tiny", "--sweep", "batch", "--output-len", "4"], "--output-len=4: --sweep has its own"),
        (["static", "--shape", "tiny", "--sweep", "context", "--max-context", "7"], "--max-context=7 leaves nothing"),
        (["static", "--shape", "tiny", "--fail-below", "0.9"], "--fail-below=0.9 needs --quick"),
        (["static", "--shape", "tiny", "--quick", "--fail-below=0"], "--fail-below=0 must be a ratio above 0"),
        (["static", "--shape", "tiny", "--quick", "--results=nowhere"], "--results='nowhere' is no folder"),
        (["static", "--shape", "tiny", "--quick", "--record"], "too short to be recorded"),
        (["static", "--shape", "tiny", "--json", "."], "--json='.' is a folder; name a file"),
        (["static", "--shape", "tiny", "--plot", __file__], "is a file; name a folder"),
        (["profile", "--shape", "tiny", "--trace", "no/where.json"], "--trace='no/where.json': its folder"),
        (["static", "--shape", "tiny", "--record", "--results", "nowhere"], "--results='nowhere' is no folder"),
        (["static", "--shape", "tiny", "--csv", "nowhere/at/all.csv"], "--csv='nowhere/at/all.csv': its folder"),
        (["static", "--shape", "tiny", "--engine-options", "tp"], "--engine-options='tp' must be like"),
        (["static", "--shape", "tiny", "--engine-options", "cache=1"], "unknown option 'cache'; known options are"),
        (["static", "--shape", "tiny", "--engine-options", "quant_policy=3"], "quant_policy='3' is invalid"),
        (
            ["static", "--shape", "tiny", "--engine-options", "session_len=9", "max_model_len=9"],
            "max_model_len is given twice",
        ),
        (
            ["static", "--shape", "tiny", "--quant-policy=8", "--engine-options", "quant_policy=4"],
            "quant_policy is given twice, by --quant-policy too",
        ),
        (["throughput", "--shape", "tiny", "--workload", "mix2000"], "--workload='mix2000' is no file and none of"),
        (["throughput", "--shape", "tiny", "--workload", "mix1000", "--limit=0"], "--limit='0'"),
        (
            ["throughput", "--shape", "tiny", "--workload", "mix1000", "--tokenizer=t"],
            "--tokenizer='t' counts the texts",
        ),
        (["throughput", "--shape", "tiny", "--workload", "mix1000", "--max-batch=0"], "--max-batch='0'"),
        (["compare", "--shape", "tiny", "--batch-sizes=x"], "--batch-sizes='x'"),
        (["compare", "--shape", "tiny", "--dtype", "fp16"], "dtype='fp16' is slow and inexact on a CPU"),
    ],
)
def test_nonsense_is_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 1
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["static", "kernels", "tune"])
@pytest.mark.parametrize("spelling", ["llama2-7b", "llama-2-7b"])
def test_shapes_may_be_spelt_with_more_hyphens(kind: str, spelling: str) -> None:
    assert build_parser().parse_args(["bench", kind, "--shape", spelling]).shape == "llama2-7b"


def test_an_unknown_shape(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "static", "--shape", "llama-9b"])
    assert "llama-9b" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_card(tmp_path: Path) -> None:
    """Nothing is compiled while it is measured, nothing beats the roofline by more than a copy's own inefficiency."""
    model = ["--shape", "llama-150m", "--engine-options", "cache_max_entry_count=1024"]
    sweep, comparison = tmp_path / "sweep.json", tmp_path / "compare.json"
    options = ["--sweep", "batch", "--batch-sizes", "1,8,64", "--json", str(sweep)]
    assert main(["bench", "static", *model, *options]) == 0
    assert json.loads(sweep.read_text())["notes"]["jit compiles"] == "0 after ready"
    for row in rows_of(sweep).values():
        assert row["precision"] == "fp16" and 0.02 < row["roofline_fraction"] < 1.15
    options = ["--batch-sizes", "8", "--output-len", "32", "--json", str(comparison)]
    assert main(["bench", "compare", *model, *options]) == 0
    results = json.loads(comparison.read_text())
    num_same, _, num_requests = results["notes"]["same first tokens"].partition(" of ")
    assert int(num_same) >= 0.75 * int(num_requests) == 6
    assert results["rows"][1]["ratio"] > 1
