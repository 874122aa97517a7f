"""Rotary embedding with the write of K and V to their pages."""

from typing import NamedTuple

import pytest
import torch

from tests.kernels.kernel_cases import Target
from tests.tolerances import assert_close
from tritonmind.kernels import HeadNorms, reference, rotary_kv_write

# (num_heads, num_kv_heads, head_dim): groups of 1, 3, 4 and 7 heads, head_dims that are no power of two.
HEADS = [(2, 2, 64), (9, 3, 64), (4, 1, 80), (7, 1, 96), (8, 2, 128)]
LARGE_HEADS = [(32, 32, 128), (32, 8, 128), (28, 4, 128), (9, 3, 64), (40, 40, 80)]


class Inputs(NamedTuple):
    qkv: torch.Tensor
    cos_sin: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def make_inputs(
    heads: tuple[int, int, int], num_tokens: int, target: Target, *, block_size: int = 16, num_skipped: int = 1
) -> Inputs:
    """Tokens at random positions and slots; `num_skipped` of them have slot -1. The pools are NaN."""
    num_heads, num_kv_heads, head_dim = heads
    num_blocks = -(-num_tokens // block_size) + 2
    slots = torch.randperm(num_blocks * block_size)[:num_tokens].to(torch.int32)
    slots[torch.randperm(num_tokens)[:num_skipped]] = -1
    angles = torch.rand(200, head_dim // 2) * 6
    pool = torch.full((num_blocks, num_kv_heads, block_size, head_dim), float("nan"), dtype=target.dtype)
    return Inputs(
        target.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim),
        torch.cat((angles.cos(), angles.sin()), dim=1).to(target.device),
        torch.randint(0, 200, (num_tokens,)).to(target.device),
        slots.to(target.device),
        pool.to(target.device),
        pool.clone().to(target.device),
    )


def check(
    heads: tuple[int, int, int], inputs: Inputs, target: Target, norms: HeadNorms | None = None,
    query_scales: torch.Tensor | None = None,
) -> None:  # fmt: skip
    sizes = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=True))
    twins = Inputs(*(tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu() for tensor in inputs))
    expected = reference.rotary_kv_write(
        *twins, **sizes, norms=norms and HeadNorms(norms.q.cpu().float(), norms.k.cpu().float(), norms.eps),
        query_scales=None if query_scales is None else query_scales.cpu(),
    )  # fmt: skip
    assert_close(rotary_kv_write(*inputs, **sizes, norms=norms, query_scales=query_scales), expected, target.dtype)
    written = ~twins.k_cache.isnan()
    assert torch.equal(~inputs.k_cache.isnan().cpu(), written), "K is in other slots than slot_mapping says"
    assert torch.equal(~inputs.v_cache.isnan().cpu(), written), "V is in other slots than slot_mapping says"
    assert_close(inputs.k_cache.cpu()[written], twins.k_cache[written], target.dtype)
    assert torch.equal(inputs.v_cache.cpu()[written].float(), twins.v_cache[written])


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rotary_kv_write(heads: tuple[int, int, int], num_tokens: int, target: Target) -> None:
    check(heads, make_inputs(heads, num_tokens, target, num_skipped=num_tokens // 2), target)


def norms_and_scales(head_dim: int, target: Target) -> tuple[HeadNorms, torch.Tensor]:
    norms = HeadNorms(1 + 0.3 * target.randn(head_dim), 1 + 0.3 * target.randn(head_dim), 1e-2)
    return norms, (0.5 + torch.rand(200)).to(target.device)


@pytest.mark.parametrize("heads", [(7, 1, 96), (8, 2, 128)], ids=str)
def test_normalised_heads_and_scaled_queries(heads: tuple[int, int, int], target: Target) -> None:
    norms, scales = norms_and_scales(heads[2], target)
    check(heads, make_inputs(heads, 3, target), target, norms, scales)
    check(heads, make_inputs(heads, 1, target, num_skipped=0), target, norms)
    check(heads, make_inputs(heads, 2, target), target, None, scales)


@pytest.mark.parametrize("num_tokens", [1, 64, 1025])
@pytest.mark.parametrize("heads", LARGE_HEADS, ids=str)
def test_large(heads: tuple[int, int, int], num_tokens: int, gpu_target: Target) -> None:
    check(heads, make_inputs(heads, num_tokens, gpu_target, block_size=64, num_skipped=num_tokens // 3), gpu_target)
    inputs = make_inputs(heads, num_tokens, gpu_target, block_size=64, num_skipped=num_tokens // 3)
    check(heads, inputs, gpu_target, *norms_and_scales(heads[2], gpu_target))


def test_many_tokens_on_the_cpu() -> None:
    """The CPU path has another way for prompts than for a few tokens."""
    target = Target(False, "cpu", torch.float32)
    check((9, 3, 64), make_inputs((9, 3, 64), 300, target, num_skipped=0), target)
    check((9, 3, 64), make_inputs((9, 3, 64), 300, target, num_skipped=77), target)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_all_slots_skipped(num_tokens: int, target: Target) -> None:
    heads = (4, 2, 64)
    inputs = make_inputs(heads, num_tokens, target, num_skipped=num_tokens)
    check(heads, inputs, target)
    assert inputs.k_cache.isnan().all() and inputs.v_cache.isnan().all()


def test_int32_positions_and_out(target: Target) -> None:
    heads = (4, 2, 64)
    inputs = make_inputs(heads, 3, target)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    expected = rotary_kv_write(*inputs, **sizes)
    out = torch.full_like(expected, float("nan"))
    assert rotary_kv_write(*inputs._replace(positions=inputs.positions.int()), **sizes, out=out) is out
    assert torch.equal(out, expected)


def test_row_does_not_depend_on_the_batch(target: Target) -> None:
    heads = (9, 3, 64)
    sizes = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=True))
    inputs = make_inputs(heads, 6, target)
    batch = rotary_kv_write(*inputs, **sizes)
    k_cache = inputs.k_cache.clone()
    for row in range(6):
        one = [tensor[row : row + 1] for tensor in (inputs.qkv, inputs.positions, inputs.slot_mapping)]
        alone = rotary_kv_write(one[0], inputs.cos_sin, one[1], one[2], inputs.k_cache, inputs.v_cache, **sizes)
        assert torch.equal(alone[0], batch[row])
    assert torch.equal(inputs.k_cache.nan_to_num(), k_cache.nan_to_num())


def test_arguments_are_checked() -> None:
    inputs = make_inputs((4, 2, 64), 3, Target(False, "cpu", torch.float32))
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    wrong = {
        "qkv has shape": {"qkv": inputs.qkv[:, :-1]},
        "cos_sin has dtype": {"cos_sin": inputs.cos_sin.half()},
        "cos_sin has shape": {"cos_sin": inputs.cos_sin[:, :32]},
        "positions has shape": {"positions": inputs.positions[:2]},
        "positions has dtype": {"positions": inputs.positions.float()},
        "slot_mapping has dtype": {"slot_mapping": inputs.slot_mapping.long()},
        "k_cache has dtype": {"k_cache": inputs.k_cache.half()},
        "v_cache has shape": {"v_cache": inputs.v_cache[:1]},
        "v_cache with strides .* is not contiguous": {
            "v_cache": inputs.v_cache.transpose(2, 3).contiguous().transpose(2, 3)
        },
        "k_cache has shape": {"k_cache": inputs.k_cache[:, :1].clone(), "v_cache": inputs.v_cache[:, :1].clone()},
        "block_size 12": {"k_cache": inputs.k_cache[:, :, :12].clone(), "v_cache": inputs.v_cache[:, :, :12].clone()},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            rotary_kv_write(*inputs._replace(**change), **sizes)
