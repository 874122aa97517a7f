"""4-bit weights in checkpoints of others: what config.json says of them, and what of it is refused by name.

Both layouts have qweight, qzeros and scales for each linear weight. AWQ's, of version gemm, is the portable form of
`kernels.awq_format`. GPTQ packs the words of qweight along the input dimension, [in / 8, out] with input 8 r + i in
bits 4 i of word r, those of qzeros in the order of the outputs, and stores its zeros less one (format gptq_v2: as they
are). Its `g_idx` names the group of each input.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritonmind.checkpoints.hf_config import ConfigReader
from tritonmind.checkpoints.source import CONFIG, Quantization, SourceTensor
from tritonmind.config import INT4_PER_WORD
from tritonmind.errors import CheckpointError
from tritonmind.families import names_of

QUANTIZATION_CONFIG = "quantization_config"
BITS = 4
# What is added to the zeros that a format of GPTQ stores.
_GPTQ_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_AWQ_VERSION = "gemm"


def awq_config(group_size: int) -> dict[str, Any]:
    """The quantization_config of a checkpoint in the layout that AutoAWQ calls gemm."""
    return {
        "quant_method": "awq",
        "version": _AWQ_VERSION,
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": None,
    }


def quantization_of(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor], where: Path) -> Quantization | None:
    """The layout of 4-bit weights that a checkpoint's config.json, at `where`, names; None when there are none.

    Told from the shapes of the tensors where the configuration does not say it. Raises CheckpointError naming key and
    value of what is not supported.
    """
    given = config.get(QUANTIZATION_CONFIG)
    if not given:
        return _from_tensors(tensors, _first_linear(config))
    named = f"{where}: {QUANTIZATION_CONFIG}"
    if not isinstance(given, dict):
        raise CheckpointError(f"{named}={given!r} is not an object")
    reader = ConfigReader(given, named)
    method = reader.get("quant_method", str)
    if method not in ("awq", "gptq"):
        raise CheckpointError(
            f"{named}: quant_method={method!r} is not supported; supported are awq and gptq: "
            "use the checkpoint in fp16, bf16 or fp32"
        )
    reader.refuse_unless("bits" if "bits" in given else "w_bit", int, BITS)
    group_size = reader.get("group_size" if "group_size" in given else "q_group_size", int)
    return _awq(reader, group_size) if method == "awq" else _gptq(reader, group_size)


def _awq(reader: ConfigReader, group_size: int) -> Quantization:
    version_key = "version" if reader.config.get("version") is not None else "format"
    version = reader.get(version_key, str, _AWQ_VERSION)
    if version.lower() != _AWQ_VERSION:
        raise CheckpointError(
            f"{reader.where}: {version_key}={version!r} is not supported: only {_AWQ_VERSION!r} is; "
            f"quantise the model again with version {_AWQ_VERSION}"
        )
    if reader.config.get("backend") == "llm-awq":
        raise CheckpointError(f"{reader.where}: backend='llm-awq' is not supported: its weights are packed otherwise")
    reader.refuse_unless("zero_point", bool, True, True)
    return Quantization("awq", group_size)


def _gptq(reader: ConfigReader, group_size: int) -> Quantization:
    format_key = "checkpoint_format" if reader.config.get("checkpoint_format") is not None else "format"
    kind = reader.get(format_key, str, "gptq")
    if kind not in _GPTQ_ZERO_OFFSETS:
        raise CheckpointError(
            f"{reader.where}: {format_key}={kind!r} is not supported; supported are {', '.join(_GPTQ_ZERO_OFFSETS)}"
        )
    for key in ("is_marlin_format", "lm_head"):
        reader.refuse_unless(key, bool, False, False)
    if dynamic := reader.config.get("dynamic"):
        raise CheckpointError(
            f"{reader.where}: dynamic={dynamic!r} is not supported: all layers must be quantised the same way"
        )
    return Quantization("gptq", group_size, _GPTQ_ZERO_OFFSETS[kind], reader.get("desc_act", bool, False))


def _first_linear(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or [""]
    names = names_of(str(architectures[0]))
    return f"{names.layer.format(0)}.{names.qkv[0]}"


def _from_tensors(tensors: Mapping[str, SourceTensor], first: str) -> Quantization | None:
    """What the shapes of one weight say: tools that write no quantization_config leave nothing else to go by."""
    qweight, scales = tensors.get(f"{first}.qweight"), tensors.get(f"{first}.scales")
    if qweight is None or scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
        return None
    rows, columns = qweight.shape
    num_groups, out_features = max(scales.shape[0], 1), scales.shape[1]
    if columns * INT4_PER_WORD == out_features and rows % num_groups == 0:
        return Quantization("awq", rows // num_groups)
    if columns == out_features and rows * INT4_PER_WORD % num_groups == 0:
        return Quantization("gptq", rows * INT4_PER_WORD // num_groups, _GPTQ_ZERO_OFFSETS["gptq"])
    raise CheckpointError(
        f"{qweight.file}: {first}.qweight {list(qweight.shape)} beside scales {list(scales.shape)} is neither "
        f"AWQ's nor GPTQ's layout of 4-bit weights, and {CONFIG} has no {QUANTIZATION_CONFIG}"
    )
