"""Options that the measurements of an engine share: the model, and how its engine is configured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from tritonmind.config import QuantPolicy
from tritonmind.config_ini import SETTINGS
from tritonmind.errors import ConfigError
from tritonmind.random_model import AUTO, INT4, PREFIX, SHAPES, known_shape
from tritonmind_tools.bench.workloads import holds_texts

DEFAULT_SHAPE = "llama2-7b"
DTYPES = (AUTO, "fp32", "bf16", "fp16")


def add_model_options(parser: argparse.ArgumentParser, what: str = "workspace, or the checkpoint of one") -> None:
    """The model: a positional path, or --shape."""
    parser.add_argument("workspace", nargs="?", help=what)
    parser.add_argument(
        "--shape",
        type=known_shape,
        choices=sorted(SHAPES),
        help="random weights of this shape instead, without any files",
    )


def add_layers_shape(parser: argparse.ArgumentParser) -> None:
    """--shape of a model whose kernels are measured one by one."""
    parser.add_argument(
        "--shape", type=known_shape, choices=sorted(SHAPES), default=DEFAULT_SHAPE, help="default %(default)s"
    )


def add_engine_options(parser: argparse.ArgumentParser, *, one_quant_policy: bool = True) -> None:
    """--dtype, --num-threads and --engine-options, and --quant-policy unless a measurement has several."""
    add_dtype(parser)
    if one_quant_policy:
        add_quant_policy(parser)
    parser.add_argument("--num-threads", type=int, default=0, help="CPU threads, 0 for PyTorch's choice")
    parser.add_argument(
        "--engine-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings of config.ini or of the engine, over those of the measurement",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype, as named_shape and engine_dtype read it."""
    parser.add_argument(
        "--dtype",
        default=AUTO,
        choices=(*DTYPES, INT4),
        help=f"to compute in; {INT4}: fp16 with 4-bit weights, of a --shape (a workspace's weights are what they are)",
    )


def add_quant_policy(parser: argparse.ArgumentParser) -> None:
    """--quant-policy, as chosen_settings reads it."""
    parser.add_argument(
        "--quant-policy",
        dest="one_quant_policy",
        type=int,
        choices=[int(policy) for policy in QuantPolicy],
        help="of the KV cache: 8 is int8 with a scale for each token, 4 with calibrated ones (default: config.ini's)",
    )


def model_path(args: argparse.Namespace) -> str:
    """What start_engine and open_model take. Raises ConfigError unless exactly one of path and shape is given."""
    if (args.workspace is None) == (args.shape is None):
        raise ConfigError("give either a workspace (or checkpoint) or --shape NAME, and not both")
    if args.shape is not None:
        return PREFIX + named_shape(args)
    refuse_int4(args)
    return str(args.workspace)


def named_shape(args: argparse.Namespace) -> str:
    """What RandomModel takes: --shape, with what --dtype says of its weights."""
    return str(args.shape) + (f":{INT4}" if args.dtype == INT4 else "")


def refuse_int4(args: argparse.Namespace) -> None:
    """Raises ConfigError where --dtype asks for 4-bit weights of a model that is given."""
    if args.dtype == INT4:
        raise ConfigError(f"--dtype={INT4} is for random weights, with --shape: a workspace has the weights it has")


def engine_dtype(args: argparse.Namespace) -> str:
    """What an engine and open_model take as `dtype`: 4-bit weights stand in the model's name."""
    return AUTO if args.dtype == INT4 else str(args.dtype)


def check_tokenizer(args: argparse.Namespace) -> None:
    """Raise ConfigError where --tokenizer has nothing to count."""
    if args.tokenizer and not (args.workload and holds_texts(args.workload)):
        raise ConfigError(f"--tokenizer={args.tokenizer!r} counts the texts of a .json --workload; leave it out")


def token_counter(args: argparse.Namespace) -> Callable[[str], int] | None:
    """How many tokens a text has: by the tokenizer in --tokenizer, else by the model's own; None where there is none.

    Raises CheckpointError for a folder without one.
    """
    from tritonmind.model_source import open_model
    from tritonmind.tokenizer import Tokenizer

    if not args.tokenizer and args.shape is not None:
        return None
    tokenizer = Tokenizer.from_dir(Path(args.tokenizer) if args.tokenizer else open_model(args.workspace).tokenizer_dir)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def engine_overrides(args: argparse.Namespace, **own: object) -> dict[str, object]:
    """Overrides for the engine: `own`, which a measurement needs, and over them --engine-options.

    Raises ConfigError for an option that is not of the form key=value; the engine's configuration checks the rest.
    """
    overrides = {
        "enable_prefix_caching": False,
        # The check would still run when the first request of a round comes.
        "check_integrity_when_idle": False,
        "num_threads": args.num_threads,
        "dtype": engine_dtype(args),
        **own,
    }
    return overrides | chosen_settings(args)


def chosen_settings(args: argparse.Namespace) -> dict[str, object]:
    """What --quant-policy and --engine-options say. Raises ConfigError where both say the same."""
    chosen: dict[str, object] = dict(key_values(args.engine_options))
    policy = getattr(args, "one_quant_policy", None)
    if policy is not None:
        if "quant_policy" in chosen:
            raise ConfigError("--engine-options: quant_policy is given twice, by --quant-policy too")
        chosen["quant_policy"] = policy
    return chosen


def key_values(options: Sequence[str]) -> dict[str, str]:
    """--engine-options by the names of the configuration's fields, whichever of its two names each was given."""
    chosen: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals):
            raise ConfigError(f"--engine-options={option!r} must be like max_context_token_num=8192")
        name = SETTINGS[key][1] if key in SETTINGS else key
        if name in chosen:
            raise ConfigError(f"--engine-options: {key} is given twice")
        chosen[name] = value
    return chosen
