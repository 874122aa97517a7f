"""`tritonmind lite calibrate`: what a checkpoint's linear inputs, K and V look like on samples of text."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonmind.errors import ConfigError
from tritonmind_tools.lite.options import DEFAULT_WORK_DIR, add_common_options, pick_device

if TYPE_CHECKING:
    import torch

    from tritonmind.config import ModelConfig
    from tritonmind_tools.lite.layer_source import LayerSource
    from tritonmind_tools.lite.work_dir import CalibrationState, Manifest

DEFAULT_DATASET = "c4"
DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 2048
# The least time between two states on the disk: writing one takes seconds for a model of 7B.
STATE_INTERVAL_S = 60.0

OnProgress = Callable[[int, int], None]


def register(commands: Any) -> None:
    """Add `lite calibrate`."""
    parser = commands.add_parser(
        "calibrate",
        help="measure a checkpoint's activations on samples of text",
        description="Measure a checkpoint's activations on samples of text, layer by layer. An interrupted run goes on "
        "where it was when the same command is given again.",
    )
    add_common_options(parser)
    parser.add_argument(
        "--calib-dataset",
        default=DEFAULT_DATASET,
        help="a .txt, .jsonl or ShareGPT .json file, or c4, ptb, wikitext2, pileval (default: %(default)s)",
    )
    parser.add_argument("--calib-path", type=Path, help="local copy of the dataset that --calib-dataset names")
    parser.add_argument("--allow-download", action="store_true", help="a named dataset may come from the hub")
    parser.add_argument("--calib-samples", type=int, default=DEFAULT_SAMPLES, help="default: %(default)s")
    parser.add_argument("--calib-seqlen", type=int, default=DEFAULT_SEQLEN, help="tokens of one (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of samples (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command line's `lite calibrate`."""
    from tritonmind_tools.lite.progress import progress_bar

    started = time.monotonic()
    with progress_bar("calibrating") as on_progress:
        manifest = calibrate(
            args.model,
            args.work_dir,
            dataset=args.calib_dataset,
            dataset_path=args.calib_path,
            allow_pickle=args.allow_pickle,
            allow_download=args.allow_download,
            num_samples=args.calib_samples,
            seqlen=args.calib_seqlen,
            seed=args.seed,
            device=args.device,
            on_progress=on_progress,
        )
    print(
        f"{args.work_dir}: {manifest.model.num_layers} layers, {manifest.samples} samples of {manifest.seqlen} tokens, "
        f"on {manifest.device} in {time.monotonic() - started:.1f} s"
    )
    return 0


def calibrate(
    model: Path,
    work_dir: Path = DEFAULT_WORK_DIR,
    *,
    dataset: str = DEFAULT_DATASET,
    dataset_path: Path | None = None,
    allow_pickle: bool = False,
    allow_download: bool = False,
    num_samples: int = DEFAULT_SAMPLES,
    seqlen: int = DEFAULT_SEQLEN,
    seed: int = 0,
    device: str = "auto",
    state_interval_s: float = STATE_INTERVAL_S,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Write the statistics of the checkpoint `model` to `work_dir`.

    One layer's weights are in memory at a time, beside the hidden states of all samples. `on_progress` is called with
    the samples that went through a layer and their total. Raises ConfigError for the options, CheckpointError for the
    checkpoint, NaN in an activation included.
    """
    from tritonmind.chat_template import load_chat_template
    from tritonmind.tokenizer import Tokenizer
    from tritonmind_tools.lite.layer_source import LayerSource
    from tritonmind_tools.lite.samples import draw_samples, open_documents
    from tritonmind_tools.lite.work_dir import CalibrationState, Manifest, hash_tensor, norm_hashes

    for option, value in (("--calib_samples", num_samples), ("--calib_seqlen", seqlen)):
        if value < 1:
            raise ConfigError(f"{option}={value} must be at least 1")
    documents = open_documents(dataset, dataset_path, allow_download=allow_download)
    source = LayerSource(model, allow_pickle=allow_pickle)
    if seqlen > source.model.max_position_embeddings:
        raise ConfigError(
            f"--calib_seqlen={seqlen} is more than the model's max_position_embeddings="
            f"{source.model.max_position_embeddings}"
        )
    torch_device = pick_device(device)
    _check_host_memory(source.model, num_samples, seqlen, torch_device.type)
    tokenizer = Tokenizer.from_dir(source.tokenizer_dir)
    template = load_chat_template(source.tokenizer_dir, tokenizer.special_tokens)
    tokens = draw_samples(documents, tokenizer, template, num_samples=num_samples, seqlen=seqlen, seed=seed)
    manifest = Manifest(
        fingerprint=source.fingerprint(),
        norm_sha256=norm_hashes(source.tensor("norm.weight")),
        model=source.model,
        dataset=dataset,
        samples=num_samples,
        seqlen=seqlen,
        seed=seed,
        tokens_sha256=hash_tensor(tokens),
        device=torch_device.type,
    )
    state = CalibrationState(work_dir, manifest, tokens)
    _run_layers(source, state, tokens, torch_device, state_interval_s, on_progress)
    state.finish()
    return manifest


def host_bytes(model: ModelConfig, num_samples: int, seqlen: int, device: str) -> int:
    """Host memory in bytes that calibrating takes beside the interpreter and PyTorch: no more for more layers.

    The hidden states of all samples; a layer's weights in fp32, and once more while its parts are put together; on a
    CPU the values inside the layer, of one sample. While embeddings are looked up, that table instead of a layer.
    """
    size = 4  # fp32
    qkv_size = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer = model.hidden_size * (qkv_size + model.num_heads * model.head_dim + 3 * model.intermediate_size)
    inside = seqlen * (4 * model.hidden_size + 4 * qkv_size + 4 * model.intermediate_size)
    table = model.vocab_size * model.hidden_size
    return size * (
        num_samples * seqlen * model.hidden_size + max(2 * layer + (inside if device == "cpu" else 0), table)
    )


def _check_host_memory(model: ModelConfig, num_samples: int, seqlen: int, device: str) -> None:
    from tritonmind.engine.host_memory import available_bytes

    needed, available = host_bytes(model, num_samples, seqlen, device), available_bytes()
    if needed > available:
        raise ConfigError(
            f"--calib_samples={num_samples} of --calib_seqlen={seqlen} need {needed / 1e9:.1f} GB of host memory, "
            f"{available / 1e9:.1f} GB are free: lower one of the two"
        )


def _run_layers(
    source: LayerSource,
    state: CalibrationState,
    tokens: torch.Tensor,
    device: torch.device,
    state_interval_s: float,
    on_progress: OnProgress | None,
) -> None:
    import torch

    from tritonmind.layers.rotary import rotary_table
    from tritonmind_tools.lite.statistics import LayerStatistics

    num_samples, seqlen = tokens.shape
    num_layers = source.model.num_layers
    if state.num_done == num_layers:
        return
    cos_sin = rotary_table(source.model, seqlen, device).cos_sin[-seqlen:]
    hidden = state.hidden() if state.num_done else source.embed(tokens)
    saved_at = time.monotonic()
    with torch.inference_mode():
        for number in range(state.num_done, num_layers):
            layer = source.layer(number, cos_sin)
            statistics = LayerStatistics(source.model, number, device)
            for sample in range(num_samples):
                after = layer.forward(hidden[sample].to(device), statistics.observe)
                hidden[sample] = after.to(hidden.device)
                if on_progress is not None:
                    on_progress(number * num_samples + sample + 1, num_layers * num_samples)
            del layer  # before the next one is read
            state.save_layer(number, statistics.tensors())
            if number + 1 < num_layers and time.monotonic() - saved_at >= state_interval_s:
                state.save_hidden(number + 1, hidden)
                saved_at = time.monotonic()
