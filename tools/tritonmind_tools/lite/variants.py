"""A checkpoint in 4 bits in each way that `lite auto_awq` knows, over several draws of calibration samples: to compare.

`python -m tritonmind_tools.lite.variants MODEL DATASET DIRECTORY --w-group-size 64 --seeds 0 1 2` writes the
checkpoints DIRECTORY/search-0, smooth-0, search-1 ... and DIRECTORY/nearest, which needs no draw, and leaves what is
there already. Each draw's calibration lies beside its checkpoint, for `lite kv_qparams`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from tritonmind.checkpoints.reading import DEFAULT_GROUP_SIZE
from tritonmind.checkpoints.source import CONFIG
from tritonmind.errors import TritonmindError
from tritonmind_tools.lite.auto_awq import DEFAULT_SEARCH_TOKENS, auto_awq
from tritonmind_tools.lite.calibrate import DEFAULT_SAMPLES, DEFAULT_SEQLEN, calibrate
from tritonmind_tools.lite.options import DEVICES
from tritonmind_tools.lite.work_dir import CALIBRATION


def write_variants(args: argparse.Namespace) -> None:
    """Write what is missing of the variants."""

    def quantise(directory: Path, scaling: str) -> None:
        if (directory / CONFIG).is_file():
            return
        started = time.monotonic()
        auto_awq(
            args.model,
            directory,
            group_size=args.w_group_size,
            scaling=scaling,  # type: ignore[arg-type]
            search_tokens=args.search_tokens,
            device=args.device,
        )
        print(f"{directory}: {time.monotonic() - started:.1f} s", flush=True)

    quantise(args.directory / "nearest", "none")
    for seed in args.seeds:
        searched, smoothed = (args.directory / f"{kind}-{seed}" for kind in ("search", "smooth"))
        if not (searched / CALIBRATION).is_dir():
            started = time.monotonic()
            calibrate(
                args.model,
                searched,
                dataset=args.dataset,
                num_samples=args.calib_samples,
                seqlen=args.calib_seqlen,
                seed=seed,
                device=args.device,
            )
            print(f"{searched}: calibrated in {time.monotonic() - started:.1f} s", flush=True)
        shutil.copytree(searched / CALIBRATION, smoothed / CALIBRATION, dirs_exist_ok=True)
        quantise(searched, "search")
        quantise(smoothed, "smooth")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--w-group-size", type=int, default=DEFAULT_GROUP_SIZE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calib-samples", type=int, default=DEFAULT_SAMPLES)
    parser.add_argument("--calib-seqlen", type=int, default=DEFAULT_SEQLEN)
    parser.add_argument("--search-tokens", type=int, default=DEFAULT_SEARCH_TOKENS)
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[0])
    try:
        write_variants(parser.parse_args())
    except TritonmindError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
