"""`tritonmind lite auto_awq`: a checkpoint's linear weights to 4 bits, by what a calibration saw of its activations."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.checkpoints.reading import DEFAULT_GROUP_SIZE
from tritonmind.config import GROUP_SIZES, INT4_PER_WORD, ModelConfig
from tritonmind.errors import CheckpointError, ConfigError
from tritonmind_tools.lite.options import DEFAULT_WORK_DIR, add_common_options, boolean, pick_device
from tritonmind_tools.termination import sigterm_interrupts

if TYPE_CHECKING:
    import torch

    from tritonmind.checkpoints.awq_writer import AwqCheckpointWriter
    from tritonmind.checkpoints.plan import Part
    from tritonmind_tools.lite.layer_awq import QuantisedLayer, Scaling
    from tritonmind_tools.lite.layer_source import LayerSource
    from tritonmind_tools.lite.work_dir import Calibration

W_BITS = 4
# What the searches look at. Of SmolLM2-135M, alphas found on 2048 tokens lose at most 1 % of the loss on others.
DEFAULT_SEARCH_TOKENS = 4096
_SEARCH_SEQLEN = 512
# That a step along the outputs of qweight, qzeros and scales stands for.
_OUTPUTS_OF_AWQ = (INT4_PER_WORD, INT4_PER_WORD, 1)


def register(commands: Any) -> None:
    """Add `lite auto_awq`."""
    parser = commands.add_parser(
        "auto_awq",
        help="4-bit weights, as a checkpoint in work_dir",
        description="Quantise a checkpoint's linear weights to 4 bits by AWQ, with what `lite calibrate` saw. Writes "
        "an AWQ checkpoint into --work-dir, which `tritonmind convert --model-format awq` reads, and others read too.",
    )
    add_common_options(parser)
    parser.add_argument("--w-bits", type=int, default=W_BITS, help="only %(default)s")
    parser.add_argument(
        "--w-group-size",
        type=int,
        default=DEFAULT_GROUP_SIZE,
        help=f"input channels that share a scale: {', '.join(map(str, GROUP_SIZES))} (default: %(default)s)",
    )
    parser.add_argument(
        "--search-scale",
        type=boolean,
        default=True,
        help="False: the scales of the tutorial's formula, without searches (default: %(default)s)",
    )
    parser.add_argument(
        "--round-to-nearest",
        action="store_true",
        help="neither scales nor searches, to compare with; needs no calibration",
    )
    parser.add_argument(
        "--search-tokens",
        type=int,
        default=DEFAULT_SEARCH_TOKENS,
        help="of the calibration's, for the searches (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command line's `lite auto_awq`."""
    from tritonmind_tools.lite.progress import progress_bar

    started = time.monotonic()
    scaling: Scaling = "none" if args.round_to_nearest else "search" if args.search_scale else "smooth"
    with sigterm_interrupts(), progress_bar("quantising") as on_progress:
        model = auto_awq(
            args.model,
            args.work_dir,
            allow_pickle=args.allow_pickle,
            w_bits=args.w_bits,
            group_size=args.w_group_size,
            scaling=scaling,
            search_tokens=args.search_tokens,
            device=args.device,
            on_progress=on_progress,
        )
    print(
        f"{args.work_dir}: {model.num_layers} layers in {W_BITS} bits, groups of {model.group_size}, "
        f"scales: {scaling}, in {time.monotonic() - started:.1f} s"
    )
    return 0


def auto_awq(
    model: Path,
    work_dir: Path = DEFAULT_WORK_DIR,
    *,
    allow_pickle: bool = False,
    w_bits: int = W_BITS,
    group_size: int = DEFAULT_GROUP_SIZE,
    scaling: Scaling = "search",
    search_tokens: int = DEFAULT_SEARCH_TOKENS,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> ModelConfig:
    """Write the AWQ checkpoint of `model` into `work_dir`, where its calibration is; all of it or nothing.

    One layer's weights are in memory at a time. scaling: "none" needs no calibration. `on_progress` is called with the
    layers that are done and their number. Returns the configuration of what was written. Raises ConfigError for the
    options or a calibration of another model, CheckpointError for the checkpoint or a work_dir that holds another one.
    """
    from tritonmind.checkpoints.awq_writer import AwqCheckpointWriter
    from tritonmind_tools.lite.layer_source import LayerSource

    if w_bits != W_BITS:
        raise ConfigError(f"--w_bits={w_bits} is not supported: only {W_BITS} is")
    if search_tokens < 1:
        raise ConfigError(f"--search_tokens={search_tokens} must be at least 1")
    torch_device = pick_device(device)
    source = LayerSource(model, allow_pickle=allow_pickle)
    quantised = dataclasses.replace(source.model, weight_type="int4", group_size=group_size, unquantized_type="fp16")
    checkpoint = AwqCheckpointWriter(work_dir, quantised, source.checkpoint)
    calibration = None if scaling == "none" else open_calibration(work_dir, source)
    with checkpoint as writer:
        first, *last = source.unlayered().items()  # the embedding, and what comes after the layers
        writer.write({first[0]: source.tensor(first[1])})
        _quantise_layers(source, calibration, writer, quantised, scaling, search_tokens, torch_device, on_progress)
        for name, target in last:
            writer.write({name: source.tensor(target)})
        writer.commit()
    return quantised


def open_calibration(work_dir: Path, source: LayerSource) -> Calibration:
    """The calibration in work_dir. Raises ConfigError unless it is one of `source`."""
    from tritonmind_tools.lite.work_dir import Calibration

    calibration = Calibration(work_dir)
    if calibration.manifest.fingerprint != source.fingerprint():
        raise ConfigError(
            f"--work_dir={work_dir} holds the calibration of another model ({calibration.manifest.model.model_name}) "
            f"than --model={source.path}: give each model a work_dir of its own, or calibrate again"
        )
    return calibration


def _quantise_layers(
    source: LayerSource,
    calibration: Calibration | None,
    writer: AwqCheckpointWriter,
    model: ModelConfig,
    scaling: Scaling,
    search_tokens: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    import torch

    from tritonmind.layers.rotary import rotary_table
    from tritonmind_tools.lite.layer_awq import quantise_layer, run_layer
    from tritonmind_tools.lite.work_dir import INPUTS

    statistics = calibration.statistics(INPUTS) if calibration is not None else {}
    hidden = None
    seqlen = _SEARCH_SEQLEN
    if scaling == "search":
        assert calibration is not None
        tokens = calibration.tokens()[:, :_SEARCH_SEQLEN]
        seqlen = tokens.shape[1]
        hidden = source.embed(tokens[: -(-search_tokens // tokens.shape[1])])
    cos_sin = rotary_table(source.model, seqlen, device).cos_sin[-seqlen:]
    with torch.inference_mode():
        for number in range(model.num_layers):
            layer = source.layer(number, cos_sin)
            inputs = run_layer(layer, hidden, device) if hidden is not None else None
            try:
                quantised = quantise_layer(
                    layer,
                    _of_layer(statistics, number, device) if statistics else {},
                    inputs,
                    group_size=model.group_size,
                    scaling=scaling,
                )
            except ValueError as error:  # NaN, which a calibration would have found, or too much for fp16
                raise CheckpointError(f"{source.path}: layer {number}: {error}") from None
            writer.write(_by_checkpoint_name(source, number, quantised))
            del layer, inputs, quantised  # before the next one is read
            if on_progress is not None:
                on_progress(number + 1, model.num_layers)


def _of_layer(
    statistics: dict[str, torch.Tensor], number: int, device: torch.device
) -> dict[str, dict[str, torch.Tensor]]:
    from tritonmind_tools.lite.decoder_layer import LINEAR_INPUTS
    from tritonmind_tools.lite.statistics import ABSMAX, ABSMEAN, statistic_name

    return {
        name: {kind: statistics[statistic_name(number, name, kind)].to(device) for kind in (ABSMAX, ABSMEAN)}
        for name in LINEAR_INPUTS
    }


def _by_checkpoint_name(source: LayerSource, number: int, quantised: QuantisedLayer) -> dict[str, Any]:
    """A layer's tensors as AwqCheckpointWriter takes them: under the names that the checkpoint has for them."""
    import torch

    from tritonmind.kernels.awq_format import AwqWeight
    from tritonmind_tools.lite.decoder_layer import QKV, W1, W2, W3, WO

    layer = quantised.layer
    values: dict[str, Any] = {
        "attention_norm.weight": layer.attention_norm,
        "attention.q_norm.weight": layer.q_norm,
        "attention.k_norm.weight": layer.k_norm,
        f"{QKV}.weight": AwqWeight(*(torch.cat(kind, 1) for kind in zip(*quantised[1:4], strict=True))),
        f"{QKV}.bias": layer.qkv_bias,
        f"{WO}.weight": quantised.wo,
        f"{WO}.bias": layer.o_bias,
        "ffn_norm.weight": layer.ffn_norm,
        f"{W1}.weight": quantised.w1,
        f"{W3}.weight": quantised.w3,
        f"{W2}.weight": quantised.w2,
    }
    named: dict[str, Any] = {}
    for target, parts in source.layer_parts(number).items():
        value = values[target]
        if len(parts) == 1:
            pieces = {parts[0].source: value}
        elif isinstance(value, AwqWeight):
            kinds = [taken_apart(kind, parts, 1, units) for kind, units in zip(value, _OUTPUTS_OF_AWQ, strict=True)]
            pieces = {name: AwqWeight(*(kind[name] for kind in kinds)) for name in kinds[0]}
        else:
            pieces = taken_apart(value, parts, 0, 1)
        for name, piece in pieces.items():
            named[name.removesuffix(".weight") if isinstance(piece, AwqWeight) else name] = piece
    return named


def taken_apart(value: torch.Tensor, parts: Sequence[Part], dim: int, outputs: int) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors that parts of `value` make up, which lie in it one after the other along `dim`.

    outputs: of the linear layer, that one step along `dim` stands for, where the parts are of its rows.
    """
    import torch

    sizes = [(part.stop - part.start) // outputs for part in parts]
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for part, piece in zip(parts, value.split(sizes, dim), strict=True):
        found.setdefault(part.source, []).append((part.start, piece))
    return {
        name: torch.cat([piece for _, piece in sorted(pieces, key=lambda item: item[0])], dim)
        for name, pieces in found.items()
    }
