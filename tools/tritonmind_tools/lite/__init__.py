"""`tritonmind lite`: calibrates checkpoints and quantises them."""

from __future__ import annotations

import argparse
from typing import Any

from tritonmind_tools.lite import auto_awq, calibrate, kv_qparams


def register(commands: Any) -> None:
    """Add `lite` and its commands to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser("lite", help="calibrate and quantise a checkpoint")
    kinds = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    calibrate.register(kinds)
    kv_qparams.register(kinds)
    auto_awq.register(kinds)
