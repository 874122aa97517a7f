"""Runs steps on one device: calls the model, samples, reads the tokens back without waiting; and gets all that ready.

What a step draws stays on the device as the next step's input, so that the next one can be launched before the host has
seen it.
"""

from __future__ import annotations

import functools
import logging
import time

import torch

from tritonmind.config import EngineConfig, QuantPolicy
from tritonmind.engine import kv_cache, logprobs
from tritonmind.engine.cuda_graph import (
    MAX_PREFILLS,
    MAX_QUERY_LEN,
    GraphSet,
    StepGraphs,
    batch_buckets,
    bucket_of,
    token_buckets,
)
from tritonmind.engine.device import (
    check_device,
    check_memory_for_weights,
    free_bytes,
    resolve_device,
    resolve_dtype,
    weight_bytes,
)
from tritonmind.engine.input_builder import InputBuilder, Step
from tritonmind.engine.jit_alarm import JitAlarm
from tritonmind.engine.logit_edits import LogitEditor, warm_up_edits
from tritonmind.engine.sampler import DRAWS, EDITS, GUIDED, LOGPROBS
from tritonmind.engine.scheduler_output import ScheduledSequence, SchedulerOutput
from tritonmind.engine.step_handle import Drawn, StepHandle
from tritonmind.engine.token_masks import TokenMasks
from tritonmind.errors import ConfigError
from tritonmind.kernels import attention_variants, token_logprobs
from tritonmind.layers.rotary import rope_limits
from tritonmind.messages import MAX_LOGPROBS
from tritonmind.model_inputs import KVCache
from tritonmind.model_source import ModelSource
from tritonmind.models.llama import HiddenStates
from tritonmind.models.weight_loader import load_model
from tritonmind.sequence import Sequence

logger = logging.getLogger(__name__)

# Tokens of a step when the configuration leaves it open: enough to keep the device busy, few enough for even answers.
AUTOMATIC_BATCHED_TOKENS = {"cpu": 512, "cuda": 4096}
# Prompt tokens whose logits are computed at a time: enough for a product that is not bound by reading the matrix.
PROMPT_LOGPROB_ROWS = 256
# What the captured graphs take: kernel arguments, cuBLAS workspaces, and the activations of the largest batch.
GRAPH_RESERVE_BYTES = 1 << 30


class ModelRunner:
    """The model, its KV cache and the per-slot state of one rank. Ready to serve, and warm, once constructed.

    logits: [max_num_seqs, vocab_size], those of the last step by sampling row. memory_plan: where the memory went.
    rope_limits: lengths beyond which a sequence has other rotary frequencies; see layers/rotary.py.
    """

    def __init__(self, source: ModelSource, config: EngineConfig) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config, self.device)
        check_device(self.device)
        kv_cache.check_sizes(config, self.device)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self._layer_scales = kv_cache.calibrated_scales(source, config)
        self._scratch: tuple[torch.Tensor, torch.Tensor] | None = None
        reserved_bytes = kv_cache.estimated_activation_bytes(config, self.dtype)
        check_memory_for_weights(
            config, self.dtype, self.device, free_bytes(self.device), reserved_bytes=reserved_bytes
        )
        self.model = load_model(
            config.model,
            source.tensors(rank=0),
            max_model_len=config.scheduler.max_model_len,
            dtype=self.dtype,
            device=self.device,
            lm_head_int8=config.lm_head_int8,
        )
        self.model.share_scratch(config.scheduler.max_num_batched_tokens)
        max_num_seqs = config.scheduler.max_num_seqs
        # The last limit is that of any sequence.
        self.rope_limits = rope_limits(config.model, config.scheduler.max_model_len)[:-1]
        self._builder = InputBuilder(config, self.device, rope_limits=self.rope_limits)
        self._sampler = self._builder.sampler
        self.logits = torch.zeros((max_num_seqs, config.model.vocab_size), dtype=self.dtype, device=self.device)
        self._editor = LogitEditor()
        self._masks = TokenMasks(vocab_size=config.model.vocab_size, max_num_seqs=max_num_seqs, device=self.device)
        num_spare = max(max_num_seqs, PROMPT_LOGPROB_ROWS)
        self._spare_logits = self.logits.new_empty((num_spare, config.model.vocab_size))
        is_cuda = self.device.type == "cuda"
        self._buckets = batch_buckets(max_num_seqs)
        self._token_buckets = token_buckets(config.scheduler.max_num_batched_tokens)
        self.kv_caches: list[KVCache] = []
        self.memory_plan: kv_cache.MemoryPlan
        self._graphs: StepGraphs | None = None
        self._graph_pool = torch.cuda.graph_pool_handle() if is_cuda else None
        self.jit_alarm = JitAlarm()
        self.jit_alarm.disarm(self.device)
        self._get_ready()
        self.jit_alarm.arm(self.device)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepHandle:
        """Launch one step and return without waiting for it. At most NUM_BUFFERS - 1 handles may be unread before."""
        step = self._builder.stage(output, self._padded_size(output))
        if not (step.num_prefills or step.wishes):
            if self._graphs is not None:
                self._graphs.decode_greedily.replay(bucket_of(self._buckets, step.num_decodes))
            else:
                self._decode_greedily(step.num_decodes, step.max_context_len)
            return StepHandle(Drawn(self._builder.finish(step)))
        hidden = self._forward(step, every_row=any(item.seq.prompt_logprobs is not None for item in output.prefills))
        prompts = None
        if hidden is not None:
            prompts = logprobs.of_prompts(self.model, hidden, output.prefills, self._spare_logits)
        # As long as the handle keeps it, a step that draws later keeps its hidden states too.
        draw = functools.partial(self._draw, step, output, hidden)
        return StepHandle(draw if step.wishes & GUIDED else draw(), prompts)

    @torch.inference_mode()
    def _draw(self, step: Step, output: SchedulerOutput, hidden: HiddenStates | None) -> Drawn:
        """Draw from the step's logits and send the tokens home."""
        draws: logprobs.PendingLogprobs | None = None
        failed: list[Sequence] = []
        if step.wishes & (EDITS | LOGPROBS | GUIDED):
            sampling = [item for item in output.items if item.samples]
            failed = self._edit(step, sampling)
            self._sample(step)
            draws = self._logprobs(step, sampling)
        elif step.num_samples:
            self._sample(step)
        # Last, because to wait for it is to know that all that the step sends is on the host.
        return Drawn(self._builder.finish(step), draws, tuple(failed))

    def _edit(self, step: Step, sampling: list[ScheduledSequence]) -> list[Sequence]:
        """Change the logits as the requests say. Returns guided sequences that cannot go on.

        Log-probabilities are those of the model all the same: it keeps the logits that they come from.
        """
        num_rows = step.num_samples
        logits = self.logits[:num_rows]
        if step.wishes & LOGPROBS and step.wishes & (EDITS | GUIDED):
            self._spare_logits[:num_rows].copy_(logits)
        if step.wishes & EDITS:
            edits = self._editor.plan(sampling)
            if edits is not None:
                edits.apply(logits, *self._sampler.slots_and_last_token_ids(num_rows))
        return self._masks.apply(logits, sampling) if step.wishes & GUIDED else []

    def _logprobs(self, step: Step, sampling: list[ScheduledSequence]) -> logprobs.PendingLogprobs | None:
        """Of what was drawn, by the logits that the model computed."""
        logits = self._spare_logits if step.wishes & (EDITS | GUIDED) else self.logits
        num_top = [item.seq.request.num_logprobs for item in sampling]
        return logprobs.of_draws(logits[: step.num_samples], self._sampler.token_ids[: step.num_samples], num_top)

    def _forward(self, step: Step, *, every_row: bool = False) -> HiddenStates | None:
        """Leave the logits of the sampling rows in self.logits. Returns what they came from; a graph has none.

        every_row: the hidden states of all tokens are wanted, for log-probabilities of a prompt.
        """
        if step.is_padded:
            assert self._graphs is not None
            self._graphs.prefill.replay(step.num_tokens)
            return None
        if not step.num_prefills:
            if self._graphs is not None:
                self._graphs.decode.replay(bucket_of(self._buckets, step.num_decodes))
            else:
                self._decode(step.num_decodes, step.max_context_len)
            return None
        inputs = self._builder.model_inputs(step)
        rows = inputs.logits_rows
        hidden = self.model.hidden_states(inputs, self.kv_caches, rows=None if every_row else rows)
        if step.num_samples:
            self.model.logits(hidden, rows if every_row else None, out=self.logits[: step.num_samples])
        return hidden

    def _padded_size(self, output: SchedulerOutput) -> int:
        """Tokens of the graph that serves a step with prompts; 0: it is launched kernel by kernel, or has none."""
        prefills = output.prefills
        if self._graphs is None or not prefills or len(prefills) > MAX_PREFILLS:
            return 0
        num_tokens = output.num_tokens
        if num_tokens > self._token_buckets[-1] or max(item.num_new_tokens for item in prefills) > MAX_QUERY_LEN:
            return 0
        if any(item.seq.prompt_logprobs is not None for item in prefills):
            return 0
        if self._scratch is not None:
            block_size = self.config.cache.block_size
            num_pages = sum(-(-(item.start + item.num_new_tokens) // block_size) for item in prefills)
            if num_pages > len(self._scratch[0]):
                return 0
        return bucket_of(self._token_buckets, num_tokens)

    def _prefill(self, num_tokens: int, max_context_len: int = 0) -> None:
        """Logits of a step with prompts, as InputBuilder.padded_inputs says: what a graph holds."""
        inputs = self._builder.padded_inputs(num_tokens, max_context_len=max_context_len)
        assert inputs.logits_rows is not None
        self.model(inputs, self.kv_caches, out=self.logits[: len(inputs.logits_rows)])

    def _decode(self, num_rows: int, max_context_len: int = 0) -> None:
        """Logits of a step of decodes only, as InputBuilder.decode_inputs says: what a graph holds."""
        inputs = self._builder.decode_inputs(num_rows, max_context_len=max_context_len)
        self.model(inputs, self.kv_caches, out=self.logits[:num_rows])

    def _sample(self, step: Step) -> None:
        """Draw for the step's sampling rows, into the sampler's token_ids."""
        if self._graphs is None:
            self._sampler.sample(self.logits[: step.num_samples], greedy=step.greedy)
        else:
            self._graphs.draw.replay(bucket_of(self._buckets, step.num_samples))

    def _decode_greedily(self, num_rows: int, max_context_len: int = 0) -> None:
        """A whole step of decodes that ask for nothing but the largest logit."""
        self._decode(num_rows, max_context_len)
        self._sampler.sample(self.logits[:num_rows], greedy=True)

    def _get_ready(self) -> None:
        """Size and allocate the cache; on a GPU also run every variant of every kernel once and capture the graphs."""
        if self.device.type == "cpu":
            reserved_bytes = kv_cache.estimated_activation_bytes(self.config, self.dtype)
            self._allocate_cache(free_bytes(self.device), reserved_bytes, graphs_bytes=0)
            return
        stage = "running the largest step"
        try:
            with torch.inference_mode():
                started = time.monotonic()
                self._scratch = kv_cache.allocate_scratch(self.config, dtype=self.dtype, device=self.device)
                self.kv_caches = self._allocated(1)
                torch.cuda.empty_cache()
                free = free_bytes(self.device)
                self._warm_up()
                activation_bytes = max(0, free - free_bytes(self.device))
                # So that the cache lies in memory of its own, and not between what the steps left.
                torch.cuda.empty_cache()
                stage = "allocating the KV cache"
                graphs_bytes = 0 if self.config.enforce_eager else GRAPH_RESERVE_BYTES
                self._allocate_cache(free, activation_bytes, graphs_bytes=graphs_bytes)
                logger.info("warm-up took %.1f s", time.monotonic() - started)
                if not self.config.enforce_eager:
                    stage = "capturing graphs"
                    self._capture()
                # Capturing gives free memory back to the card: take again what the largest steps need, and keep it.
                stage = "running the largest step beside the cache"
                self._run_largest()
                torch.cuda.synchronize()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"the card's memory ran out while {stage}, {free_bytes(self.device) / 2**30:.2f} GiB being free: lower "
                "cache_max_entry_count, max_batch_size or max_context_token_num, or free memory"
            ) from error

    def _allocate_cache(self, free: int, activation_bytes: int, *, graphs_bytes: int) -> None:
        self.memory_plan = kv_cache.plan_memory(
            self.config,
            dtype=self.dtype,
            free_bytes=free,
            reserved_bytes=activation_bytes,
            is_cpu=self.device.type == "cpu",
            weights_bytes=weight_bytes(self.config, self.dtype, self.device),
            graphs_bytes=graphs_bytes,
            scratch_bytes=sum(pool.nbytes for pool in self._scratch or ()),
        )
        logger.info("memory: %s", self.memory_plan.describe())
        self.kv_caches = self._allocated(self.memory_plan.num_blocks)

    def _allocated(self, num_blocks: int) -> list[KVCache]:
        return kv_cache.allocate(
            self.config, num_blocks, dtype=self.dtype, device=self.device, layer_scales=self._layer_scales,
            scratch=self._scratch,
        )  # fmt: skip

    def _warm_up(self) -> None:
        """Run steps that between them use every variant of every kernel, the largest first."""
        limits, model = self.config.scheduler, self.config.model
        max_tokens, max_seqs = limits.max_num_batched_tokens, limits.max_num_seqs
        longest = self._run_largest()
        for rows in self.model.row_variants(max_tokens, max_seqs):
            self._run_padding(0, _spread(min(rows, max_seqs * longest), max_seqs))
        attention = attention_variants(
            max_seqs, longest, num_heads=model.num_heads, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim,
            block_size=self.config.cache.block_size, dtype=self.dtype, device=self.device,
            int8_kv=self.config.cache.quant_policy is not QuantPolicy.NONE,
        )  # fmt: skip
        for query_len in attention.max_query_lens:
            self._run_padding(0, [min(query_len, self.model.window or query_len)])
        if self.model.window:
            # Those before are not longer than the window, and have another kernel.
            for query_len in attention.max_query_lens:
                self._run_padding(0, [query_len], num_earlier=limits.max_model_len - query_len)
        self._run_padding(0, [1], num_earlier=1)
        for num_decodes in attention.num_decodes:
            self._run_padding(num_decodes, [])
            chunk = min(16, longest, max_tokens - num_decodes)
            if num_decodes < max_seqs and chunk:
                self._run_padding(num_decodes, [chunk])

    def _run_largest(self) -> int:
        """Steps that need as much memory as any: few long prompts, and many short ones. Returns the longest chunk."""
        limits = self.config.scheduler
        max_tokens, max_seqs = limits.max_num_batched_tokens, limits.max_num_seqs
        longest = min(limits.max_model_len, max_tokens)
        self._run_padding(0, [longest] * min(max_tokens // longest, max_seqs))
        self._run_padding(0, [min(longest, max_tokens // max_seqs)] * max_seqs)
        self._warm_up_options(max_seqs)
        return longest

    def _warm_up_options(self, num_rows: int) -> None:
        """What some requests ask for beside the draw, at its largest."""
        logits = self.logits[:num_rows]
        warm_up_edits(logits, *self._sampler.slots_and_last_token_ids(num_rows))
        self._masks.warm_up(logits)
        # Those of prompts are of more rows than any draw's.
        for values in (logits, self._spare_logits):
            token_ids = torch.zeros(len(values), dtype=torch.int64, device=self.device)
            token_logprobs(values, token_ids, num_top=min(MAX_LOGPROBS, values.shape[1]))
        for rows in self.model.output.row_variants(len(self._spare_logits)):
            hidden = HiddenStates(*logits.new_zeros((2, rows, self.config.model.hidden_size)))
            self.model.logits(hidden, None, out=self._spare_logits[:rows])

    def _run_padding(self, num_decodes: int, prefill_lens: list[int], *, num_earlier: int = 0) -> None:
        """A step for nobody, drawn both ways. Like `execute` it keeps the hidden states until the end."""
        step = self._builder.stage_padding(num_decodes, prefill_lens, num_earlier=num_earlier)
        hidden = self._forward(step)
        for wishes in (0, DRAWS):
            self._sample(step._replace(wishes=wishes))
        self._builder.finish(step)
        del hidden

    def _capture(self) -> None:
        """Capture whole steps of greedy decodes, and the parts of others, in one memory pool, the largest first."""

        def draw(num_rows: int) -> None:
            self._sampler.sample(self.logits[:num_rows], greedy=False)

        # What the steps before have left must not be computed again, over blocks that may be anyone's.
        self._builder.finish(self._builder.stage_padding(self.config.scheduler.max_num_seqs, []))
        graphs = StepGraphs(
            GraphSet(self._decode_greedily), GraphSet(self._decode), GraphSet(draw), GraphSet(self._prefill)
        )
        free = free_bytes(self.device)
        seconds = graphs.capture(self._buckets, self._token_buckets, self._graph_pool)
        self._graphs = graphs
        logger.info(
            "%d sizes of steps with prompts, %d without, captured in %.1f s; they take %.0f MiB",
            len(self._token_buckets), len(self._buckets), seconds, (free - free_bytes(self.device)) / 2**20,
        )  # fmt: skip


def _spread(num_tokens: int, max_seqs: int) -> list[int]:
    """Lengths of as many prompts as may be, with so many tokens together."""
    num_seqs = min(num_tokens, max_seqs)
    share, rest = divmod(num_tokens, num_seqs)
    return [share + 1] * rest + [share] * (num_seqs - rest)
