"""The adapter between a Triton server and tritonmind: tensors to requests, answers to responses. No model code.

The server imports this file twice, in a short-lived process for auto_complete_config and in the one that serves, so
nothing here imports torch: the engine runs in a process of its own. All threads are those of `tritonmind.serving`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import triton_python_backend_utils as pb_utils

from tritonmind.chat_template import load_chat_template
from tritonmind.config import DRAIN_FILE_VARIABLE
from tritonmind.engine.client import EngineClient
from tritonmind.engine.launch import start_engine
from tritonmind.errors import ConfigError, TritonmindError
from tritonmind.live_request import Answer
from tritonmind.metrics import Metrics
from tritonmind.request_fields import INPUTS, OUTPUTS, ParsedRequest, parse_request
from tritonmind.sampling_params import GenerationDefaults
from tritonmind.serving import DEFAULT_DRAIN_TIMEOUT_S, DEFAULT_PRIORITY, RequestServer
from tritonmind.sessions import DEFAULT_MAX_SESSION_TOKENS, DEFAULT_MAX_SESSIONS, SessionStore
from tritonmind.supervisor import EngineFailurePolicy
from tritonmind.tokenizer import Tokenizer
from tritonmind.workspace import Workspace

MAX_KEPT_TENSORS = 1024
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """What a Triton server asks of a model: auto_complete_config, initialize, execute, is_ready, finalize."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Add the tensors that config.pbtxt leaves out and make the model decoupled. What is configured stays."""
        for fields, add in (
            (INPUTS, auto_complete_model_config.add_input),
            (OUTPUTS, auto_complete_model_config.add_output),
        ):
            configured = {
                tensor["name"]
                for tensor in auto_complete_model_config.as_dict()["input" if fields is INPUTS else "output"]
            }
            for field in fields:
                if field.name not in configured:
                    tensor = {"name": field.name, "data_type": field.data_type, "dims": [field.dims]}
                    add(tensor | {"optional": True} if fields is INPUTS else tensor)
        auto_complete_model_config.set_model_transaction_policy({"decoupled": True})
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the workspace's text side and start the engine. A failure's message is the user's to read."""
        _log_to_server()
        config = json.loads(args["model_config"])
        parameters = _parameters(config)
        policy = parameters.pop("engine_failure", "restart")
        if policy not in get_args(EngineFailurePolicy):
            raise ConfigError(f"config.pbtxt: engine_failure={policy!r} must be restart or exit")
        drain_timeout = _seconds("drain_timeout_s", parameters.pop("drain_timeout_s", DEFAULT_DRAIN_TIMEOUT_S))
        sessions = SessionStore(
            max_sessions=_count("max_sessions", parameters.pop("max_sessions", DEFAULT_MAX_SESSIONS)),
            max_tokens=_count("max_session_tokens", parameters.pop("max_session_tokens", DEFAULT_MAX_SESSION_TOKENS)),
        )
        priority = _count("default_priority", parameters.pop("default_priority", DEFAULT_PRIORITY))
        self._tensors = _OutputTensors(batched=config["max_batch_size"] > 0)
        workspace = Workspace.open(Path(args["model_repository"]) / args["model_version"])
        tokenizer = Tokenizer.from_dir(workspace.tokenizer_dir)

        def start() -> EngineClient:
            return start_engine(str(workspace.version_dir), parameters)

        self._server = RequestServer(
            tokenizer=tokenizer,
            chat_template=load_chat_template(workspace.tokenizer_dir, tokenizer.special_tokens),
            defaults=GenerationDefaults.from_dir(workspace.tokenizer_dir),
            model=workspace.model,
            start=start,
            sessions=sessions,
            metrics=_metrics({"model": args["model_name"], "version": args["model_version"]}),
            default_priority=priority,
            engine_failure=cast(EngineFailurePolicy, policy),
            on_engine_exit=_stop_server,
            should_drain=_should_drain,
            drain_timeout=drain_timeout,
        )

    def execute(self, requests: list[Any]) -> None:
        """Take requests in and return; the answers come from other threads."""
        for request in requests:
            responder = _TritonResponder(request.get_response_sender(), self._tensors)
            try:
                parsed = _parse(request)
            except TritonmindError as error:
                self._server.refuse(responder, error)
            except Exception as error:
                # An exception that leaves execute() would fail the other requests of this call too.
                logging.getLogger("tritonmind").exception("a request could not be read")
                self._server.refuse(responder, TritonmindError(f"internal error: {error!r}"))
            else:
                responder.outputs = [name for name in _VALUES if name in parsed.outputs]
                self._server.accept(parsed, responder)

    def is_ready(self) -> bool:
        """Whether the engine can take requests (asked by servers from 26.03 on)."""
        return self._server.is_ready()

    def finalize(self) -> None:
        """Let live requests end for drain_timeout_s, end the rest, stop threads and engine.

        Servers call this after the last request has ended; a server that is told to exit waits for that at most
        its --exit-timeout-secs. Whoever stops the server creates the drain file first, so that requests end in time.
        """
        server = getattr(self, "_server", None)  # absent when initialize failed
        if server is not None:
            server.close()


# The values of each output tensor, and their type.
_VALUES: dict[str, tuple[Callable[[list[Answer]], list[Any]], Any]] = {
    "text_output": (lambda answers: [answer.text.encode() for answer in answers], np.object_),
    "token_ids": (lambda answers: [token_id for answer in answers for token_id in answer.token_ids], np.int32),
    "finish_reason": (lambda answers: [(answer.finish_reason or "").encode() for answer in answers], np.object_),
    "stop_reason": (lambda answers: [(answer.stop_reason or "").encode() for answer in answers], np.object_),
    "num_input_tokens": (lambda answers: [answers[0].num_input_tokens], np.uint32),
    "num_output_tokens": (lambda answers: [answer.num_output_tokens for answer in answers], np.uint32),
    "num_cached_tokens": (lambda answers: [answers[0].num_cached_tokens], np.uint32),
    "cumulative_logprob": (lambda answers: [answer.cumulative_logprob for answer in answers], np.float32),
    "prompt_logprobs": (lambda answers: [json.dumps(answers[0].prompt_logprobs).encode()], np.object_),
    "logprobs": (lambda answers: [json.dumps(answer.logprobs or None).encode() for answer in answers], np.object_),
}
# Nearly always the same few values.
_REPEATED = {"finish_reason", "stop_reason", "num_input_tokens", "num_output_tokens", "num_cached_tokens"}


class _OutputTensors(threading.local):
    """Makes output tensors, which takes the server's library 10 to 30 us each: those that come again are kept.

    Each thread keeps its own, because their first sending writes to them without the interpreter's lock.
    """

    def __init__(self, *, batched: bool) -> None:
        self._shape = (1, -1) if batched else (-1,)
        self._kept: dict[tuple[Any, ...], Any] = {}

    def of(self, answers: list[Answer], names: list[str]) -> list[Any]:
        """The tensors that say what is in `answers`."""
        tensors = []
        for name in names:
            values, dtype = _VALUES[name]
            data = values(answers)
            if name not in _REPEATED:
                tensors.append(self._make(name, data, dtype))
                continue
            key = name, *data
            tensor = self._kept.get(key)
            if tensor is None:
                if len(self._kept) >= MAX_KEPT_TENSORS:
                    self._kept.clear()
                tensor = self._kept[key] = self._make(name, data, dtype)
            tensors.append(tensor)
        return tensors

    def _make(self, name: str, data: list[Any], dtype: Any) -> Any:
        return pb_utils.Tensor(name, np.array(data, dtype=dtype).reshape(self._shape))


class _TritonResponder:
    """One request's way back to its client.

    The server frees what is_cancelled asks about when it gets the last response, without looking whether somebody is
    asking, and crashes then (seen with 2.51). So the two exclude each other.
    """

    def __init__(self, sender: Any, tensors: _OutputTensors) -> None:
        self.outputs: list[str] = []
        self._sender = sender
        self._tensors = tensors
        self._asking_or_ending = threading.Lock()
        self._ended = False

    def send(self, answers: list[Answer], *, final: bool) -> None:
        tensors = self._tensors.of(answers, self.outputs)
        response = pb_utils.InferenceResponse(output_tensors=tensors)
        if final:
            self._end(response)
        else:
            self._sender.send(response)

    def fail(self, error: TritonmindError) -> None:
        code = getattr(pb_utils.TritonError, error.code)
        response = pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error), code))
        self._end(response)

    def finish(self) -> None:
        self._end(None)

    def is_cancelled(self) -> bool:
        with self._asking_or_ending:
            return not self._ended and self._sender.is_cancelled()

    def _end(self, response: Any | None) -> None:
        with self._asking_or_ending:
            # Even if this fails: the server may have seen it, and then asking it is fatal.
            self._ended = True
            if response is None:
                self._sender.send(flags=FINAL)
            else:
                self._sender.send(response, flags=FINAL)


class _ServerLogHandler(logging.Handler):
    """Writes log records to the Triton server's log."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = pb_utils.Logger
        if record.levelno >= logging.ERROR:
            write = logger.log_error
        else:
            write = logger.log_warn if record.levelno >= logging.WARNING else logger.log_info
        write(f"tritonmind: {self.format(record)}")


def _log_to_server() -> None:
    log = logging.getLogger("tritonmind")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [_ServerLogHandler() if hasattr(pb_utils, "Logger") else logging.StreamHandler()]


def _parse(request: Any) -> ParsedRequest:
    # The server lets declared inputs through only, each once.
    tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    parameters = json.loads(request.parameters() or "{}")
    # A gRPC client's timeout comes here, that of the generate endpoint among the parameters.
    if request.timeout():
        parameters.setdefault("timeout", request.timeout())
    return parse_request(tensors, parameters, request.requested_output_names(), request_id=request.request_id())


def _parameters(config: dict[str, Any]) -> dict[str, object]:
    """config.pbtxt's parameters: numbers and booleans as such, empty ones left out.

    Those in capitals are the Python backend's own (EXECUTION_ENV_PATH, FORCE_CPU_ONLY_INPUT_TENSORS).
    """
    parameters: dict[str, object] = {}
    for name, entry in config.get("parameters", {}).items():
        text = entry["string_value"]
        if text == "" or name.isupper():
            continue
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        parameters[name] = value if isinstance(value, (int, float, bool)) else text
    return parameters


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigError(f"config.pbtxt: {name}={value!r} must be a number of seconds, 0 or more")
    return float(value)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"config.pbtxt: {name}={value!r} must be a whole number from 1 to {2**31 - 1}")
    return value


def _metrics(labels: dict[str, str]) -> Metrics:
    try:
        return Metrics(pb_utils.MetricFamily, labels)
    except pb_utils.TritonModelException as error:
        logging.getLogger("tritonmind").info("no metrics: %s", error)
        return Metrics(None, labels)


def _should_drain() -> bool:
    path = os.environ.get(DRAIN_FILE_VARIABLE)
    return path is not None and os.path.exists(path)


def _stop_server() -> None:
    """End the server this process belongs to, so that whatever supervises it starts a new one."""
    parent = os.getppid()
    if Path(f"/proc/{parent}/comm").read_text().strip() == "tritonserver":
        os.kill(parent, signal.SIGTERM)
    else:
        os._exit(1)
