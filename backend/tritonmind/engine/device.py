"""Which device a model runs on, and whether that device can: checked before any weight is read.

What a card lacks (driver, compute capability, compiler, cache directory, memory) would else show minutes later, as an
exception of a library that names neither cause nor remedy.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from tritonmind.config import INT4_PER_WORD, EngineConfig, ModelConfig
from tritonmind.engine.host_memory import available_bytes
from tritonmind.errors import ConfigError
from tritonmind.kernels import rms_norm, w4_scratch_elements
from tritonmind.kernels.w4_layout import packed_bytes
from tritonmind.tensor_layout import common_tensor_specs, tensor_specs

logger = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Triton's tensor-core code for bf16 and asynchronous copies begins with this compute capability.
MIN_CAPABILITY = (8, 0)
# Driver that a CUDA runtime of this major version needs at least, on Linux.
MIN_DRIVERS = {11: "450.80", 12: "525.60", 13: "580.65"}
# Earlier ones lack what the kernels are launched and written with: PDL, and Gluon's warp groups.
MIN_TRITON = (3, 6)
# A 4-bit linear weight with a 16-bit scale and a 4-bit zero point per 128 weights, in bytes.
INT4_BYTES_PER_WEIGHT = 0.5313
GIB = 1 << 30


def resolve_device(name: str) -> torch.device:
    """The device to run on: "auto" is CUDA when there is a card, else the CPU.

    ConfigError for "cuda" without a usable card, and for "auto" when a card is there that cannot be used: a model that
    silently runs on the CPU is a hundred times slower. A build of torch without CUDA is an answer, so only a warning.
    """
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if name == "auto":
        if _cards_hidden() or not card_present():
            return torch.device("cpu")
        if torch.version.cuda is None:
            logger.warning("running on the CPU beside an NVIDIA card: %s", cuda_problem())
            return torch.device("cpu")
    raise ConfigError(f"device={name!r}: {cuda_problem()}; or use device='cpu'")


def resolve_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The type to compute in: "auto" is fp32 on a CPU and on a GPU the stored type, beside 4-bit weights the rest's.

    ConfigError for what cannot be.
    """
    if config.dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else DTYPES[config.model.float_type]
    else:
        dtype = DTYPES[config.dtype]
    if device.type == "cpu":
        if dtype == torch.float16:
            raise ConfigError("dtype='fp16' is slow and inexact on a CPU; use fp32 or bf16")
    elif dtype == torch.float32:
        if config.model.weight_type == "int4":
            raise ConfigError("dtype='fp32': 4-bit weights are multiplied in 16 bits on a GPU; use fp16 or bf16")
        if config.lm_head_int8:
            raise ConfigError("lm_head_int8=true: an 8-bit head is multiplied in 16 bits; set dtype to fp16 or bf16")
    return dtype


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody has taken yet. What PyTorch's allocator keeps for reuse counts as taken."""
    if device.type == "cpu":
        return available_bytes()
    return torch.cuda.mem_get_info(device)[0]


def card_present() -> bool:
    """Whether an NVIDIA card is in this machine, usable or not."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    return listed.returncode == 0 and listed.stdout.startswith("GPU ")


def cuda_problem() -> str:
    """Why torch finds no CUDA device, and the remedy. To be asked only when `torch.cuda.is_available()` is false."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA: install a CUDA build of it"
    try:
        torch.cuda.init()
        message = "torch.cuda.is_available() is false"
    except (RuntimeError, AssertionError) as error:
        message = str(error)
    old = re.search(r"driver on your system is too old \(found version (\d+)\)", message)
    if old:
        found = int(old.group(1))
        major = int(torch.version.cuda.partition(".")[0])
        needed = f"{MIN_DRIVERS[major]} or newer" if major in MIN_DRIVERS else f"one for CUDA {torch.version.cuda}"
        return (
            f"the NVIDIA driver is too old: it is made for CUDA {found // 1000}.{found % 1000 // 10}, PyTorch "
            f"{torch.__version__} for CUDA {torch.version.cuda}; install driver {needed}, or a build of PyTorch for "
            f"CUDA {found // 1000}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "No CUDA GPUs" in message:
        return f"CUDA_VISIBLE_DEVICES={visible!r} leaves no card visible: unset it or name a card of `nvidia-smi -L`"
    if not card_present():
        return (
            "no NVIDIA card is visible here (no /dev/nvidia0, nvidia-smi lists none): install the driver, or give "
            "the container its cards (docker run --gpus all)"
        )
    return f"CUDA does not start: {_first_line(message)}; see whether `nvidia-smi` works and the driver is whole"


def check_device(device: torch.device) -> None:
    """Raise ConfigError unless kernels can be built and run on `device`. Nothing to check on a CPU.

    Runs a first kernel: what Triton needs for it may be in its cache, so a missing compiler alone is no error.
    """
    if device.type != "cuda":
        return
    try:
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    except RuntimeError as error:
        raise ConfigError(_unusable_card("the card", error)) from error
    if capability < MIN_CAPABILITY:
        raise ConfigError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer (A100, RTX 30 series and later): choose another card "
            f"with CUDA_VISIBLE_DEVICES, or use device='cpu'"
        )
    try:
        x = torch.ones(1, 16, dtype=torch.float16, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise ConfigError(_unusable_card(name, error)) from error
    check_triton_cache()
    from tritonmind.kernels.pdl import use_pdl  # Triton, which an engine on a CPU does without

    try:
        use_pdl(device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        rms_norm(x, x[0], eps=1e-5)
        torch.cuda.synchronize(device)
    except Exception as error:
        raise ConfigError(explain_triton_failure(error)) from error


def check_triton_cache() -> Path:
    """The directory that Triton keeps compiled kernels in.

    ConfigError when Triton is missing, too old, or cannot write there.
    """
    try:
        import triton
    except ImportError as error:
        raise ConfigError(f"Triton cannot be imported ({error}): pip install {_triton_requirement()}") from error
    if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
        raise ConfigError(
            f"Triton {triton.__version__} is too old: the kernels need {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer, which "
            "comes with PyTorch 2.10: pip install --upgrade torch"
        )
    directory = Path(triton.knobs.cache.dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ConfigError(
            f"Triton cannot keep compiled kernels in {directory} ({error.strerror}): make it writable, or set "
            f"TRITON_CACHE_DIR to a directory that is"
        ) from error
    return directory


def find_compiler() -> str | None:
    """The C compiler that Triton would run: CC as it is, else gcc, else clang. None when that is no program."""
    chosen = os.environ.get("CC")
    if chosen is not None:
        return shutil.which(chosen)
    return shutil.which("gcc") or shutil.which("clang")


def explain_triton_failure(error: BaseException) -> str:
    """What is missing when Triton failed to build or start a kernel with `error`, and the remedy."""
    shown = f"{type(error).__name__}: {_first_line(str(error))}"
    chosen = os.environ.get("CC")
    if isinstance(error, ImportError) and "failed to map segment" in str(error):
        return f"Triton cannot load what it compiled ({shown}): set TRITON_CACHE_DIR to a place not mounted noexec"
    if not isinstance(error, (subprocess.CalledProcessError, OSError)) and "C compiler" not in str(error):
        return f"a first Triton kernel failed on the card ({shown}): see whether `pip show torch triton` fit each other"
    if find_compiler() is None:
        found = "there is none" if chosen is None else f"CC={chosen!r} is no program that can be run"
        return f"Triton needs a C compiler, and {found}: apt-get install gcc, or set CC to the path of one"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"Triton needs Python's headers, and {header} is missing: apt-get install python{version}-dev"
    return f"Triton's C compiler {find_compiler()} failed ({shown}): its own message stands above"


def weight_bytes(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of one rank's weights once they are on the device in `dtype`. On a CPU 4-bit ones are dequantised.

    With 4-bit weights also what the largest is written out to in 16 bits, where a step has a product that does that;
    max_num_batched_tokens must be resolved (not 0).
    """
    linear, rest = _num_weights(config.model, config.tensor_parallel_size)
    int8_head = (
        config.model.vocab_size * config.model.hidden_size if config.lm_head_int8 and device.type != "cpu" else 0
    )
    if config.model.weight_type != "int4" or device.type == "cpu":
        return (linear + rest) * dtype.itemsize + int8_head
    scratch = 0
    packed = 0
    for name, spec in tensor_specs(config.model, config.tensor_parallel_size, 0).items():
        if name.endswith(".qweight"):
            k, n = spec.shape[0], spec.shape[1] * INT4_PER_WORD
            packed += packed_bytes(n, k, config.model.group_size)
            kernel = "w4_gate_up" if ".w1." in name or ".w3." in name else "w4_linear"
            sizes = n, k, config.model.group_size
            scratch = max(scratch, w4_scratch_elements(kernel, *sizes, config.scheduler.max_num_batched_tokens, device))
    return packed + (scratch + rest) * dtype.itemsize + int8_head


def check_memory_for_weights(
    config: EngineConfig, dtype: torch.dtype, device: torch.device, free_bytes: int, *, reserved_bytes: int = 0
) -> None:
    """Raise ConfigError unless one rank's weights in `dtype` and `reserved_bytes` beside them fit into `free_bytes`.

    The message says what is missing and which precision would fit.
    """
    needed = weight_bytes(config, dtype, device) + reserved_bytes
    if needed <= free_bytes:
        return
    where = "in memory" if device.type == "cpu" else "on the card"
    raise ConfigError(
        f"the weights of {config.model.model_name} take {(needed - reserved_bytes) / GIB:.2f} GiB as "
        f"{_kept_as(config, dtype, device)} and {reserved_bytes / GIB:.2f} GiB are kept for activations, but "
        f"{free_bytes / GIB:.2f} GiB are free {where}: {(needed - free_bytes) / GIB:.2f} GiB are missing; "
        f"{_what_fits(config, dtype, device, free_bytes - reserved_bytes)}"
    )


def _what_fits(config: EngineConfig, dtype: torch.dtype, device: torch.device, usable_bytes: int) -> str:
    linear, rest = _num_weights(config.model, config.tensor_parallel_size)
    remedy = "free memory (nvidia-smi shows who holds it), or serve a smaller model"
    half_bytes = 2 * (linear + rest)
    if dtype.itemsize > 2 and half_bytes <= usable_bytes:
        half = "bf16" if device.type == "cpu" or config.model.float_type == "bf16" else "fp16"
        return f"dtype={half!r} would fit, with {half_bytes / GIB:.2f} GiB"
    if device.type == "cpu":
        return "no precision fits: free memory, or serve a smaller model"
    if config.model.weight_type == "int4":
        return f"no other precision takes less: {remedy}"
    int4_bytes = math.ceil(INT4_BYTES_PER_WEIGHT * linear) + 2 * rest
    if int4_bytes <= usable_bytes:
        return f"a 4-bit checkpoint would fit, with about {int4_bytes / GIB:.2f} GiB; else {remedy}"
    return (
        "no precision fits, not even 4 bits: free memory (nvidia-smi shows who holds it), take a larger card, or "
        "serve a smaller model"
    )


def _num_weights(model: ModelConfig, tp: int) -> tuple[int, int]:
    """Elements of the decoder layers' linear weights, and of all other tensors, of rank 0."""
    linear = rest = 0
    for name, spec in (common_tensor_specs(model) | tensor_specs(model, tp, 0)).items():
        count = math.prod(spec.shape)
        if name.endswith(".qweight"):
            linear += count * INT4_PER_WORD
        elif name.startswith("layers.") and len(spec.shape) == 2:
            linear += count if name.endswith(".weight") else 0
        else:
            rest += count
    return linear, rest


def _cards_hidden() -> bool:
    """Whether the user has hidden all cards, the usual way to ask for the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.strip() in ("", "-1")


def _unusable_card(name: str, error: RuntimeError) -> str:
    message = str(error)
    if "no kernel image" in message:
        return (
            f"PyTorch {torch.__version__} has no kernels for {name} (it has {', '.join(torch.cuda.get_arch_list())}): "
            f"install a build of PyTorch made for this card, or use device='cpu'"
        )
    return (
        f"{name} does not start: {_first_line(message)}; see in `nvidia-smi` whether another process holds it, choose "
        f"another card with CUDA_VISIBLE_DEVICES, or use device='cpu'"
    )


def _triton_requirement() -> str:
    """What torch asks pip for, such as "triton==3.6.0"."""
    for requirement in importlib.metadata.requires("torch") or ():
        if match := re.match(r"triton\s*[=<>~!][^;]*", requirement):
            return repr(match.group().strip()) if re.search("[<>]", match.group()) else match.group().strip()
    return "triton"


def _kept_as(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> str:
    if config.model.weight_type == "int4" and device.type != "cpu":
        return "int4"
    return next(name for name, known in DTYPES.items() if known == dtype)


def _first_line(message: str) -> str:
    return (message.strip().splitlines() or ["no message"])[0]
