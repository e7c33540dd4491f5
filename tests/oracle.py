"""The dense answer, computed in one process in float64 and independent of the code under test."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rank_data(shape: tuple[int, ...], dtype: torch.dtype, rank: int, seed: int = 0) -> Tensor:
    """Random data that every process can make for any rank."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def reduce_in_rank_order(parts: list[Tensor], op: str = "sum") -> Tensor:
    """What promise 1 says: ascending ranks, float32 accumulation for 16-bit types, one rounding."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    acc = parts[0].to(wide)
    for part in parts[1:]:
        other = part.to(wide)
        if op == "max":
            acc = torch.maximum(acc, other)
        elif op == "min":
            acc = torch.minimum(acc, other)
        else:
            acc = acc + other
    if op == "avg":
        acc = acc / len(parts)
    return acc.to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| / max|expected|, in float64."""
    scale = expected.double().abs().max().clamp_min(1e-300)
    return ((actual.double() - expected.double()).abs().max() / scale).item()


def dense_attention(state: dict[str, Tensor], options: dict[str, Any], x: Tensor) -> Tensor:
    """Attention head by head, with a softmax written out. ``state`` has the whole parameters."""
    heads = options["num_heads"]
    kv_heads = options.get("num_kv_heads") or heads
    width = options.get("head_dim") or options["hidden_size"] // heads
    tokens = x.size(1)
    qkv = x @ state["qkv_proj.weight"].t() + state.get("qkv_proj.bias", torch.zeros(1).to(x))
    position = torch.arange(tokens, dtype=torch.float64)
    outputs = []
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        starts = (head, heads + kv_head, heads + kv_heads + kv_head)
        q, k, v = (qkv[..., s * width : (s + 1) * width] for s in starts)
        if "q_norm.weight" in state:
            q = dense_rms_norm(q, state["q_norm.weight"])
            k = dense_rms_norm(k, state["k_norm.weight"])
        if options.get("rope_theta"):
            frequency = options["rope_theta"] ** (
                -torch.arange(0, width, 2, dtype=torch.float64) / width
            )
            turn = torch.polar(
                torch.ones(tokens, width // 2).double(), torch.outer(position, frequency)
            )
            q, k = (dense_rotation(t, turn) for t in (q, k))
        scores = q @ k.transpose(1, 2) / width**0.5
        if options.get("causal", True):
            future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    y = torch.cat(outputs, -1) @ state["o_proj.weight"].t()
    return y + state["o_proj.bias"] if "o_proj.bias" in state else y


def dense_rotation(t: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions as products of complex numbers (first half real, second imaginary)."""
    a, b = t.chunk(2, -1)
    turned = torch.complex(a, b) * turn
    return torch.cat([turned.real, turned.imag], -1)


def dense_rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The formula."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def dense_mlp(state: dict[str, Tensor], activation: str, x: Tensor) -> Tensor:
    """The feed-forward part from whole parameters."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "swiglu": lambda t: t * torch.sigmoid(t),
        "silu": lambda t: t * torch.sigmoid(t),
        "geglu": lambda t: t * 0.5 * (1 + torch.erf(t / 2**0.5)),
        "gelu": lambda t: t * 0.5 * (1 + torch.erf(t / 2**0.5)),
        "gelu_tanh": lambda t: (
            t * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (t + 0.044715 * t**3)))
        ),
        "relu": lambda t: t.clamp_min(0),
    }
    act = functions[activation]
    zero = torch.zeros(1).to(x)
    if activation.endswith("glu"):
        gate_up = x @ state["gate_up_proj.weight"].t() + state.get("gate_up_proj.bias", zero)
        gate, up = gate_up.chunk(2, -1)
        inner = act(gate) * up
    else:
        inner = act(x @ state["up_proj.weight"].t() + state.get("up_proj.bias", zero))
    return inner @ state["down_proj.weight"].t() + state.get("down_proj.bias", zero)


def dense_block(state: dict[str, Tensor], options: dict[str, Any], x: Tensor) -> Tensor:
    """A pre-norm block from whole parameters."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}

    def norm(name: str, t: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        if options.get("norm", "rmsnorm") == "rmsnorm":
            return dense_rms_norm(t, weight)
        centred = t - t.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / scale * weight + state[f"{name}.bias"]

    h = x + dense_attention(part("attention."), options, norm("input_norm", x))
    inner = norm("post_attention_norm", h)
    return h + dense_mlp(part("mlp."), options.get("activation", "swiglu"), inner)
