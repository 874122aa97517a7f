"""The command line's frame: spellings, exit codes, one line for an error."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tritonmind.errors import CheckpointError, TritonmindError
from tritonmind_tools import cli, convert


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--dst_path", "a_b"], ["--dst-path", "a_b"]),
        (["--dst_path=a_b"], ["--dst-path=a_b"]),
        (["triton_client", "host_name:1"], ["triton_client", "host_name:1"]),
        (["--a_b", "--", "--c_d"], ["--a-b", "--", "--c_d"]),
        (["-x_y"], ["-x_y"]),
    ],
)
def test_option_names_accept_underscores(given: list[str], expected: list[str]) -> None:
    assert cli.normalise(given) == expected


def test_convert_defaults_are_the_functions() -> None:
    args = cli.build_parser().parse_args(["convert", "name", "path"])
    assert (args.dst_path, args.tp, args.weight_type) == (convert.DEFAULT_DESTINATION, convert.DEFAULT_TP, convert.AUTO)
    assert (args.tokenizer_path, args.force, args.triton_batch_dim) == (None, False, False)
    assert (args.model_format, args.group_size) == (convert.AUTO, 0)


@pytest.mark.parametrize(
    "command",
    [
        ["convert"],
        ["chat"],
        ["serve"],
        ["serve", "triton_server"],
        ["serve", "triton_client"],
        ["lite", "calibrate"],
        ["lite", "kv_qparams"],
        ["lite", "auto_awq"],
    ],
)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: tritonmind " + " ".join(command) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["convert", "name"], "PATH"),
        (["convert", "a", "b", "--tp", "x"], "--tp"),
        (
            ["chat", "a", "--temprature", "0"],
            "tritonmind chat: error: unknown argument --temprature: did you mean --temp",
        ),
        (["chat", "a", "--system", "caf\udce9"], "--system: 'caf\\udce9' is not UTF-8"),
        (["serve", "gradio", "a", "b"], "unknown argument b: `tritonmind serve gradio --help` lists them"),
    ],
)
def test_wrong_usage_is_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def failing(error: BaseException) -> argparse.Namespace:
    def run(args: argparse.Namespace) -> int:
        raise error

    return argparse.Namespace(run=run, debug=False)


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (CheckpointError("a.bin: first\n  second"), 1, "tritonmind: error: a.bin: first\n  second\n"),
        (TritonmindError("the cause \n\nThe log is x"), 1, "tritonmind: error: the cause\nThe log is x\n"),
        (OSError(28, "No space left on device", "/disk"), 1, "No space left on device: '/disk'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_keep_their_lines(
    error: BaseException,
    status: int,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, argv: failing(error))
    assert cli.main([]) == status
    captured = capsys.readouterr().err
    assert captured.endswith(shown) and captured.count("\n") == shown.count("\n")


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, argv: failing(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        cli.main([])


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert cli.main(["convert", "name", str(missing), "--dst_path", str(tmp_path / "workspace")]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["--debug", "convert", "name", str(missing), "--dst-path", str(tmp_path / "workspace")]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and f"error: {missing} does not exist" in shown
