"""Runs steps on one device: turns the scheduler's choice into tensors, calls the model, samples.

State by slot (a running sequence's row): its block table and its last sampled token, which stays on the device so that
the next step can be launched before the host has seen it.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from tritonmind.config import EngineConfig
from tritonmind.engine import kv_cache
from tritonmind.engine.cuda_graph import DecodeGraphs
from tritonmind.engine.host_memory import available_bytes
from tritonmind.engine.sampler import SamplingRow, sample
from tritonmind.engine.scheduler import ScheduledSequence, SchedulerOutput
from tritonmind.errors import ConfigError
from tritonmind.model_inputs import AttentionMetadata, ModelInputs
from tritonmind.models.weight_loader import load_model
from tritonmind.workspace import Workspace

logger = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Tokens of a step when the configuration leaves it open: enough to keep the device busy, few enough for even answers.
AUTOMATIC_BATCHED_TOKENS = {"cpu": 512, "cuda": 4096}
# What the captured graphs and the CUDA context's workspaces take beside activations.
GRAPH_RESERVE_BYTES = 1 << 30


class StepHandle:
    """A launched step. `wait` gives the sampled ids, in the order of the scheduler's sampling items.

    On a GPU the ids start their way to the host at once, so that `wait` does not wait for later steps.
    """

    def __init__(self, token_ids: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._token_ids = token_ids
        if token_ids.is_cuda:
            self._token_ids = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
            self._token_ids.copy_(token_ids, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[int]:
        """Block until the step is done."""
        if self._event is not None:
            self._event.synchronize()
        return self._token_ids.tolist()


class ModelRunner:
    """The model, its KV cache and the per-slot state of one rank."""

    def __init__(self, workspace: Workspace, config: EngineConfig) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config, self.device)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.config = config
        started = time.monotonic()
        self.model = load_model(
            config.model,
            workspace.tensors(rank=0),
            max_model_len=config.scheduler.max_model_len,
            dtype=self.dtype,
            device=self.device,
        )
        logger.info("weights loaded in %.1f s", time.monotonic() - started)
        self.memory_plan = kv_cache.plan_memory(
            config,
            dtype=self.dtype,
            free_bytes=free_bytes(self.device),
            reserved_bytes=self._activation_bytes(),
            is_cpu=self.device.type == "cpu",
        )
        logger.info("memory: %s", self.memory_plan.describe())
        self.kv_caches = kv_cache.allocate(config, self.memory_plan, dtype=self.dtype, device=self.device)
        max_num_seqs, block_size = config.scheduler.max_num_seqs, config.cache.block_size
        max_blocks = -(-config.scheduler.max_model_len // block_size)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._num_table_blocks = [0] * max_num_seqs  # how much of each row is up to date
        self._admissions = [-1] * max_num_seqs  # whose row it is
        self._last_token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)
        self.graphs: DecodeGraphs | None = None
        if self.device.type == "cuda" and not config.enforce_eager:
            self.graphs = DecodeGraphs(self.model, self.kv_caches, max_num_seqs=max_num_seqs, max_blocks=max_blocks)
            with torch.inference_mode():
                logger.info("decode graphs captured in %.1f s", self.graphs.capture())

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepHandle:
        """Launch one step and return without waiting for it."""
        sampling = [item for item in output.items if item.samples]
        inputs = self._build_inputs(output)
        if self.graphs is not None and not output.prefills:
            logits = self.graphs.run(inputs)
        else:
            logits = self.model(inputs, self.kv_caches)
        if not sampling:
            return StepHandle(torch.empty(0, dtype=torch.int64))
        rows = [SamplingRow(item.seq.request, item.start + item.num_new_tokens) for item in sampling]
        token_ids = sample(logits, rows)
        self._last_token_ids[[item.seq.slot for item in sampling]] = token_ids
        return StepHandle(token_ids)

    def _build_inputs(self, output: SchedulerOutput) -> ModelInputs:
        items = output.items
        num_decodes = len(output.decodes)
        query_lens = np.fromiter((item.num_new_tokens for item in items), dtype=np.int64, count=len(items))
        starts = np.fromiter((item.start for item in items), dtype=np.int64, count=len(items))
        slots = np.fromiter((item.seq.slot for item in items), dtype=np.int64, count=len(items))
        ends = np.cumsum(query_lens)
        # Position of each token: its sequence's start plus its index within the chunk.
        positions = np.arange(output.num_tokens) + np.repeat(starts - (ends - query_lens), query_lens)
        self._update_block_tables(items)
        block_size = self.config.cache.block_size
        blocks = self._block_tables[np.repeat(slots, query_lens), positions // block_size]
        slot_mapping = blocks * block_size + (positions % block_size).astype(np.int32)
        context_lens = (starts + query_lens).astype(np.int32)
        prefill_lens = query_lens[num_decodes:]
        cu_seqlens_q = np.concatenate(([0], np.cumsum(prefill_lens))).astype(np.int32)
        samples = np.fromiter((item.samples for item in items), dtype=bool, count=len(items))
        return ModelInputs(
            token_ids=self._token_ids(items),
            positions=self._to_device(positions),
            logits_rows=self._to_device(ends[samples] - 1),
            attention=AttentionMetadata(
                num_decodes=num_decodes,
                slot_mapping=self._to_device(slot_mapping),
                decode_block_tables=self._block_table_rows(slots[:num_decodes], context_lens[:num_decodes]),
                decode_context_lens=self._to_device(context_lens[:num_decodes]),
                prefill_block_tables=self._block_table_rows(slots[num_decodes:], context_lens[num_decodes:]),
                prefill_context_lens=self._to_device(context_lens[num_decodes:]),
                prefill_cu_seqlens_q=self._to_device(cu_seqlens_q),
                max_query_len=int(prefill_lens.max(initial=0)),
            ),
        )

    def _token_ids(self, items: list[ScheduledSequence]) -> torch.Tensor:
        host_ids: list[int] = []
        pending_rows: list[int] = []
        pending_slots: list[int] = []
        for item in items:
            known = item.seq.token_ids[item.start : item.start + item.num_new_tokens]
            if len(known) < item.num_new_tokens:  # the last token is still on the device only
                pending_rows.append(len(host_ids) + len(known))
                pending_slots.append(item.seq.slot)
                known = [*known, 0]
            host_ids.extend(known)
        token_ids = torch.tensor(host_ids, dtype=torch.int64).to(self.device)
        if pending_rows:
            token_ids[pending_rows] = self._last_token_ids[pending_slots]
        return token_ids

    def _update_block_tables(self, items: list[ScheduledSequence]) -> None:
        for item in items:
            seq = item.seq
            slot = seq.slot
            if self._admissions[slot] != seq.admission:
                self._admissions[slot] = seq.admission
                self._num_table_blocks[slot] = 0
            known, now = self._num_table_blocks[slot], len(seq.block_table)
            if now > known:
                self._block_tables[slot, known:now] = seq.block_table[known:]
                self._num_table_blocks[slot] = now

    def _block_table_rows(self, slots: np.ndarray, context_lens: np.ndarray) -> torch.Tensor:
        max_blocks = -(-int(context_lens.max(initial=1)) // self.config.cache.block_size)
        return self._to_device(self._block_tables[slots, :max_blocks])

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _activation_bytes(self) -> int:
        """An upper estimate of what one full step allocates beside the cache: a layer's activations and the logits."""
        model, limits = self.config.model, self.config.scheduler
        qkv_size = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        per_token = 4 * model.hidden_size + 2 * qkv_size + 3 * model.intermediate_size
        # Sampling holds logits, scores, noise, a sorted copy and its int64 order.
        per_logit_row = 6 * model.vocab_size * 4
        graphs = GRAPH_RESERVE_BYTES if self.device.type == "cuda" and not self.config.enforce_eager else 0
        per_step = limits.max_num_batched_tokens * per_token * self.dtype.itemsize
        return per_step + limits.max_num_seqs * per_logit_row + graphs


def resolve_device(name: str) -> torch.device:
    """The device to run on: "auto" is CUDA when there is one, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device='cuda', but PyTorch finds no CUDA device; use device='cpu', or check the driver with check_env"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that the KV cache may be taken from, weights already loaded."""
    if device.type == "cpu":
        return available_bytes()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def resolve_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The type to compute in: "auto" is fp32 on a CPU and the stored type on a GPU."""
    if config.model.weight_type == "int4":
        raise ConfigError("weight_type=int4: quantised weights are not available in this version")
    if config.dtype != "auto":
        if device.type == "cpu" and config.dtype == "fp16":
            raise ConfigError("dtype='fp16' is slow and inexact on a CPU; use fp32 or bf16")
        return DTYPES[config.dtype]
    return torch.float32 if device.type == "cpu" else DTYPES[config.model.weight_type]
