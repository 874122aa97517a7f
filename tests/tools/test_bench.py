"""`tritonmind bench`: it measures what it says, on tiny models, and refuses nonsense."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model_configs import LLAMA_2_7B
from tests.workspaces import tiny_workspace

from tritonmind_tools.bench import grid, kernel_cases, machine, profile
from tritonmind_tools.bench.kernel_case import Point, Setting
from tritonmind_tools.bench.kernel_cases import KERNELS
from tritonmind_tools.bench.roofline import step_bytes
from tritonmind_tools.bench.shapes import SHAPES, shape_name
from tritonmind_tools.bench.timing import seconds_per_call
from tritonmind_tools.bench.trace import OTHER_GROUP, account, group_of, short_name
from tritonmind_tools.cli import build_parser, main

ROOT = Path(__file__).resolve().parents[2]


def test_static_reports_each_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = tiny_workspace(tmp_path)
    report = tmp_path / "report.json"
    arguments = ["--batch-sizes", "1,3", "--input-len", "5", "--output-len", "7", "--rounds", "1", "--num-threads", "1"]
    assert main(["bench", "static", str(workspace), *arguments, "--json", str(report)]) == 0
    results = json.loads(report.read_text())
    assert [(row["batch_size"], row["input_len"], row["output_len"]) for row in results["rows"]] == [
        (1, 5, 7),
        (3, 5, 7),
    ]
    for row in results["rows"]:
        assert row["value"] == row["tokens_per_second"] > 0 and row["time_to_first_token"] > 0
        assert (row["shape"], row["precision"], row["unit"]) == ("tiny", "fp32", "tok/s")
    assert [row["workload"] for row in results["rows"]] == ["batch1_5_7", "batch3_5_7"]
    assert_facts(results)
    assert (results["notes"]["preemptions"], results["notes"]["jit compiles"]) == ("0", "0 after ready")
    shown = capsys.readouterr().out
    assert "batch3_5_7" in shown and "preemptions: 0" in shown


def assert_facts(results: dict[str, Any]) -> None:
    assert set(results) >= {"card", "driver", "versions", "commit", "command", "date", "rows"}
    assert results["versions"]["torch"] == torch.__version__
    datetime.fromisoformat(results["date"])


def test_commit_comes_from_the_environment_outside_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc1234")
    assert machine.commit() != "abc1234"
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == "abc1234"
    monkeypatch.delenv(machine.COMMIT_VARIABLE)
    assert machine.commit() == "no checkout"


def test_the_commit_of_a_checkout_around_the_environment_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc1234")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert machine.commit() == "abc1234"


@pytest.mark.parametrize(
    ("page", "num_commands"),
    [
        ("gpu.md", 7),
        ("benchmarks/README.md", 7),
        ("benchmarks/cpu.md", 1),
        ("benchmarks/accuracy.md", 6),
        ("benchmarks/memory.md", 4),
        ("benchmarks/serving.md", 5),
        ("benchmarks/h100.md", 3),
    ],
)
def test_commands_of_the_pages_are_understood(page: str, num_commands: int) -> None:
    text = (ROOT / "docs" / page).read_text()
    text = text.replace("\\\n", " ").replace("$precision", "")
    commands = re.findall(r"^ *tritonmind (bench .*)$", text, re.M)
    assert len(commands) == num_commands
    for command in commands:
        build_parser().parse_args(shlex.split(command))


def test_pages_say_what_the_code_does() -> None:
    assert f"export {machine.COMMIT_VARIABLE}=" in (ROOT / "docs" / "gpu.md").read_text()
    page = (ROOT / "docs" / "benchmarks" / "README.md").read_text()
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
        main(["bench", "--help"])
    kinds = re.search(r"\n  COMMAND\n((?:    .*\n)+)", help_text.getvalue())
    assert kinds is not None
    for kind in re.findall(r"^    ([\w-]+)", kinds[1], re.M):
        assert f"| `bench {kind}` |" in page, f"docs/benchmarks/README.md does not say what {kind} measures"
    assert f"first {grid.SHORT_MIX} requests of `mix1000`" in page and f"some {grid.STEADY_STEPS} such steps" in page


@pytest.mark.parametrize("sizes", ["", "0", "1,x", "-1"])
def test_batch_sizes_must_be_positive_numbers(tmp_path: Path, sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "static", str(tmp_path), f"--batch-sizes={sizes}"]) == 1
    assert f"--batch-sizes={sizes!r}" in capsys.readouterr().err


def test_step_bytes_of_llama_2_7b() -> None:
    # 6.476 G projection weights, 0.131 G of the head, 512 KiB of K and V a token, two bytes each.
    assert step_bytes(LLAMA_2_7B, 2, 1, 0) == pytest.approx(13.21e9, rel=1e-3)
    assert step_bytes(LLAMA_2_7B, 2, 4, 100) - step_bytes(LLAMA_2_7B, 2, 4, 0) == 400 * 512 * 1024


def test_shapes_are_known_by_their_sizes() -> None:
    assert shape_name(LLAMA_2_7B) == "llama2-7b"
    assert shape_name(dataclasses.replace(LLAMA_2_7B, max_position_embeddings=32768)) == "llama2-7b"
    assert shape_name(dataclasses.replace(LLAMA_2_7B, num_kv_heads=8)) == "llama2"


def test_every_launcher_is_measured() -> None:
    assert kernel_cases.launchers() == {kernel.launcher for kernel in KERNELS if kernel.launcher}


def test_kernels_reports_each_kernel_and_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    arguments = ["--shape", "tiny", "--dtype", "fp32", "--batch-sizes", "1,3", "--context", "70", "--prefills", "2x33"]
    assert main(["bench", "kernels", *arguments, "--json", str(report)]) == 0
    results = json.loads(report.read_text())
    assert_facts(results)
    assert results["not_measured"] == []
    measured = {(row["kernel"], row["size"]) for row in results["rows"]}
    expected = {(k.name, size) for k in KERNELS for size in ("B=1 L=70", "B=3 L=70") if k.decode}
    assert measured == expected | {(k.name, "2x33") for k in KERNELS if k.prefill}
    for row in results["rows"]:
        assert row["value"] > 0 and row["roofline_fraction"] > 0 and row["unit"] == "us"
    shown = capsys.readouterr().out
    assert "paged_decode_attention  B=3 L=70" in shown and "sample top-k top-p" in shown


@pytest.mark.parametrize(
    ("name", "num_bytes", "num_flops"),
    [
        ("w13", 2 * (4096 * 22016 + 8 * (4096 + 11008)), 2 * 8 * 4096 * 22016),
        ("paged_decode_attention", 8 * (512 * 2 * 4096 * 2 + 2 * 4096 * 2), 4 * 8 * 512 * 4096),
        ("add_rms_norm", (8 * 4 + 1) * 4096 * 2, 0),
        ("sample penalties", 8 * 32000 * (2 + 4), 0),
    ],
)
def test_work_of_a_decode_step_of_llama_2_7b(name: str, num_bytes: int, num_flops: int) -> None:
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == name)
    case = kernel.case(Setting(SHAPES["llama2-7b"], torch.float16, torch.device("cpu")), Point(8, 1, 512))
    assert (case.num_bytes, case.num_flops) == (num_bytes, num_flops)


def test_prefill_attention_counts_the_triangle() -> None:
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == "paged_prefill_attention")
    case = kernel.case(Setting(SHAPES["llama2-7b"], torch.float16, torch.device("cpu")), Point(2, 3, 3))
    assert case.num_flops == 2 * (1 + 2 + 3) * 4 * 4096


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--batch-sizes=0", "--batch-sizes='0'"),
        ("--context=-1", "--context='-1'"),
        ("--prefills=8", "--prefills='8' must be like 4x1024"),
        ("--prefills=0x5", "--prefills='0x5'"),
        ("--only=nothing", "they are prepare_tokens, "),
        ("--json=nowhere/at/all.json", "its folder does not exist"),
    ],
)
def test_kernels_refuses_nonsense(option: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--shape", "tiny", option]) == 1
    assert named in capsys.readouterr().err


@pytest.mark.gpu
def test_a_copy_on_the_card_takes_the_time_of_its_bytes() -> None:
    """The timer against the card's copy bandwidth: caches that stayed warm would look faster, the host slower."""
    device = torch.device("cuda")
    size = 64 << 20

    def make() -> Callable[[], object]:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    machine_rate = machine.copy_bandwidth()
    rate = 2 * size / seconds_per_call(make, 2 * size, device)
    assert 0.6 * machine_rate < rate < 1.15 * machine_rate


def test_profile_accounts_for_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, trace = tmp_path / "report.json", tmp_path / "trace.json"
    arguments = ["--batch-size", "3", "--context", "70", "--steps", "4", "--json", str(report), "--trace", str(trace)]
    model = ["--shape", "tiny", "--engine-options", "cache_max_entry_count=64"]
    assert main(["bench", "profile", *model, *arguments]) == 0
    results = json.loads(report.read_text())
    assert_facts(results)
    assert "KV cache 0.00 GiB = 64 blocks" in results["notes"]["engine"]
    (row,) = results["rows"]
    assert row["shape"] == "tiny"
    assert row["workload"].startswith("decode step B=3 L=7") and row["unit"] == "us"
    host = results["host_seconds"]
    assert 0 < sum(host["parts"].values()) <= host["wall"] * 1.01
    assert set(host["parts"]) == {"schedule", "execute", "wait", "update", "message"}
    assert host["host"] > 0 and host["target"] is None, "a CPU computes the model in the engine's thread"
    products = [kernel for kernel in results["kernels"] if kernel["group"] == "matrix products"]
    # Four in each of two layers, and the logits.
    assert sum(kernel["calls_per_step"] for kernel in products) == 9
    assert sum(kernel["share"] for kernel in results["kernels"]) == pytest.approx(1)
    assert json.loads(trace.read_text())["traceEvents"]
    printed = capsys.readouterr().out
    assert "matrix products" in printed and f"host: {host['host'] * 1e6:.1f} us of CPU time a step" in printed


@pytest.mark.parametrize("batch_size", ["0", "2"])
def test_profile_accounts_for_a_step_with_prompts(tmp_path: Path, batch_size: str) -> None:
    report = tmp_path / "report.json"
    arguments = ["--batch-size", batch_size, "--context", "30", "--prompts", "1x40,1x30", "--steps", "3"]
    assert main(["bench", "profile", "--shape", "tiny", *arguments, "--json", str(report)]) == 0
    results = json.loads(report.read_text())
    (row,) = results["rows"]
    assert row["workload"].startswith(f"step B={batch_size} L=") and row["workload"].endswith(" 1x40,1x30")
    assert 0 < row["roofline_fraction"] < 1
    products = [kernel["calls_per_step"] for kernel in results["kernels"] if kernel["group"] == "matrix products"]
    assert sum(products) == 9, "prompts and decodes did not share their steps"


@pytest.mark.parametrize(
    ("batch_size", "target"), [(1, 0.3e-3), (32, 0.3e-3), (33, 0.5e-3), (256, 0.5e-3), (257, None)]
)
def test_the_host_has_a_target_by_batch_size(
    batch_size: int, target: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile._host_target(batch_size) == target
    parts = dict.fromkeys(profile.PARTS, 1e-6)
    profile._print_host(profile.Timing(wall=1e-3, host=0.4e-3, parts=parts), target)
    printed = capsys.readouterr().out
    assert ("kept" in printed, "MISSED" in printed) == (target == 0.5e-3, target == 0.3e-3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--batch-size=0"], "--batch-size='0'"),
        (["--batch-size=-1", "--prompts=1x4"], "--batch-size='-1'"),
        (["--prompts=4"], "--prompts='4' must be like 4x1024,1x512: prompts x tokens of each"),
        (["--prompts=0x8"], "--prompts='0x8' must be"),
        (["--batch-size=1", "--context=10", "--prompts=1x200"], "--prompts=1x200 needs"),
        (["--context=100000"], "--context=100000 is more than"),
        (["--batch-size=3", "--context=200"], "needs 12 blocks, the KV cache has 9;"),
    ],
)
def test_profile_refuses_nonsense(
    tmp_path: Path, options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tiny_workspace(tmp_path)
    config = workspace / "triton_models" / "weights" / "config.ini"
    config.write_text(re.sub(r"cache_max_entry_count = .*", "cache_max_entry_count = 9", config.read_text()))
    assert main(["bench", "profile", str(workspace), *options]) == 1
    assert named in capsys.readouterr().err


def event(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 1}


def test_account_of_a_trace_of_a_card() -> None:
    """Two steps of a decode kernel, a copy that overlaps it, a matrix product, and the calls that started them.

    A microsecond counts for the one that ends first: the other may only have waited for it.
    """
    events: list[dict[str, Any]] = [event("cuda_runtime", "cudaDeviceSynchronize", 0, 1), {"ph": "M", "name": "x"}]
    for start in (100, 200):
        events += [
            event("cuda_runtime", "cudaGraphLaunch", start - 50, 9),
            event("cuda_runtime", "cudaEventSynchronize", start - 20, 5),
            event("kernel", "_decode_kernel", start, 20),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", start + 15, 10),
            event("kernel", "nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", start + 40, 30),
        ]
    events.append(event("cuda_runtime", "cudaDeviceSynchronize", 300, 1))
    found = account(events, 2, on_gpu=True)
    assert [(k.name, k.calls_per_step, k.us_per_call, k.us_per_step) for k in found.kernels] == [
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", 1, 30, 30),
        ("_decode_kernel", 1, 20, 20),
        ("Memcpy DtoH", 1, 5, 5),
    ]
    assert found.kernels[0].share == pytest.approx(30 / 55)
    assert found.us_by_group == {"matrix products": 30, "decode attention": 20, "copies": 5}
    assert found.busy_us_per_step == 25 + 30
    assert found.host_calls_per_step == {"cudaGraphLaunch": 1, "cudaEventSynchronize": 1}


def test_a_synchronisation_within_the_steps_is_counted() -> None:
    names = ("cudaDeviceSynchronize", "cudaGraphLaunch", "cudaDeviceSynchronize", "cudaGraphLaunch")
    events = [event("cuda_runtime", name, start, 1) for start, name in enumerate(names)]
    found = account(events, 1, on_gpu=True)
    assert found.host_calls_per_step == {"cudaGraphLaunch": 2, "cudaDeviceSynchronize": 1}


def test_an_operator_counts_without_those_it_calls() -> None:
    events = [
        event("cpu_op", "aten::linear", 0, 10),
        event("cpu_op", "aten::t", 1, 2),
        event("cpu_op", "aten::mm", 4, 5),
        event("cpu_op", "aten::mm", 20, 5),
    ]
    found = account(events, 1, on_gpu=False)
    assert [(k.name, k.us_per_step) for k in found.kernels] == [("aten::mm", 10), ("aten::linear", 3), ("aten::t", 2)]
    assert found.busy_us_per_step == 15


@pytest.mark.parametrize(
    ("name", "short", "group"),
    [
        ("_rms_norm_kernel", "_rms_norm_kernel", "norm"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul> >"
            "(int, at::native::FillFunctor<int>, std::array<char*, 1ul>)",
            "vectorized_elementwise_kernel FillFunctor",
            "copies",
        ),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_64x64_64x6_tn_align8>(Params)",
            "cutlass::Kernel2 cutlass_80_tensorop_f16_s16816gemm_relu_f16_64x64_64x6_tn_align8",
            "matrix products",
        ),
        ("void gemvx::kernel<int, int, __half>(cublasGemvParams<int>)", "gemvx::kernel", "matrix products"),
        ("void at::native::(anonymous namespace)::gather<float>(int)", "gather", "other"),
        ("Memset (Device)", "Memset", "copies"),
    ],
)
def test_names_are_short_and_sorted_by_kind(name: str, short: str, group: str) -> None:
    assert short_name(name) == short
    assert group_of(short) == group


def test_each_of_our_kernels_has_a_kind() -> None:
    folder = Path(kernel_cases.kernels.__file__).parent
    sources = "".join(path.read_text() for path in folder.glob("triton_*.py"))
    launched = re.findall(r"\b(_\w+_kernel)\[", sources)
    assert len(launched) >= 8
    for name in launched:
        assert group_of(name) != OTHER_GROUP, name
