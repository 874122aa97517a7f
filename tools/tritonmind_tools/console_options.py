"""Sampling options as a user types them, on a command line or after /set. SamplingParams itself is the validator."""

from __future__ import annotations

import argparse
import typing
from typing import Any

import msgspec

from tritonmind.errors import InvalidRequestError
from tritonmind.sampling_params import SamplingParams

# Field of SamplingParams -> what stands for its value, what it does. One that nobody would see anything of is missing.
OPTIONS: dict[str, tuple[str, str]] = {
    "max_tokens": ("N", "tokens an answer may have (default: what is left of session_len)"),
    "min_tokens": ("N", "tokens an answer must have before a token may end it"),
    "temperature": ("T", "0 always takes the likeliest token; higher is more varied"),
    "top_k": ("K", "draw among the K likeliest tokens; 0 is all"),
    "top_p": ("P", "draw among the likeliest tokens that together have probability P, above 0 and at most 1"),
    "min_p": ("P", "drop tokens less likely than this share of the likeliest, 0 to 1"),
    "repetition_penalty": ("X", "above 1 discourages tokens of prompt and answer"),
    "presence_penalty": ("X", "-2 to 2: above 0 discourages tokens that the answer has"),
    "frequency_penalty": ("X", "-2 to 2: the same, for each time that it has them"),
    "logit_bias": ("JSON", 'added to the logits of token ids, -100 to 100, as in {"42": -100}'),
    "bad_words": ("TEXT", "must not come in the answer; may be given again"),
    "seed": ("N", "the same seed gives the same answer"),
    "stop": ("TEXT", "ends the answer and is no part of it; may be given again"),
    "include_stop": ("", "the text that ends the answer is part of it"),
    "stop_token_ids": ("ID", "token id that ends the answer; may be given again"),
    "ignore_eos": ("", "go on past the token that ends an answer"),
    "skip_special_tokens": ("", "leave special tokens out of the text (default: yes)"),
}
_TYPES: dict[str, Any] = typing.get_type_hints(SamplingParams)
_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each of OPTIONS. Values stay texts until `sampling_options`."""
    group = parser.add_argument_group(
        "sampling", "defaults are those of the checkpoint's generation_config.json; /set changes them while talking"
    )
    for name, (metavar, text) in OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        if _TYPES[name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag, action="append" if _is_list(name) else "store", metavar=metavar, help=text)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingParams that a command line gives. Raises InvalidRequestError naming a wrong one."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    options = {
        name: parse_option(name, value) if _is_json(name) else _convert(name, value) for name, value in given.items()
    }
    SamplingParams(**options)
    return options


def parse_option(name: str, text: str) -> Any:
    """The value of one option. Lists and objects are JSON, a list of one item may be the item. InvalidRequestError."""
    check_option(name)
    if not _is_list(name) and not _is_json(name):
        return _convert(name, text)
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        value = text
    return _convert(name, [value] if _is_list(name) and not isinstance(value, list) else value)


def check_option(name: str) -> None:
    """Raise InvalidRequestError unless there is a sampling option of that name."""
    if name not in OPTIONS:
        raise InvalidRequestError("name", name, f"unknown option; known are {', '.join(OPTIONS)}")


def _is_list(name: str) -> bool:
    return typing.get_origin(_TYPES[name]) is tuple


def _is_json(name: str) -> bool:
    return typing.get_origin(_TYPES[name]) is dict


def _convert(name: str, value: Any) -> Any:
    try:
        return msgspec.convert(value, _TYPES[name], strict=False)
    except msgspec.ValidationError:
        raise InvalidRequestError(name, value, _expected(name)) from None


def _expected(name: str) -> str:
    if _is_json(name):
        return 'must be a JSON object of token ids and numbers, as in {"42": -100}'
    kind = next(kind for kind in (_TYPES[name], *typing.get_args(_TYPES[name])) if kind in _WORDS)
    return f"{'each ' if _is_list(name) else ''}must be {_WORDS[kind]}"
