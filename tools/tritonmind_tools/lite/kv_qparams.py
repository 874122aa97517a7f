"""`tritonmind lite kv_qparams`: scales of an int8 KV cache, from a calibration into a workspace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.config import QuantPolicy
from tritonmind.errors import ConfigError
from tritonmind_tools.lite.options import DEFAULT_WORK_DIR, boolean

if TYPE_CHECKING:
    import torch

    from tritonmind.workspace import Workspace
    from tritonmind_tools.lite.work_dir import Calibration, Manifest

KV_BITS = 8
# Facts in which a calibrated model and a workspace of it agree, whatever type its weights were converted to.
_SAME_FACTS = (
    "architecture",
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "norm_eps",
    "rope_theta",
    "qkv_bias",
)
_LAST_NORM = "norm.weight"


def register(commands: Any) -> None:
    """Add `lite kv_qparams`."""
    parser = commands.add_parser(
        "kv_qparams",
        help="scales of an int8 KV cache into a workspace",
        description="Write the scales of an int8 KV cache with quant_policy 4 into a workspace, from what "
        "`lite calibrate` saw. quant_policy 8 needs none.",
    )
    parser.add_argument("--work-dir", type=Path, default=DEFAULT_WORK_DIR, help="default: ./%(default)s")
    parser.add_argument(
        "--turbomind-dir", type=Path, required=True, help="the workspace, or triton_models/weights in it"
    )
    parser.add_argument("--kv-bits", type=int, default=KV_BITS, help="only %(default)s")
    parser.add_argument(
        "--kv-sym", type=boolean, default=False, help="True: the zero points are 0 (default: %(default)s)"
    )
    parser.add_argument("--num-tp", type=int, default=1, help="ranks that the workspace is split for")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command line's `lite kv_qparams`."""
    workspace = kv_qparams(
        args.work_dir, args.turbomind_dir, kv_bits=args.kv_bits, kv_sym=args.kv_sym, num_tp=args.num_tp
    )
    print(
        f"{workspace.weights_dir}: scales of {workspace.model.num_layers} layers; "
        f"quant_policy = {int(QuantPolicy.KV_INT8_CALIBRATED)} in {workspace.config_ini} uses them"
    )
    return 0


def kv_qparams(
    work_dir: Path, turbomind_dir: Path, *, kv_bits: int = KV_BITS, kv_sym: bool = False, num_tp: int = 1
) -> Workspace:
    """Write the scales into the workspace at `turbomind_dir`, in place of earlier ones. Returns the workspace.

    Raises ConfigError for a calibration of another model, or options that do not fit the workspace.
    """
    from tritonmind.workspace_writer import write_kv_scales
    from tritonmind_tools.lite.work_dir import Calibration

    if kv_bits != KV_BITS:
        raise ConfigError(f"--kv_bits={kv_bits} is not supported: only {KV_BITS} is")
    calibration = Calibration(work_dir)
    workspace = open_workspace(turbomind_dir)
    if num_tp != workspace.index.tensor_parallel_size:
        raise ConfigError(
            f"--num_tp={num_tp}, but the workspace is split for {workspace.index.tensor_parallel_size} ranks: "
            f"give --num_tp {workspace.index.tensor_parallel_size}, or convert with --tp {num_tp}"
        )
    check_same_model(calibration.manifest, workspace, work_dir)
    write_kv_scales(workspace, layer_scales(calibration, kv_sym=kv_sym, num_tp=num_tp))
    return workspace


def open_workspace(path: Path) -> Workspace:
    """The workspace that `path` is, or of which it is the folder of weights."""
    from tritonmind.weight_files import INDEX_NAME
    from tritonmind.workspace import Workspace

    return Workspace.open(path.resolve().parent if (path / INDEX_NAME).is_file() else path)


def layer_scales(calibration: Calibration, *, kv_sym: bool, num_tp: int) -> list[list[torch.Tensor]]:
    """By rank and layer: [k_scale, k_zero, v_scale, v_zero] fp32, over the KV heads of the rank."""
    import torch

    from tritonmind.kernels.kv_quant import asymmetric_scale, symmetric_scale
    from tritonmind_tools.lite.decoder_layer import KEY, VALUE
    from tritonmind_tools.lite.statistics import ABSMAX, MAX, MIN, statistic_name
    from tritonmind_tools.lite.work_dir import KEYS, VALUES

    by_kind = {KEY: calibration.statistics(KEYS), VALUE: calibration.statistics(VALUES)}

    def scale_and_zero(number: int, what: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        def heads(kind: str) -> torch.Tensor:
            return by_kind[what][statistic_name(number, what, kind)].chunk(num_tp)[rank]

        if kv_sym:
            return symmetric_scale(heads(ABSMAX).amax()), torch.tensor(0.0)
        return asymmetric_scale(heads(MIN).amin(), heads(MAX).amax())

    return [
        [
            torch.stack((*scale_and_zero(number, KEY, rank), *scale_and_zero(number, VALUE, rank)))
            for number in range(calibration.manifest.model.num_layers)
        ]
        for rank in range(num_tp)
    ]


def check_same_model(manifest: Manifest, workspace: Workspace, work_dir: Path) -> None:
    """Raise ConfigError unless the workspace is of the model that was calibrated.

    By its facts, and by the weight of its last norm, which no conversion and no quantising changes.
    """
    from tritonmind.tensor_layout import common_tensor_specs
    from tritonmind.weight_files import read_tensor
    from tritonmind_tools.lite.work_dir import hash_tensor

    for name in _SAME_FACTS:
        calibrated, converted = getattr(manifest.model, name), getattr(workspace.model, name)
        if calibrated != converted:
            raise ConfigError(
                f"--work_dir={work_dir} was calibrated for another model than {workspace.weights_dir} holds: "
                f"{name} is {calibrated} there, {converted} here"
            )
    spec = common_tensor_specs(workspace.model)[_LAST_NORM]
    norm = read_tensor(workspace.weights_dir / workspace.index.tensors[_LAST_NORM], spec)
    if hash_tensor(norm) != manifest.norm_sha256[spec.dtype]:
        raise ConfigError(
            f"--work_dir={work_dir} was calibrated for other weights than {workspace.weights_dir} holds: "
            f"{_LAST_NORM} differs; calibrate the checkpoint that the workspace was converted from"
        )
