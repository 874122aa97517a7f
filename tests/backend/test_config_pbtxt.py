"""config.pbtxt declares the tensors that request_fields knows."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2

from tritonmind.request_fields import INPUTS, OUTPUTS

CONFIG = Path(__file__).resolve().parents[2] / "model_repository" / "tritonmind" / "config.pbtxt"


def test_config_declares_the_interface() -> None:
    config = text_format.Parse(CONFIG.read_text(), model_config_pb2.ModelConfig())
    types = model_config_pb2.DataType.Name
    assert [(t.name, types(t.data_type), list(t.dims)) for t in config.input] == [
        (field.name, field.data_type, [field.dims]) for field in INPUTS
    ]
    assert [(t.name, types(t.data_type), list(t.dims)) for t in config.output] == [
        (field.name, field.data_type, [field.dims]) for field in OUTPUTS
    ]
    assert all(tensor.optional for tensor in config.input)
    assert config.model_transaction_policy.decoupled
    assert config.name == config.backend == "tritonmind"
    assert config.max_batch_size == 0
