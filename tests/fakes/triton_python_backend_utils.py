"""What the Triton server's stub gives a Python backend, as far as model.py uses it, with the stub's strictness.

A sender refuses to send after FINAL, a response without FINAL needs tensors or an error, output tensors must be NumPy
arrays of the declared type, and a sender counts what it got.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from typing import Any, ClassVar

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):
    """Raised by the server's own calls."""


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message = message
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        if array.dtype == np.object_:
            assert all(isinstance(item, bytes) for item in array.reshape(-1)), name
        self._name = name
        self._array = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors = output_tensors
        self._error = error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class ResponseSender:
    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.threads: set[int] = set()
        self.num_finals = 0
        self.final = threading.Event()
        self.cancelled = False
        self.crashes: list[str] = []
        self._asking = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self.num_finals:
            raise TritonModelException("Unable to send response. Response sender has been closed.")
        if response is None and flags == 0:
            raise TritonModelException("Inference Response object must be provided when the flags is zero.")
        if flags and self._asking:
            self.crashes.append("FINAL while somebody asked is_cancelled")
        self.threads.add(threading.get_ident())
        if response is not None:
            self.responses.append(response)
        if flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.num_finals += 1
            self.final.set()

    def is_cancelled(self) -> bool:
        """Takes a while, as the real one does, and a real server dies when the request ends meanwhile or before."""
        if self.num_finals:
            self.crashes.append("is_cancelled after FINAL")
        self._asking = True
        time.sleep(0.0002)
        self._asking = False
        return self.cancelled


class InferenceRequest:
    def __init__(
        self,
        inputs: dict[str, np.ndarray],
        *,
        parameters: dict[str, Any] | None = None,
        requested_outputs: list[str] | None = None,
        request_id: str = "",
        timeout: int = 0,
    ) -> None:
        self._inputs = [Tensor(name, array) for name, array in inputs.items()]
        self._parameters = parameters
        self._requested_outputs = requested_outputs or []
        self._request_id = request_id
        self._timeout = timeout
        self.sender = ResponseSender()

    def request_id(self) -> str:
        return self._request_id

    def timeout(self) -> int:
        """Microseconds, 0 when the client set none."""
        return self._timeout

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters is not None else ""

    def requested_output_names(self) -> list[str]:
        return self._requested_outputs

    def get_response_sender(self) -> ResponseSender:
        return self.sender


class Metric:
    """One labelled value. Its family, and so the server, must be there as long as it is."""

    def __init__(self, family: MetricFamily, buckets: list[float] | None) -> None:
        assert (buckets is not None) == (family.kind == MetricFamily.HISTOGRAM)
        self.total = 0.0
        self.observed: list[float] = []
        self._kind = family.kind

    def increment(self, value: float) -> None:
        assert self._kind == MetricFamily.COUNTER and value >= 0
        self.total += value

    def set(self, value: float) -> None:
        assert self._kind == MetricFamily.GAUGE
        self.total = value

    def observe(self, value: float) -> None:
        assert self._kind == MetricFamily.HISTOGRAM
        self.observed.append(value)


class MetricFamily:
    """Keeps all live families, which the server holds until they are dropped. supported: as with --allow-metrics."""

    COUNTER, GAUGE, HISTOGRAM = range(3)
    supported = True
    live: ClassVar[weakref.WeakSet[MetricFamily]] = weakref.WeakSet()

    def __init__(self, name: str, description: str, kind: int) -> None:
        if not self.supported:
            raise TritonModelException("metrics not supported")
        self.name, self.description, self.kind = name, description, kind
        self.metrics: dict[tuple[tuple[str, str], ...], Metric] = {}
        self.live.add(self)

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:
        assert all(isinstance(value, str) for value in labels.values())
        key = tuple(sorted(labels.items()))
        assert key not in self.metrics
        metric = self.metrics[key] = Metric(self, buckets)
        return metric


class ModelConfig:
    """The argument of auto_complete_config."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = {"input": [], "output": [], **config}

    def as_dict(self) -> dict[str, Any]:
        return self._config

    def add_input(self, tensor: dict[str, Any]) -> None:
        assert set(tensor) <= {"name", "data_type", "dims", "optional"}
        self._config["input"].append(tensor)

    def add_output(self, tensor: dict[str, Any]) -> None:
        assert set(tensor) <= {"name", "data_type", "dims"}
        self._config["output"].append(tensor)

    def set_model_transaction_policy(self, policy: dict[str, bool]) -> None:
        self._config["model_transaction_policy"] = policy


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)
