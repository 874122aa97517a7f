"""Where steps run. Today in the engine's own process; workers of several ranks will stand behind the same two calls."""

from __future__ import annotations

from tritonmind.config import EngineConfig
from tritonmind.engine.model_runner import ModelRunner
from tritonmind.engine.scheduler_output import SchedulerOutput
from tritonmind.engine.step_handle import StepHandle
from tritonmind.errors import ConfigError
from tritonmind.model_source import ModelSource


class Executor:
    """One ModelRunner in this process."""

    def __init__(self, source: ModelSource, config: EngineConfig) -> None:
        if config.tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_para_size={config.tensor_parallel_size}: this version serves one rank; convert with --tp 1"
            )
        self.runner = ModelRunner(source, config)

    def execute(self, output: SchedulerOutput) -> StepHandle:
        """Launch a step; its handle waits for it."""
        return self.runner.execute(output)
