"""Compile every kernel for sm_90 without a GPU, with the arguments its launcher passes, and report its resources.

Run as a program, without TRITON_INTERPRET: prints one JSON object a line. test_compile.py reads them.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritonmind.kernels import (
    SamplingState,
    triton_activation,
    triton_attention,
    triton_gather,
    triton_logit_edits,
    triton_logprobs,
    triton_norm,
    triton_rotary,
    triton_sampling,
    triton_step_inputs,
)

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiler:
    """Stands in for a jit function in its module: a launch compiles and reports instead."""

    def __init__(self, module: Any, name: str) -> None:
        self.kernel = getattr(module, name)
        self.name = name
        self.label = ""
        setattr(module, name, self)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *args: Any, num_warps: int, num_stages: int = 3, **constexprs: Any) -> None:
        values = inspect.signature(self.kernel.fn).bind(*args, **constexprs).arguments
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned: dict[tuple[int], list[list[Any]]] = {}
        for index, param in enumerate(self.kernel.params):
            value = values[param.name]
            if param.is_constexpr or value is None:
                signature[param.name] = "constexpr"
                constants[param.name] = value
            elif isinstance(value, torch.Tensor):
                signature[param.name] = TYPES[value.dtype]
                if not param.do_not_specialize_on_alignment:
                    aligned[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[param.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=TARGET, options={"num_warps": num_warps, "num_stages": num_stages})
        report = {"kernel": self.name, "case": self.label, **resources(compiled.asm["cubin"])}
        print(json.dumps({**report, "shared": compiled.metadata.shared}), flush=True)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory: more than none of these is a spill."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text.stdout + text.stderr)
    assert match, f"cuobjdump says no resources: {text.stdout}{text.stderr}"
    return dict(zip(("registers", "stack", "local"), map(int, match.groups()), strict=True))


def main() -> None:
    """Llama-like shapes: 32 heads of 128 in groups of 4, pages of 64."""
    norm = Compiler(triton_norm, "_rms_norm_kernel")
    silu = Compiler(triton_activation, "_silu_mul_kernel")
    rotary = Compiler(triton_rotary, "_rotary_kv_write_kernel")
    decode = Compiler(triton_attention, "_decode_kernel")
    combine = Compiler(triton_attention, "_combine_kernel")
    prefill = Compiler(triton_attention, "_prefill_kernel")
    everything = (norm, silu, rotary, decode, combine, prefill)
    for dtype in (torch.float16, torch.bfloat16):
        for compiler in everything:
            compiler.label = str(dtype).removeprefix("torch.")
        hidden, q = torch.empty(4, 4096, dtype=dtype), torch.empty(4, 32, 128, dtype=dtype)
        pool = torch.empty(8, 8, 64, 128, dtype=dtype)
        ints = torch.zeros(8, dtype=torch.int32)
        tables, lengths = ints.view(4, 2), ints[:4]
        triton_norm.rms_norm(hidden, hidden, hidden[0], 1e-5, hidden)
        triton_activation.silu_mul(torch.empty(4, 8192, dtype=dtype), hidden)
        qkv, cos_sin = torch.empty(4, 48 * 128, dtype=dtype), torch.empty(16, 128)
        triton_rotary.rotary_kv_write(qkv, cos_sin, lengths.long(), lengths, pool, pool, q)
        triton_attention.paged_decode_attention(q, pool, pool, tables, lengths, 0.1, 8, q)
        for max_query_len in (16, 64, 128):
            prefill.label = f"{str(dtype).removeprefix('torch.')} BLOCK_M {max_query_len}"
            triton_attention.paged_prefill_attention(q, pool, pool, tables, ints[:5], lengths, max_query_len, 0.1, q)
    compile_sampling()
    compile_step_inputs()


def compile_step_inputs() -> None:
    """What has no floating-point type."""
    write = Compiler(triton_step_inputs, "_write_block_tables_kernel")
    prepare = Compiler(triton_step_inputs, "_prepare_tokens_kernel")
    write.label = prepare.label = "int32"
    ints, longs = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    triton_step_inputs.write_block_tables(ints.view(4, 2), ints, ints)
    triton_step_inputs.prepare_tokens(ints, ints, ints, longs, ints.view(4, 2), 64, longs, longs, ints)


def compile_sampling() -> None:
    """What stands around the model, for the vocabularies of Llama 2 and 3."""
    gather = Compiler(triton_gather, "_gather_rows_kernel")
    score = Compiler(triton_sampling, "_score_kernel")
    choose = Compiler(triton_sampling, "_choose_kernel")
    logprobs = Compiler(triton_logprobs, "_logprobs_kernel")
    edit = Compiler(triton_logit_edits, "_edit_logits_kernel")
    ids, slots, values = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32), torch.empty(4)
    for dtype in (torch.float16, torch.bfloat16):
        name = gather.label = str(dtype).removeprefix("torch.")
        hidden = torch.empty(4, 4096, dtype=dtype)
        triton_gather.gather_rows(hidden, ids, hidden)
        for vocab_size in (32000, 128256):
            logits = torch.empty(4, vocab_size, dtype=dtype)
            counts = torch.zeros(4, vocab_size, dtype=torch.int32)
            state = SamplingState(values, slots, values, values, values, values, values, ids, counts)
            logprobs.label = edit.label = f"{name} VOCAB {vocab_size}"
            triton_logit_edits.edit_logits(logits, slots, slots, values, slots, slots, ids)
            triton_logprobs.token_logprobs(logits, ids)
            for greedy in (True, False):
                score.label = choose.label = f"{name} VOCAB {vocab_size} GREEDY {greedy}"
                triton_sampling.sample_tokens(logits, slots, slots, state, greedy, ids, ids)


if __name__ == "__main__":
    sys.exit(main())
