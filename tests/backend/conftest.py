"""model.py under a fake server and a fake engine; every test ends with the accounts of requests and FINALs."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.backend.fake_engine import FakeEngine
from tests.checkpoints import make_tokenizer
from tritonmind.config import ModelConfig
from tritonmind.messages import EngineInfo
from tritonmind.tokenizer import Tokenizer

FAKES = Path(__file__).resolve().parent.parent / "fakes"
VOCAB = 320
MAX_MODEL_LEN = 64
INFO = EngineInfo(
    device="cpu",
    dtype="fp32",
    num_blocks=8,
    block_size=16,
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_queue_size=0,
    vocab_size=VOCAB,
    memory_plan="",
)


@pytest.fixture(scope="session")
def adapter() -> Iterator[ModuleType]:
    """The module model.py, imported as the stub does: with triton_python_backend_utils on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAKES))
        yield importlib.import_module("model")
    for name in ("model", "triton_python_backend_utils"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory, vocab=VOCAB)
    return directory


class Served:
    """A loaded model, and what tests do with it."""

    def __init__(self, adapter: ModuleType, tokenizer_dir: Path, patch: pytest.MonkeyPatch) -> None:
        self.pb_utils = adapter.pb_utils
        self.tokenizer = Tokenizer.from_dir(tokenizer_dir)
        self.engines: list[FakeEngine] = []
        self.requests: list[Any] = []
        self.start_failures: list[Exception] = []
        self.script: Any = None
        self.model: Any = adapter.TritonPythonModel()
        facts = ModelConfig(
            architecture="LlamaForCausalLM", model_name="tiny", vocab_size=VOCAB, hidden_size=64, num_layers=2,
            num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, norm_eps=1e-5, rope_theta=10000.0,
            max_position_embeddings=512, weight_type="fp32", bos_token_id=1, eos_token_ids=(2,),
        )  # fmt: skip
        workspace = SimpleNamespace(tokenizer_dir=tokenizer_dir, version_dir=tokenizer_dir, model=facts)
        patch.setattr(adapter.Workspace, "open", lambda path: workspace)
        patch.setattr(adapter, "start_engine", self._start)

    def _start(self, path: str, overrides: dict[str, object]) -> FakeEngine:
        self.overrides = overrides
        if self.start_failures:
            raise self.start_failures.pop(0)
        self.engines.append(FakeEngine(INFO, self.script))
        return self.engines[-1]

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    def load(self, parameters: dict[str, str] | None = None, *, max_batch_size: int = 0) -> None:
        config = {
            "max_batch_size": max_batch_size,
            "parameters": {name: {"string_value": value} for name, value in (parameters or {}).items()},
        }
        self.model.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": "repository",
                "model_version": "1",
                "model_name": "tritonmind",
            }
        )

    def send(
        self,
        *,
        parameters: dict[str, Any] | None = None,
        outputs: list[str] | None = None,
        request_id: str = "",
        timeout: int = 0,
        **inputs: Any,
    ) -> Any:
        """Execute one request with inputs given as plain values; returns its response sender."""
        arrays = {name: array_of(value) for name, value in inputs.items()}
        request = self.pb_utils.InferenceRequest(
            arrays, parameters=parameters, requested_outputs=outputs, request_id=request_id, timeout=timeout
        )
        self.requests.append(request)
        assert self.model.execute([request]) is None
        return request.sender

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def array_of(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    values = value if isinstance(value, list) else [value]
    if values and isinstance(values[0], str):
        return np.array([text.encode() for text in values], dtype=np.object_)
    return np.array(values)


class Held:
    """A function that says by `reached` that it was called, and goes on when `release` is set."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.reached, self.release = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.reached.set()
        assert self.release.wait(30)
        return self._function(*args, **kwargs)


def eventually(condition: Callable[[], bool], timeout: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def texts(sender: Any) -> list[str]:
    return [value(response, "text_output")[0].decode() for response in sender.responses]


def value(response: Any, name: str) -> list[Any]:
    """The values of an output tensor, flattened."""
    tensor = next(tensor for tensor in response.output_tensors() if tensor.name() == name)
    return tensor.as_numpy().reshape(-1).tolist()


def error_of(sender: Any) -> Any:
    """The error that ended a request, which is waited for."""
    assert sender.final.wait(30), "no final response"
    error = sender.responses[-1].error()
    assert error is not None, "the request ended without an error"
    return error


@pytest.fixture
def unloaded(adapter: ModuleType, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A model that the test loads itself."""
    served = Served(adapter, tokenizer_dir, monkeypatch)
    yield served
    if served.engines and not served.engine.was_shut_down:
        served.model.finalize()
    server = getattr(served.model, "_server", None)
    if server is not None:
        assert server.num_accepted == server.num_finals == len(served.requests)
    assert [request.sender.num_finals for request in served.requests] == [1] * len(served.requests)
    assert [crash for request in served.requests for crash in request.sender.crashes] == []
    assert all(len(request.sender.threads) == 1 for request in served.requests), "a request changed its thread"
    assert all(engine.num_live() == 0 for engine in served.engines)
    assert all(engine.was_shut_down for engine in served.engines)


@pytest.fixture
def served(unloaded: Served) -> Served:
    """A loaded model with short timeouts."""
    unloaded.load({"drain_timeout_s": "0.2"})
    return unloaded
