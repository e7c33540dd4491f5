"""Models as strangers write them by hand: no name and no class says how to cut them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import Case, Draw, all_outputs, family, greedy_loop


class Attention(nn.Module):
    """Projections in, projection out; subclasses say what lies between."""

    fused = False

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.width, self.heads, self.dim = draw.hidden, draw.heads, draw.head_dim
        bias = draw.coin()
        if self.fused:
            self.to_qkv = nn.Linear(self.width, 3 * self.width, bias=bias)
        else:
            self.query = nn.Linear(self.width, self.width, bias=bias)
            self.key = nn.Linear(self.width, self.width, bias=bias)
            self.value = nn.Linear(self.width, self.width, bias=bias)
        self.out = nn.Linear(self.width, self.width)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each ``(B, H, T, D)``."""
        b, t, _ = x.shape
        return tuple(  # type: ignore[return-value]
            layer(x).view(b, t, self.heads, self.dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.dim)
        future = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -math.inf).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(*self.heads_of(x))
        return self.out(y.transpose(1, 2).reshape(x.shape))


class ViewFused(Attention):
    fused = True

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        qkv = self.to_qkv(x).view(b, t, 3, self.heads, self.dim)
        q, k, v = qkv.unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class ChunkFused(Attention):
    fused = True

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        q, k, v = (
            part.reshape(b, t, self.heads, -1).permute(0, 2, 1, 3)
            for part in self.to_qkv(x).chunk(3, -1)
        )
        return q, k, v


class PermuteFused(Attention):
    """As in timm."""

    fused = True

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, c = x.shape
        qkv = self.to_qkv(x).reshape(b, t, 3, self.heads, c // self.heads)
        return tuple(qkv.permute(2, 0, 3, 1, 4))  # type: ignore[return-value]


class InterleavedFused(Attention):
    """Each head's q, k and v side by side."""

    fused = True

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        qkv = self.to_qkv(x).view(b, t, self.heads, 3 * self.dim).transpose(1, 2)
        return qkv.split(self.dim, dim=-1)  # type: ignore[return-value]


class IndexFused(Attention):
    """Slices by hand; the heads joined by flatten."""

    fused = True

    def forward(self, x: Tensor) -> Tensor:
        w, qkv = self.width, self.to_qkv(x)
        q, k, v = qkv[..., :w], qkv[..., w : 2 * w], qkv[..., 2 * w :]
        q, k, v = (t.unflatten(-1, (self.heads, self.dim)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Einsum(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            layer(x).view(b, t, self.heads, self.dim)
            for layer in (self.query, self.key, self.value)
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.dim**-0.5
        scores = scores + torch.full((t, t), -1e9).triu(1)
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return self.out(y.reshape(b, t, -1))


class EinsumWeights(nn.Module):
    """No Linear at all: three-dimensional parameters, as in JAX code."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        shape = (draw.heads, draw.head_dim, draw.hidden)
        self.w_q, self.w_k, self.w_v = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.w_o = nn.Parameter(torch.empty(draw.hidden, draw.heads, draw.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,hdc->bhtd", x, w) for w in (self.w_q, self.w_k, self.w_v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.einsum("bhtd,chd->btc", y, self.w_o)


class HeadByHead(nn.Module):
    """A ModuleList of heads, each with Linears of its own; outputs joined by cat."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.heads = nn.ModuleList([OneHead(draw) for _ in range(draw.heads)])
        self.proj = nn.Linear(draw.hidden, draw.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class OneHead(nn.Module):
    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.key = nn.Linear(draw.hidden, draw.head_dim, bias=False)
        self.query = nn.Linear(draw.hidden, draw.head_dim, bias=False)
        self.value = nn.Linear(draw.hidden, draw.head_dim, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(32, 32)))

    def forward(self, x: Tensor) -> Tensor:
        t = x.size(1)
        k, q = self.key(x), self.query(x)
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(self.tril[:t, :t] == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ self.value(x)


class Temperature(Attention):
    """Cosine similarity with a learned scale for each head."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        self.temperature = nn.Parameter(torch.ones(draw.heads, 1, 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return super().mix(q * self.temperature.exp() * 3, k, v)


class HeadScale(Attention):
    """A learned gain on each head's output."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        self.gain = nn.Parameter(torch.ones(draw.heads))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(q, k, v) * self.gain.view(1, -1, 1, 1)


class Alibi(Attention):
    """Slopes in a buffer over heads."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        slopes = 2.0 ** -torch.arange(1, draw.heads + 1)
        distance = torch.arange(32)[None, :] - torch.arange(32)[:, None]
        self.register_buffer("bias", slopes[:, None, None] * distance)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.size(-2)
        future = torch.full((t, t), -math.inf).triu(1)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.bias[None, :, :t, :t] + future
        )


class RelativeTable(Attention):
    """A learned table of relative positions for each head, as in Swin."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        self.table = nn.Parameter(torch.zeros(63, draw.heads))
        index = torch.arange(32)[None, :] - torch.arange(32)[:, None] + 31
        self.register_buffer("index", index, persistent=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.size(-2)
        bias = self.table[self.index[:t, :t].reshape(-1)].view(t, t, self.heads).permute(2, 0, 1)
        scores = q @ k.transpose(-2, -1) * self.dim**-0.5 + bias[None]
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -math.inf).softmax(-1) @ v


class RelativeEmbedding(Attention):
    """As in T5: an Embedding over buckets whose width is the number of heads."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        self.relative = nn.Embedding(16, draw.heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.size(-2))
        bucket = (position[:, None] - position[None, :]).clamp(0, 15)
        bias = self.relative(bucket).permute(2, 0, 1).unsqueeze(0)
        future = torch.full(bucket.shape, -math.inf).triu(1)
        return (q @ k.transpose(-2, -1) * self.dim**-0.5 + bias + future).softmax(-1) @ v


class Rotary(Attention):
    """Positions turned in pairs, keys and queries normalised, fewer key/value heads."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        self.kv = draw.kv_heads
        self.key = nn.Linear(self.width, self.kv * self.dim, bias=False)
        self.value = nn.Linear(self.width, self.kv * self.dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.dim, 1e-6), nn.RMSNorm(self.dim, 1e-6)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        q = self.turn(self.q_norm(self.query(x).view(b, t, self.heads, self.dim)))
        k = self.turn(self.k_norm(self.key(x).view(b, t, self.kv, self.dim)))
        v = self.value(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        times = self.heads // self.kv
        k, v = (s.repeat_interleave(times, dim=1) for s in (k.transpose(1, 2), v))
        return q.transpose(1, 2), k, v

    def turn(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.size(1)), 100.0 ** -torch.linspace(0, 1, self.dim // 2))
        turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)


class TalkingHeads(Attention):
    """Linears that mix heads before and after the softmax."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        self.before = nn.Linear(draw.heads, draw.heads)
        self.after = nn.Linear(draw.heads, draw.heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1) * self.dim**-0.5).permute(0, 2, 3, 1)
        weights = self.before(scores).permute(0, 3, 1, 2)
        future = torch.ones(q.size(-2), q.size(-2), dtype=torch.bool).triu(1)
        weights = weights.masked_fill(future, -math.inf).softmax(-1).permute(0, 2, 3, 1)
        return self.after(weights).permute(0, 3, 1, 2) @ v


class Gated(Attention):
    """The output is gated by one more projection of the input."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        self.gate = nn.Linear(self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(*self.heads_of(x)).transpose(1, 2).reshape(x.shape)
        return self.out(y * torch.sigmoid(self.gate(x)))


class Linearised(Attention):
    """No softmax over keys: features of keys and values are summed over time."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        memory = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=2)
        total = torch.cumsum(k, dim=2)
        y = torch.einsum("bhtd,bhtde->bhte", q, memory)
        return y / (q * total).sum(-1, keepdim=True)


class PlainMLP(nn.Module):
    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.a = nn.Linear(draw.hidden, draw.ffn)
        self.b = nn.Linear(draw.ffn, draw.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


class ChunkedGLU(nn.Module):
    """Gate and value from one Linear."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.wide = nn.Linear(draw.hidden, 2 * draw.ffn)
        self.narrow = nn.Linear(draw.ffn, draw.hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(x).chunk(2, dim=-1)
        return self.narrow(value * F.silu(gate))


class ModuleGLU(nn.Module):
    """``nn.GLU`` in a Sequential."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(draw.hidden, 2 * draw.ffn), nn.GLU(-1), nn.Linear(draw.ffn, draw.hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class NormInside(nn.Module):
    """A LayerNorm over the features between two Linears."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.a = nn.Linear(draw.hidden, draw.ffn)
        self.norm = nn.LayerNorm(draw.ffn)
        self.b = nn.Linear(draw.ffn, draw.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


class SoftmaxInside(nn.Module):
    """Soft addresses over features, then a Linear as memory."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.address = nn.Linear(draw.hidden, draw.ffn)
        self.memory = nn.Linear(draw.ffn, draw.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.memory(F.softmax(self.address(x), dim=-1)) * 5


class ResidualInside(nn.Module):
    """The inner width has a residual of its own, and a vector that scales it."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.up = nn.Linear(draw.hidden, draw.ffn)
        self.middle = nn.Linear(draw.ffn, draw.ffn)
        self.scale = nn.Parameter(torch.ones(draw.ffn))
        self.down = nn.Linear(draw.ffn, draw.hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        return self.down(h + torch.tanh(self.middle(h)) * self.scale)


class SharedTwice(nn.Module):
    """One Linear for two purposes: the input's and the hidden state's."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.both = nn.Linear(draw.hidden, draw.hidden)
        self.out = nn.Linear(draw.hidden, draw.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.both(F.relu(self.both(x)))) + self.both(x.flip(-1)))


class OneFeature(nn.Module):
    """A gate from a Linear with one output."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.mlp = PlainMLP(draw)
        self.gate = nn.Linear(draw.hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * torch.sigmoid(self.gate(x))


class SelfMade(nn.Module):
    """Weights as bare parameters, by hand and by F.linear; the second is stored transposed."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(draw.ffn, draw.hidden))
        self.b1 = nn.Parameter(torch.zeros(draw.ffn))
        self.w2 = nn.Parameter(torch.empty(draw.ffn, draw.hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.w1, self.b1)) @ self.w2


class Rolled(nn.Module):
    """Neighbouring features meet between the Linears: no elementwise cut."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.a = nn.Linear(draw.hidden, draw.ffn)
        self.b = nn.Linear(draw.ffn, draw.hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h + 0.5 * h.roll(1, -1))


class LowRank(nn.Module):
    """Two Linears with nothing between, beside a full one."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.full = nn.Linear(draw.hidden, draw.hidden)
        self.down = nn.Linear(draw.hidden, 5, bias=False)
        self.up = nn.Linear(5, draw.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.full(x) + self.up(self.down(x)))


class Language(nn.Module):
    """Embedding, two pre-norm blocks of an attention and an MLP, and a head."""

    def __init__(self, draw: Draw, attention: Any, mlp: Any, tied: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(draw.vocab, draw.hidden)
        self.pos = nn.Parameter(torch.zeros(1, 32, draw.hidden))
        self.norms = nn.ModuleList([nn.LayerNorm(draw.hidden) for _ in range(5)])
        self.attentions = nn.ModuleList([attention(draw) for _ in range(2)])
        self.mlps = nn.ModuleList([mlp(draw) for _ in range(2)])
        self.head = None if tied else nn.Linear(draw.hidden, draw.vocab)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids) + self.pos[:, : ids.size(1)]
        for i in range(2):
            x = x + self.attentions[i](self.norms[2 * i](x))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        x = self.norms[4](x)
        return F.linear(x, self.emb.weight) if self.head is None else self.head(x)


def speaker(name: str, attention: Any = Attention, mlp: Any = PlainMLP, tied: Any = None) -> None:
    """Enter a language model with one odd part."""

    def make(draw: Draw) -> Case:
        is_tied = draw.coin() if tied is None else tied
        ids = draw.ids()
        greedy = greedy_loop(ids[:, :5], lambda model, seen: model(seen))
        return Case(Language(draw, attention, mlp, is_tied), {"ids": ids}, greedy=greedy)

    family(name, "stranger")(make)


speaker("plain-attention")
speaker("functional-tie", tied=True)
speaker("einsum-attention", Einsum)
speaker("einsum-weights", EinsumWeights)
speaker("head-list", HeadByHead)
speaker("fused-view", ViewFused)
speaker("fused-chunk", ChunkFused)
speaker("fused-permute", PermuteFused)
speaker("fused-interleaved", InterleavedFused)
speaker("fused-index", IndexFused)
speaker("head-temperature", Temperature)
speaker("head-gain", HeadScale)
speaker("alibi-buffer", Alibi)
speaker("relative-table", RelativeTable)
speaker("relative-embedding", RelativeEmbedding)
speaker("rotary-grouped", Rotary)
speaker("talking-heads", TalkingHeads)
speaker("gated-attention", Gated)
speaker("linear-attention", Linearised)
speaker("glu-chunk", mlp=ChunkedGLU)
speaker("glu-module", mlp=ModuleGLU)
speaker("norm-inside", mlp=NormInside)
speaker("softmax-inside", mlp=SoftmaxInside)
speaker("residual-inside", mlp=ResidualInside)
speaker("linear-twice", mlp=SharedTwice)
speaker("one-feature", mlp=OneFeature)
speaker("bare-parameters", mlp=SelfMade)
speaker("rolled-features", mlp=Rolled)
speaker("low-rank", mlp=LowRank)


class Regressor(nn.Module):
    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(9, draw.ffn), nn.Tanh(), nn.Linear(draw.ffn, draw.ffn), nn.Tanh()
        )
        self.out = nn.Linear(draw.ffn, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x)).squeeze(-1)


@family("regressor", "stranger")
def regressor(draw: Draw) -> Case:
    return Case(Regressor(draw), {"x": draw.values(6, 9)})


class Mixer(nn.Module):
    """One MLP over tokens, one over features."""

    def __init__(self, draw: Draw, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(draw.hidden), nn.LayerNorm(draw.hidden)
        self.tokens = nn.Sequential(nn.Linear(tokens, 13), nn.GELU(), nn.Linear(13, tokens))
        self.features = PlainMLP(draw)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.features(self.norm2(x))


@family("mlp-mixer", "stranger")
def mlp_mixer(draw: Draw) -> Case:
    model = nn.Sequential(
        nn.Linear(6, draw.hidden), Mixer(draw, 9), Mixer(draw, 9), nn.Linear(draw.hidden, 7)
    )
    return Case(model, {"input": draw.values(2, 9, 6)})


class UNet(nn.Module):
    """Convolutions down and up with a skip, and attention over pixels at the bottom."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        w = draw.hidden
        self.down1 = nn.Conv2d(3, w, 3, padding=1)
        self.down2 = nn.Conv2d(w, w, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(draw.heads, w)
        self.attention = PixelAttention(draw)
        self.up = nn.ConvTranspose2d(w, w, 2, stride=2)
        self.merge = nn.Conv2d(2 * w, w, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(8, draw.ffn), nn.SiLU(), nn.Linear(draw.ffn, w))
        self.out = nn.Conv2d(w, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = F.silu(self.down1(x))
        h = F.silu(self.down2(skip)) + self.time(t)[:, :, None, None]
        h = h + self.attention(self.norm(h))
        h = F.silu(self.merge(torch.cat([self.up(h), skip], 1)))
        return self.out(h)


class PixelAttention(PermuteFused):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        pixels = super().forward(x.flatten(2).transpose(1, 2))
        return pixels.transpose(1, 2).reshape(x.shape)


@family("u-net", "stranger")
def u_net(draw: Draw) -> Case:
    return Case(UNet(draw), {"x": draw.values(2, 3, 6, 6), "t": draw.values(2, 8)})


class Recurrent(nn.Module):
    def __init__(self, draw: Draw, kind: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(draw.vocab, draw.hidden)
        self.rnn = kind(draw.hidden, draw.ffn, batch_first=True)
        self.head = nn.Linear(draw.ffn, draw.vocab)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


@family("lstm", "stranger")
def lstm(draw: Draw) -> Case:
    ids = draw.ids()
    greedy = greedy_loop(ids[:, :5], lambda model, seen: model(seen))
    kind = draw.one_of(nn.LSTM, nn.GRU)
    return Case(Recurrent(draw, kind), {"ids": ids}, greedy=greedy)


class CrossAttention(nn.Module):
    """Queries from one side, keys and values (fused by two) from a context of another width."""

    def __init__(self, draw: Draw, context: int) -> None:
        super().__init__()
        self.heads, inner = draw.heads, draw.heads * draw.head_dim
        self.to_q = nn.Linear(draw.ffn, inner, bias=False)
        self.to_kv = nn.Linear(context, 2 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, draw.ffn), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (
            t.reshape(t.size(0), t.size(1), self.heads, -1).transpose(1, 2) for t in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.to_out(y.reshape(y.size(0), y.size(1), -1))


class Perceiver(nn.Module):
    """Learned queries that read a context."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(5, draw.ffn))
        self.norm = nn.LayerNorm(draw.ffn)
        self.read = CrossAttention(draw, 11)
        self.head = nn.Linear(draw.ffn, 6)

    def forward(self, context: Tensor) -> Tensor:
        x = self.latents.expand(context.size(0), -1, -1)
        return self.head(x + self.read(self.norm(x), context))


@family("cross-attention", "stranger")
def cross_attention(draw: Draw) -> Case:
    return Case(Perceiver(draw), {"context": draw.values(2, 8, 11)})


@dataclass
class Answer:
    scores: Tensor
    hidden: Tensor


class TwoHeads(nn.Module):
    """A trunk with two results, returned as ``shape`` says."""

    def __init__(self, draw: Draw, shape: str) -> None:
        super().__init__()
        self.shape = shape
        self.first = nn.Linear(10, draw.hidden)
        self.trunk = PlainMLP(draw)
        self.policy = nn.Linear(draw.hidden, 7)
        self.value = nn.Linear(draw.hidden, 1)

    def forward(self, *, x: Tensor) -> Any:
        h = self.first(x)
        h = h + self.trunk(F.relu(h))
        policy, value = self.policy(h), self.value(h)
        if self.shape == "dict":
            return {"policy": policy, "value": value}
        return (policy, value) if self.shape == "tuple" else Answer(policy, value)


def two_heads(shape: str) -> None:
    def make(draw: Draw) -> Case:
        def output(returned: Any) -> Tensor:
            values = vars(returned) if isinstance(returned, Answer) else returned
            return all_outputs(values)

        return Case(TwoHeads(draw, shape), {"x": draw.values(4, 10)}, output=output)

    family(f"returns-{shape}", "stranger")(make)


for kind in ("dict", "tuple", "dataclass"):
    two_heads(kind)


class Torchs(nn.Module):
    """``nn.MultiheadAttention``; ``need_weights`` averages the weights over all heads."""

    def __init__(self, draw: Draw, options: dict[str, Any], each_head: bool = False) -> None:
        super().__init__()
        width = draw.hidden
        self.mha = nn.MultiheadAttention(width, draw.heads, batch_first=True, **options)
        self.needs = options.get("kdim") is None
        self.context = options.get("kdim") or width
        self.each_head = each_head
        self.mlp = PlainMLP(draw)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.mha(
            x, context, context, need_weights=True, average_attn_weights=not self.each_head
        )
        return self.mlp(x + y), weights


def torchs(name: str, each_head: bool = False, **options: Any) -> None:
    def make(draw: Draw) -> Case:
        width = options.get("kdim") or draw.hidden
        inputs = {"x": draw.values(2, 5, draw.hidden), "context": draw.values(2, 7, width)}
        return Case(Torchs(draw, options, each_head), inputs, output=all_outputs)

    family(name, "stranger")(make)


torchs("mha-weights")
torchs("mha-weights-each-head", each_head=True)
torchs("mha-kdim", kdim=10, vdim=10)
torchs("mha-bias-kv", add_bias_kv=True, add_zero_attn=True, bias=False)


@family("transformer", "stranger")
def transformer(draw: Draw) -> Case:
    """torch's own, with encoder and decoder."""
    model = nn.Transformer(
        draw.hidden, draw.heads, 1, 1, draw.ffn, 0.0, batch_first=True, norm_first=draw.coin()
    )
    inputs = {"src": draw.values(2, 5, draw.hidden), "tgt": draw.values(2, 4, draw.hidden)}
    return Case(model, inputs)


class Buried(nn.Module):
    """The same block object twice, a frozen Linear, and one that is never used."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.enter = nn.Linear(8, draw.hidden).requires_grad_(False)
        block = PlainMLP(draw)
        self.blocks = nn.ModuleList([block, nn.LayerNorm(draw.hidden), block])
        self.unused = nn.Linear(draw.hidden, draw.ffn)
        self.leave = nn.Linear(draw.hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = block(h)
        return self.leave(h)


@family("shared-block", "stranger")
def shared_block(draw: Draw) -> Case:
    return Case(Buried(draw), {"x": draw.values(3, 8)})


class Autoencoder(nn.Module):
    """The decoder is the encoder's weight transposed."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, draw.ffn)
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sigmoid(self.encoder(x)), self.encoder.weight.t(), self.bias)


@family("autoencoder", "stranger")
def autoencoder(draw: Draw) -> Case:
    return Case(Autoencoder(draw), {"x": draw.values(3, 12)})


class Experts(nn.Module):
    """A soft mixture: every expert runs, a softmax weighs them."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.router = nn.Linear(draw.hidden, 3)
        self.experts = nn.ModuleList([PlainMLP(draw) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * weights.unsqueeze(-2)).sum(-1)


speaker("soft-experts", mlp=Experts)


class Routed(Experts):
    """Each token goes to its best expert: what runs depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        best = self.router(x).softmax(-1)
        weight, choice = best.max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = choice == i
            if mine.any():
                y[mine] = expert(x[mine]) * weight[mine].unsqueeze(-1)
        return y


speaker("routed-experts", mlp=Routed)
