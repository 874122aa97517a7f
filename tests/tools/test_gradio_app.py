"""`serve gradio` without Gradio: what its words name, and what the model gets of a chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.fake_transport import FakeTransport

from tritonmind.errors import ConfigError, UnavailableError
from tritonmind_tools import gradio_app
from tritonmind_tools.api_client import ApiServer
from tritonmind_tools.cli import build_parser, normalise
from tritonmind_tools.console_transport import Status
from tritonmind_tools.gradio_app import chat_view
from tritonmind_tools.gradio_app.session import Sessions
from tritonmind_tools.ports import free_port
from tritonmind_tools.triton_client import TritonServer


class Opened(Exception):
    """How a source would have been opened."""


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def opener(kind: str) -> Any:
        def open_it(name: str, *args: Any, **options: Any) -> None:
            raise Opened(kind, name, *args, options)

        return open_it

    monkeypatch.setattr(gradio_app.api_client, "ApiServer", opener("api"))
    monkeypatch.setattr(gradio_app.triton_client, "TritonServer", opener("triton"))
    monkeypatch.setattr(gradio_app.chat, "LocalEngine", opener("engine"))


def words(line: str) -> Any:
    return build_parser().parse_args(normalise(["serve", "gradio", *line.split()]))


API = {"api_key": None, "model": None}


@pytest.mark.parametrize(
    ("line", "source"),
    [
        ("http://0.0.0.0:23333 --restful_api True", ("api", "http://0.0.0.0:23333", API)),
        ("localhost:23333 --restful_api True", ("api", "http://localhost:23333", API)),
        ("https://h --api_key k --model_name m", ("api", "https://h", {"api_key": "k", "model": "m"})),
        ("localhost:33337 --restful_api False", ("triton", "localhost:33337", {})),
        ("[::1]:33337", ("triton", "[::1]:33337", {})),
        ("./workspace", ("engine", "./workspace", {"max_num_seqs": 32}, {})),
        ("a/b:1", ("engine", "a/b:1", {"max_num_seqs": 32}, {})),
        (
            "m --batch_size 4 --tp 2 --session_len 99",
            ("engine", "m", {"max_num_seqs": 4, "session_len": 99, "tensor_parallel_size": 2}, {}),
        ),
    ],
)
@pytest.mark.usefixtures("opened")
def test_what_is_named(line: str, source: tuple[Any, ...]) -> None:
    with pytest.raises(Opened) as caught:
        gradio_app.open_source(words(line))
    assert caught.value.args == source


@pytest.mark.usefixtures("opened")
def test_a_folder_goes_before_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model:7").mkdir()
    with pytest.raises(Opened) as caught:
        gradio_app.open_source(words("model:7"))
    assert caught.value.args[0] == "engine"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("http://h --session_len 9", "--session-len means nothing to the API server at http://h"),
        ("localhost:33337 --model_name m", "--model-name means nothing to the Triton server at localhost:33337"),
        ("./workspace --api_key k", "--api-key means nothing to an engine of its own"),
    ],
)
@pytest.mark.usefixtures("opened")
def test_an_option_of_another_source_is_refused(line: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        gradio_app.open_source(words(line))


def test_where_nobody_can_listen() -> None:
    for option, problem in (
        ("--server_port 70000", "--server_port=70000 must be 1 to 65535"),
        ("--server_name 192.0.2.1", "cannot listen on the address '192.0.2.1'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            gradio_app.run(words(f"localhost:33337 {option}"))


def test_servers_that_are_not_there() -> None:
    for source in (ApiServer(f"http://localhost:{free_port()}"), TritonServer(f"localhost:{free_port()}")):
        with pytest.raises(UnavailableError, match=r"answers at .*localhost"):
            source.connect()
        assert not source.status().is_ready


@pytest.mark.parametrize("line", ["m --restful_api maybe", "m --batch_size 0", "m --tp x", ""])
def test_wrong_words(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        words(line)
    assert "usage: " in capsys.readouterr().err


def test_defaults_are_for_this_machine_only() -> None:
    args = words("m")
    assert (args.server_name, args.server_port, args.share) == ("127.0.0.1", 6006, False)


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tritonmind\[gradio\]'"):
        gradio_app.run(words("m"))


def test_without_what_a_client_needs_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("api_client http://h", "triton_client h:1"):
        args = build_parser().parse_args(["serve", *command.split()])
        with pytest.raises(ConfigError, match=r"pip install 'tritonmind\[client\]'"):
            args.run(args)


def test_what_the_model_gets_of_a_chat() -> None:
    def shown(role: str, text: str, **metadata: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}], "metadata": metadata or None}

    chat = [
        shown("user", "one"),
        shown("assistant", "so I think", title="Reasoning"),
        shown("assistant", "1"),
        shown("user", "failed"),
        shown("assistant", "begun", id=chat_view.FAILED),
        shown("user", "only thought about"),
        shown("assistant", "hm", title="Reasoning"),
        shown("user", "empty"),
        shown("assistant", " "),
        shown("user", "last"),
    ]
    contents = [(message["role"], message["content"]) for message in chat_view.model_messages(chat, "Be brief.")]
    assert contents == [("system", "Be brief."), ("user", "one"), ("assistant", "1"), ("user", "last")]
    assert chat_view.model_messages(chat[:3], " ")[0]["role"] == "user"
    assert [chat_view.last_question(chat, index) for index in (0, 2, 4, None)] == [0, 0, 3, 9]


def test_nothing_shown_is_markup_of_others() -> None:
    assert "<b>" not in chat_view.header(Status(is_ready=False, text="<b>"))
    assert "<b>" not in chat_view.problem(ConfigError("<b>"))


def test_answers_beyond_the_limit_wait_and_can_be_given_up() -> None:
    class Fakes:
        def connect(self) -> FakeTransport:
            return FakeTransport()

        def status(self) -> Status:
            return Status(is_ready=True, text="fakes")

        def close(self) -> None:
            pass

    sessions = Sessions(Fakes(), num_answers=1)
    message = {"role": "user", "content": "slow"}
    running = sessions.get("first").ask([message], {})
    waiting = [sessions.get(name).ask([message | {"content": "one"}], {}) for name in ("second", "third")]
    waiting[0].stop()
    waiting[0].wait(30)
    assert waiting[0].was_stopped and not waiting[0].text
    assert not waiting[1].is_done and not waiting[1].text and not running.is_done
    running.stop()
    waiting[1].wait(30)
    assert waiting[1].text == "said: one"
    sessions.close()
