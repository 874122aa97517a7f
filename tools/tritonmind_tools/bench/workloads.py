"""Lists of requests to measure with: the prompt and answer lengths of each, out of a file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from tritonmind.errors import ConfigError
from tritonmind_tools.text_data import read_entries

FILES = Path(__file__).resolve().parent / "workload_files"
COLUMNS = ("prompt_tokens", "output_tokens")
# Of ShareGPT's conversations the first question and answer are taken, if they are neither trivial nor too long.
MIN_TOKENS, MAX_PROMPT_TOKENS, MAX_TOKENS = 4, 1024, 2048

CountTokens = Callable[[str], int]


def read_workload(name_or_path: str, count_tokens: CountTokens | None = None) -> list[tuple[int, int]]:
    """Prompt and answer tokens of each request, in the file's order.

    name_or_path: mix1000, sharegpt3000, a CSV file with the columns prompt_tokens and output_tokens, or ShareGPT's
    conversations as JSON, whose texts count_tokens measures. Raises ConfigError naming the file, and the line of it
    that is wrong.
    """
    shipped = FILES / f"{name_or_path}.csv"
    path = shipped if shipped.parent == FILES and shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in FILES.glob("*.csv")))
        raise ConfigError(f"--workload={name_or_path!r} is no file and none of {names}")
    return _read_sharegpt(path, count_tokens) if holds_texts(name_or_path) else _read_csv(path)


def workload_name(name_or_path: str) -> str:
    """What rows call a workload."""
    return Path(name_or_path).stem


def holds_texts(name_or_path: str) -> bool:
    """Whether a workload's lengths must be counted by a tokenizer."""
    return Path(name_or_path).suffix == ".json"


def _read_csv(path: Path) -> list[tuple[int, int]]:
    try:
        return _lengths(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is no CSV file in UTF-8 ({error})") from None


def _lengths(path: Path) -> list[tuple[int, int]]:
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark before the first name
        reader = csv.DictReader(file, skipinitialspace=True)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(f"{path}: no column {', '.join(missing)}; the first line must name {', '.join(COLUMNS)}")
        requests = []
        for row in reader:
            if None in row:
                raise ConfigError(f"{path}, line {reader.line_num}: more values than the first line names columns")
            lengths = [row[name] or "" for name in COLUMNS]
            if not all(length.isdecimal() and int(length) for length in lengths):
                raise ConfigError(f"{path}, line {reader.line_num}: {lengths} must be two positive whole numbers")
            requests.append((int(lengths[0]), int(lengths[1])))
    if not requests:
        raise ConfigError(f"{path} names no requests")
    return requests


def _read_sharegpt(path: Path, count_tokens: CountTokens | None) -> list[tuple[int, int]]:
    if count_tokens is None:
        raise ConfigError(f"{path} holds texts: a tokenizer must count their tokens; name one with --tokenizer DIR")
    requests = []
    num_conversations = 0
    for conversation in read_entries(path):
        turns = conversation.get("conversations") if isinstance(conversation, dict) else None
        values = [turn.get("value") for turn in turns[:2] if isinstance(turn, dict)] if isinstance(turns, list) else []
        texts = [value for value in values if isinstance(value, str)]
        num_conversations += 1
        if len(texts) == 2:
            prompt, answer = map(count_tokens, texts)
            if min(prompt, answer) >= MIN_TOKENS and prompt <= MAX_PROMPT_TOKENS and prompt + answer <= MAX_TOKENS:
                requests.append((prompt, answer))
    if not requests:
        raise ConfigError(
            f"{path}: none of {num_conversations} entries is a conversation of ShareGPT with a question of "
            f"{MIN_TOKENS} to {MAX_PROMPT_TOKENS} tokens, and an answer that make at most {MAX_TOKENS} together"
        )
    return requests
