"""reference.py against torch's own functions: the page that everything else is compared with must itself be right."""

import torch
import torch.nn.functional as F

from tests.tolerances import assert_close
from tritonmind.kernels import reference


def test_rms_norm() -> None:
    x, weight = torch.randn(5, 96), torch.randn(96)
    assert_close(reference.rms_norm(x, weight, eps=1e-5), F.rms_norm(x, (96,), weight, 1e-5))


def test_silu_mul() -> None:
    x = torch.randn(5, 96)
    assert_close(reference.silu_mul(x), F.silu(x[:, :48]) * x[:, 48:])


def test_rotate_is_a_complex_rotation() -> None:
    """Elements i and i + D/2 are the real and imaginary part of a number turned by the position's angle."""
    x, angles, positions = torch.randn(6, 3, 64), torch.rand(10, 32) * 6, torch.randint(0, 10, (6,))
    numbers = torch.complex(x[..., :32], x[..., 32:])
    turned = numbers * torch.polar(torch.ones(6, 1, 32), angles[positions].unsqueeze(1))
    rotated = reference.rotate(x, torch.cat((angles.cos(), angles.sin()), dim=1), positions)
    assert_close(rotated, torch.cat((turned.real, turned.imag), dim=-1))


def test_attend() -> None:
    q, k, v = torch.randn(5, 6, 32), torch.randn(2, 12, 32), torch.randn(2, 12, 32)
    visible = torch.ones(5, 12, dtype=torch.bool).tril(7)
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], visible, scale=0.3, enable_gqa=True
    )
    assert_close(reference.attend(q, k, v, 0.3), expected[0].transpose(0, 1))


def test_gather_pages_follows_the_table() -> None:
    cache = torch.arange(4 * 2 * 16 * 8, dtype=torch.float32).view(4, 2, 16, 8)
    tokens = reference.gather_pages(cache, torch.tensor([3, 1, 0], dtype=torch.int32), 20)
    assert tokens.shape == (2, 20, 8)
    assert torch.equal(tokens[1, 15], cache[3, 1, 15]) and torch.equal(tokens[1, 16], cache[1, 1, 0])
