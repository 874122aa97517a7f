"""Which device is chosen, and what is said when a card, its driver, Triton's needs or its memory are not enough."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.model_configs import LLAMA_2_7B
from tritonmind.config import CacheConfig, EngineConfig, SchedulerConfig
from tritonmind.engine import device
from tritonmind.errors import ConfigError
from tritonmind.kernels import tuning
from tritonmind.kernels.tile_table import Card

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
GIB = 1 << 30
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version"
)
# 7 B parameters: 32 layers of 202 M linear weights, two vocabularies of 131 M.
MODEL = dataclasses.replace(LLAMA_2_7B, model_name="seven")
CONFIG = EngineConfig(model=MODEL, cache=CacheConfig(), scheduler=SchedulerConfig(max_model_len=4096))
INT4_CONFIG = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(MODEL, weight_type="int4", group_size=128, unquantized_type="fp16"),
    scheduler=dataclasses.replace(CONFIG.scheduler, max_num_batched_tokens=4096),
)
A100, H100 = Card("NVIDIA A100", (8, 0), 108), Card("NVIDIA H100", (9, 0), 132)
NUM_LINEAR = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
NUM_REST = 2 * 32000 * 4096 + 65 * 4096


def raises(error: Exception) -> Callable[..., NoReturn]:
    def fail(*args: object, **kwargs: object) -> NoReturn:
        raise error

    return fail


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of torch beside a card, without an answer from the driver."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "card_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", raises(RuntimeError("CUDA unknown error\nwith a second line")))


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


def test_the_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device.resolve_device(name).type for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "card_present", lambda: False)
    assert [device.resolve_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_an_old_driver_is_named_with_what_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", raises(RuntimeError(TOO_OLD)))
    with pytest.raises(ConfigError) as caught:
        device.resolve_device(name)
    message = str(caught.value)
    assert message.startswith(f"device={name!r}: the NVIDIA driver is too old: it is made for CUDA 12.2, PyTorch")
    assert "for CUDA 13.0; install driver 580.65 or newer, or a build of PyTorch for CUDA 12; or use" in message
    assert message.endswith("device='cpu'")


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_card_that_fails_is_an_error_not_the_cpu(name: str) -> None:
    with pytest.raises(ConfigError, match=r"CUDA does not start: CUDA unknown error; see .*or use device='cpu'$"):
        device.resolve_device(name)


@pytest.mark.usefixtures("no_cuda")
def test_no_card_is_an_error_only_for_who_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "card_present", lambda: False)
    assert device.resolve_device("auto") == CPU
    with pytest.raises(ConfigError, match=r"no NVIDIA card is visible here .*--gpus all"):
        device.resolve_device("cuda")


@pytest.mark.usefixtures("no_cuda")
def test_hidden_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", raises(RuntimeError("No CUDA GPUs are available")))
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device.resolve_device("auto") == CPU
        with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES='{hidden}' leaves no card visible: unset it"):
            device.resolve_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES='9' leaves no card visible"):
        device.resolve_device("auto")


@pytest.mark.usefixtures("no_cuda")
def test_a_cpu_build_beside_a_card_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.resolve_device("auto") == CPU
    assert "beside an NVIDIA card" in caplog.text and "built without CUDA" in caplog.text
    with pytest.raises(ConfigError, match=r"device='cuda': PyTorch \S+ is built without CUDA: install a CUDA build"):
        device.resolve_device("cuda")
    caplog.clear()
    monkeypatch.setattr(device, "card_present", lambda: False)
    assert device.resolve_device("auto") == CPU
    assert not caplog.text


@pytest.mark.usefixtures("old_card")
def test_an_old_card_is_refused_with_what_works() -> None:
    with pytest.raises(ConfigError, match=r"Tesla T4 has compute capability 7\.5, .* 8\.0 or newer \(A100, RTX 30"):
        device.check_device(CUDA)
    device.check_device(CPU)


def test_a_card_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")
    monkeypatch.setattr(torch.cuda, "get_device_name", raises(error))
    with pytest.raises(ConfigError, match=r"busy or unavailable; see in `nvidia-smi` .*CUDA_VISIBLE_DEVICES"):
        device.check_device(CUDA)


def test_an_old_build_of_torch_on_a_new_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA New")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (99, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch, "ones", raises(RuntimeError("CUDA error: no kernel image is available for execution")))
    with pytest.raises(ConfigError, match=r"has no kernels for NVIDIA New \(it has sm_80, sm_90\): install a build"):
        device.check_device(CUDA)


def test_missing_triton_is_named_with_torchs_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    wanted = ["filelock", 'triton==3.6.0; platform_system == "Linux"', "sympy"]
    monkeypatch.setattr(device.importlib.metadata, "requires", lambda name: wanted)
    with pytest.raises(ConfigError, match=r"Triton cannot be imported .*pip install triton==3\.6\.0$"):
        device.check_triton_cache()


@pytest.mark.parametrize("version", ["3.5.1", "2.3.1+cu121"])
def test_an_old_triton_is_named_with_what_is_needed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(ConfigError, match=rf"Triton {re.escape(version)} is too old: .*3\.6 or newer.*--upgrade torch"):
        device.check_triton_cache()
    for fitting in ("3.6.0", "3.10.0", "4.0.0+git1234"):
        monkeypatch.setattr(triton, "__version__", fitting)
        device.check_triton_cache()


def test_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert device.check_triton_cache() == tmp_path / "new" / "cache"
    assert list((tmp_path / "new" / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"file/cache \(Not a directory\): .*set TRITON_CACHE_DIR"):
        device.check_triton_cache()


def test_the_compiler_is_the_one_triton_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.find_compiler() is None
    for name in ("cc", "clang", "gcc"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
        assert device.find_compiler() == (None if name == "cc" else str(tmp_path / name))
    monkeypatch.setenv("CC", "nowhere/gcc")
    assert device.find_compiler() is None
    monkeypatch.setenv("CC", "clang")
    assert device.find_compiler() == str(tmp_path / "clang")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    error = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    assert "needs a C compiler, and there is none: apt-get install gcc" in device.explain_triton_failure(error)
    monkeypatch.setenv("CC", "nowhere/gcc")
    gone = FileNotFoundError(2, "No such file or directory", "nowhere/gcc")
    assert "CC='nowhere/gcc' is no program that can be run" in device.explain_triton_failure(gone)


def test_a_failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", sys.executable)
    error = subprocess.CalledProcessError(1, ["gcc", "main.c"])
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    text = device.explain_triton_failure(error)
    assert f"{tmp_path}/Python.h is missing: apt-get install python{sys.version_info.major}." in text
    (tmp_path / "Python.h").write_text("")
    assert device.explain_triton_failure(error).startswith(f"Triton's C compiler {sys.executable} failed")


def test_other_failures_of_the_first_kernel() -> None:
    noexec = ImportError("main.so: failed to map segment from shared object")
    assert "set TRITON_CACHE_DIR to a place not mounted noexec" in device.explain_triton_failure(noexec)
    text = device.explain_triton_failure(RuntimeError("0 active drivers ([]).\nThere should only be one."))
    assert "failed on the card (RuntimeError: 0 active drivers ([]).)" in text


def test_the_type_to_compute_in() -> None:
    def config(weight_type: Any, dtype: Any) -> EngineConfig:
        model = dataclasses.replace(MODEL, weight_type=weight_type, group_size=128 if weight_type == "int4" else 0)
        return dataclasses.replace(CONFIG, model=model, dtype=dtype)

    assert device.resolve_dtype(config("bf16", "auto"), CUDA) == torch.bfloat16
    assert device.resolve_dtype(config("bf16", "auto"), CPU) == torch.float32
    assert device.resolve_dtype(config("bf16", "fp16"), CUDA) == torch.float16
    assert device.resolve_dtype(config("fp16", "bf16"), CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype='fp16' is slow and inexact on a CPU; use fp32 or bf16"):
        device.resolve_dtype(config("fp16", "fp16"), CPU)
    assert device.resolve_dtype(config("int4", "auto"), CUDA) == torch.float16
    assert device.resolve_dtype(config("int4", "bf16"), CUDA) == torch.bfloat16
    assert device.resolve_dtype(config("int4", "auto"), CPU) == torch.float32
    with pytest.raises(ConfigError, match="dtype='fp32': 4-bit weights are multiplied in 16 bits on a GPU; use fp16"):
        device.resolve_dtype(config("int4", "fp32"), CUDA)

    exact = dataclasses.replace(config("fp32", "auto"), lm_head_int8=True)
    with pytest.raises(ConfigError, match="lm_head_int8=true: an 8-bit head is multiplied in 16 bits; set dtype to"):
        device.resolve_dtype(exact, CUDA)
    assert device.resolve_dtype(exact, CPU) == torch.float32  # which has the head as it is stored


def test_an_8_bit_head_is_counted_beside_the_other() -> None:
    config = dataclasses.replace(CONFIG, lm_head_int8=True)
    assert device.weight_bytes(config, torch.float16, CUDA) == 2 * (NUM_LINEAR + NUM_REST) + 32000 * 4096
    assert device.weight_bytes(config, torch.float32, CPU) == 4 * (NUM_LINEAR + NUM_REST)


def test_weights_are_counted_in_the_type_served() -> None:
    assert device.weight_bytes(CONFIG, torch.float16, CUDA) == 2 * (NUM_LINEAR + NUM_REST) == 13_476_831_232
    assert device.weight_bytes(CONFIG, torch.float32, CPU) == 4 * (NUM_LINEAR + NUM_REST)


@pytest.mark.parametrize(("card", "tokens", "scratch"), [(A100, 4096, 4096 * 22016), (A100, 64, 0), (H100, 4096, 0)])
def test_weights_in_4_bits_are_counted_with_what_is_written_out(
    card: Card, tokens: int, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits the largest of them, gate and up as one, where a step's products do that. On a CPU all are."""
    monkeypatch.setattr(tuning, "card", lambda device: card)
    config = dataclasses.replace(
        INT4_CONFIG, scheduler=dataclasses.replace(INT4_CONFIG.scheduler, max_num_batched_tokens=tokens)
    )
    assert device.weight_bytes(config, torch.float16, CUDA) == NUM_LINEAR * 0.53125 + 2 * NUM_REST + 2 * scratch


def test_weights_in_4_bits_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "card", lambda device: A100)
    assert device.weight_bytes(INT4_CONFIG, torch.float32, CPU) == 4 * (NUM_LINEAR + NUM_REST)
    missing = r"take 3\.86 GiB as int4 and 1\.00 GiB .* no other precision takes less: free memory"
    with pytest.raises(ConfigError, match=missing):
        device.check_memory_for_weights(INT4_CONFIG, torch.float16, CUDA, 3 * GIB, reserved_bytes=GIB)


@pytest.mark.parametrize(
    ("dtype", "where", "free_gib", "fits"),
    [
        (torch.float32, CUDA, 20, r"dtype='fp16' would fit, with 12\.55 GiB$"),
        (torch.float32, CPU, 20, r"dtype='bf16' would fit, with 12\.55 GiB$"),
        (torch.float32, CUDA, 8, "a 4-bit checkpoint would fit, .*; else free memory"),
        (torch.float16, CUDA, 8, r"a 4-bit checkpoint would fit, with about 3\.69 GiB; else free memory"),
        (torch.float16, CUDA, 3, "no precision fits, not even 4 bits: .*a larger card"),
        (torch.bfloat16, CPU, 8, "no precision fits: free memory, or serve a smaller model$"),
    ],
)
def test_what_is_missing_and_what_fits(dtype: torch.dtype, where: torch.device, free_gib: int, fits: str) -> None:
    missing = device.weight_bytes(CONFIG, dtype, where) / GIB + 1 - free_gib
    with pytest.raises(ConfigError, match=rf"{free_gib}\.00 GiB are free .*: {missing:.2f} GiB are missing; {fits}"):
        device.check_memory_for_weights(CONFIG, dtype, where, free_gib * GIB, reserved_bytes=GIB)


def test_weights_that_just_fit() -> None:
    needed = device.weight_bytes(CONFIG, torch.float16, CUDA) + GIB
    device.check_memory_for_weights(CONFIG, torch.float16, CUDA, needed, reserved_bytes=GIB)
    with pytest.raises(ConfigError, match=r"weights of seven take 12\.55 GiB as fp16 and 1\.00 GiB are kept"):
        device.check_memory_for_weights(CONFIG, torch.float16, CUDA, needed - 1, reserved_bytes=GIB)


@pytest.mark.gpu
def test_this_card_passes() -> None:
    assert device.resolve_device("auto").type == device.resolve_device("cuda").type == "cuda"
    device.check_device(CUDA)
    assert 0 < device.free_bytes(CUDA) <= torch.cuda.get_device_properties(CUDA).total_memory


def check_in_subprocess(name: str = "cuda", **environment: str) -> str:
    """What the checks say in a process of its own: Triton and CUDA read the environment once."""
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).resolve().parents[2] / 'backend')!r})\n"
        "from tritonmind.engine.device import check_device, resolve_device\n"
        "from tritonmind.errors import ConfigError\n"
        "try:\n"
        f"    check_device(resolve_device({name!r}))\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
        "else:\n"
        "    print('passed')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.gpu
def test_an_unwritable_cache_on_the_card(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    message = check_in_subprocess(TRITON_CACHE_DIR=str(cache))
    assert message.startswith(f"Triton cannot keep compiled kernels in {cache} (Not a directory)")


@pytest.mark.gpu
def test_a_compiler_that_is_not_there_matters_only_without_a_cache(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    message = check_in_subprocess(TRITON_CACHE_DIR=cache, CC="nowhere/gcc")
    assert "Triton needs a C compiler, and CC='nowhere/gcc' is no program" in message
    assert check_in_subprocess(TRITON_CACHE_DIR=cache) == "passed"
    assert check_in_subprocess(TRITON_CACHE_DIR=cache, CC="nowhere/gcc") == "passed"


@pytest.mark.gpu
def test_a_card_hidden_by_number() -> None:
    assert "CUDA_VISIBLE_DEVICES='99' leaves no card visible" in check_in_subprocess("auto", CUDA_VISIBLE_DEVICES="99")
