"""Gated activations: one op with a gradient of its own, against torch's steps in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tp_native import _ops

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def oracle(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "ulp"), [(torch.float32, 2**-23), (torch.float64, 2**-52), (torch.bfloat16, 2**-8)]
)
@pytest.mark.parametrize("shape", [(6,), (5, 14), (2, 3, 8), (0, 8), (3, 0)])
def test_values_are_rounded_once(
    activation: str, dtype: torch.dtype, ulp: float, shape: tuple[int, ...]
) -> None:
    x = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
    y = _ops.glu(x, activation)
    assert y.dtype == dtype and y.shape == (*shape[:-1], shape[-1] // 2)
    # one rounding, and some units of the functions in the wider type, which cancel near zero
    slack, atol = (1, 1e-5) if dtype == torch.bfloat16 else (8, 100 * ulp)
    torch.testing.assert_close(y.double(), oracle(x, activation), rtol=slack * ulp, atol=atol)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strided_input_and_gradients(activation: str) -> None:
    x = torch.randn(10, 4, dtype=torch.float64).t().requires_grad_()  # columns are 4 apart
    assert torch.autograd.gradcheck(partial(_ops.glu, activation=activation), (x,))
    grad = torch.randn(4, 5, dtype=torch.float64)
    (mine,) = torch.autograd.grad(_ops.glu(x, activation), x, grad)
    (dense,) = torch.autograd.grad(oracle(x, activation), x, grad)
    torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ValueError, match=r"input of shape \[3, 5\]: expected \(..., 2 \* width\)"):
        _ops.glu(torch.ones(3, 5), "silu")
    with pytest.raises(ValueError, match='activation "relu": expected "silu", "gelu" or'):
        _ops.glu(torch.ones(3, 4), "relu")
    with pytest.raises(TypeError, match="expected a floating dtype"):
        _ops.glu(torch.ones(3, 4, dtype=torch.int64), "silu")
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="glu has no second derivative"):
        torch.autograd.grad(_ops.glu(x, "silu").sum(), x, create_graph=True)


def test_it_compiles_with_its_gradient() -> None:
    compiled = torch.compile(
        partial(_ops.glu, activation="silu"), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 8, requires_grad=True)
    torch.testing.assert_close(compiled(x), _ops.glu(x, "silu"), rtol=0, atol=0)
    compiled(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
