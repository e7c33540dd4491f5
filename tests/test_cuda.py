"""On a real GPU: every op against float64 on the CPU, over our own kernels with ranks as threads,
and over NCCL with processes that share the GPU. What depends on nothing but a GPU's arithmetic and
its streams is here; the protocol's tests run anywhere, over doubles.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Kernels of thread ranks wait for each other: no two of them in one hardware queue, and none loaded
# while another one waits. Read when CUDA starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tp_native as tp
from oracle import rank_data, reduce_in_rank_order, relative_error
from tp_native import _C, _ops, gpu
from tp_native.group import Group
from tp_native.nn import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no NVIDIA GPU, or torch without CUDA"
    ),
]

GPU = "cuda:0"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
# A result is rounded once or twice to its type (each at most eps / 2 of it) after sums in a wider
# one; float32's sums are float32's own, over at most 200 terms here.
LIMITS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4 * 2**-11,
    torch.bfloat16: 4 * 2**-8,
}
# cuBLASLt's GELU is made of tanh.approx.f32, which is good to 2^-11
GELU_LIMITS = {**LIMITS, torch.float32: 1e-3}
REPLAYS = 1000
PROCESS_LIMIT_S = 60.0
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def data(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """On the GPU, the same in every rank."""
    return rank_data(shape, dtype, 0, seed).to(GPU)


def check(name: str, y: Tensor, exact: Tensor, limit: float) -> None:
    assert y.is_cuda and y.shape == exact.shape, name
    if y.numel() > 0:
        error = relative_error(y.cpu(), exact)
        assert error <= limit, f"{name}: off by {error:.2g} of the largest value, limit {limit:.2g}"


@pytest.fixture(autouse=True)
def waits_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that never comes is an error soon, not at the end of the run."""
    monkeypatch.setattr(tp.TensorParallelConfig, "timeout_s", 30.0)


def share(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    return tp.simulate(fn, world_size, *args, device=GPU)


# -- one rank


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_glu_and_its_gradient(activation: str, dtype: torch.dtype) -> None:
    for shape in [(6,), (5, 14), (2, 3, 272), (0, 8), (3, 0)]:
        x = data(shape, dtype, 1).requires_grad_()
        y = _ops.glu(x, activation)
        dense = x.detach().cpu().double().requires_grad_()
        gate, up = dense.chunk(2, -1)
        exact = ACTIVATIONS[activation](gate) * up
        check("glu", y.detach(), exact.detach(), LIMITS[dtype])
        grad = data(tuple(y.shape), dtype, 2)
        y.backward(grad)
        exact.backward(grad.cpu().double())
        assert x.grad is not None and dense.grad is not None
        check("its gradient", x.grad, dense.grad, LIMITS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_glu_of_strided_input(dtype: torch.dtype) -> None:
    x = data((10, 6), dtype, 1).t()
    gate, up = x.cpu().double().chunk(2, -1)
    check("glu", _ops.glu(x, "silu"), F.silu(gate) * up, LIMITS[dtype])


# -- thread ranks over our own kernels


def reduces_as_the_cpu_does(group: Group, dtype: torch.dtype) -> None:
    for count in (0, 1, 1003, 70_001):
        parts = [rank_data((count,), dtype, rank) for rank in range(group.size)]
        for op in ("sum", "avg", "max", "min"):
            y = group.all_reduce_(parts[group.rank].to(GPU), op)
            assert torch.equal(y.cpu(), reduce_in_rank_order(parts, op)), (count, op)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_all_reduce_has_the_cpus_bits(dtype: torch.dtype, world_size: int) -> None:
    share(reduces_as_the_cpu_does, world_size, dtype)


def moves_parts(group: Group) -> None:
    widths = [3 + 2 * rank for rank in range(group.size)]
    widths[-1] = 0
    cut = tp.Partition.from_sizes(widths)
    parts = [rank_data((5, width), torch.float32, rank) for rank, width in enumerate(widths)]
    whole = torch.cat(parts, 1)
    mine = parts[group.rank].to(GPU)
    assert torch.equal(group.all_gather(mine, dim=1, partition=cut).cpu(), whole)
    summed = group.reduce_scatter(whole.to(GPU), dim=1, partition=cut)
    exact = reduce_in_rank_order([whole] * group.size)
    assert torch.equal(summed.cpu(), exact[:, cut.slice(group.rank)])
    y = group.broadcast_(torch.full((7,), float(group.rank), device=GPU), src=group.size - 1)
    assert y.tolist() == [group.size - 1.0] * 7
    strided = whole.to(GPU).t()
    assert torch.equal(group.all_reduce_(strided, "max").cpu(), whole.t())
    group.barrier()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_parts_go_where_they_belong(world_size: int) -> None:
    share(moves_parts, world_size)


def multiplies(group: Group, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Both layers on widths that do not divide, values and gradients."""
    cut = tp.Partition.even(22, group.size)
    up, bias = data((22, 12), dtype, 1), data((22,), dtype, 2)
    down, down_bias = data((10, 22), dtype, 3), data((10,), dtype, 4)
    part = cut.slice(group.rank)
    x = data((*rows, 12), dtype, 5)

    def layers(activation: str) -> tuple[ColumnParallelLinear, RowParallelLinear]:
        column = ColumnParallelLinear(
            12, 22, partition=cut, activation=activation, device=GPU, dtype=dtype
        )
        row = RowParallelLinear(22, 10, partition=cut, device=GPU, dtype=dtype)
        with torch.no_grad():
            column.weight.copy_(up[part])
            row.weight.copy_(down[:, part])
            assert column.bias is not None and row.bias is not None
            column.bias.copy_(bias[part])
            row.bias.copy_(down_bias)
        return column, row

    for activation in ("relu", "gelu_tanh", "gelu"):
        column, row = layers(activation)
        dense = [t.cpu().double().requires_grad_() for t in (x, up, bias, down, down_bias)]
        inner = ACTIVATIONS[activation](F.linear(dense[0], dense[1], dense[2]))
        exact = F.linear(inner, dense[3], dense[4])
        limit = 2 * GELU_LIMITS[dtype]
        with torch.no_grad():  # fused
            y = column(x)
            check(f"column, {activation}", y, inner.detach()[..., part], limit)
            check(f"row after {activation}", row(y), exact.detach(), limit)
        mine = x.clone().requires_grad_()
        y = row(column(mine))
        grad = data(tuple(y.shape), dtype, 6)
        y.backward(grad)
        exact.backward(grad.cpu().double())
        grads = [t.grad for t in dense]
        assert all(t is not None for t in grads)
        for name, got, full in [
            ("dx", mine.grad, grads[0]),
            ("column dW", column.weight.grad, grads[1][part]),
            ("column db", column.bias.grad, grads[2][part]),
            ("row dW", row.weight.grad, grads[3][:, part]),
            ("row db", row.bias.grad, grads[4]),
        ]:
            assert got is not None and full is not None
            check(f"{name}, {activation}", got, full, limit)


@pytest.mark.parametrize("rows", [(7,), (2, 3), (0,)], ids=["7", "2x3", "none"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_linear_layers_and_their_gradients(
    dtype: torch.dtype, world_size: int, rows: tuple[int, ...]
) -> None:
    share(multiplies, world_size, dtype, rows)


def takes_strided_input(group: Group) -> None:
    cut = tp.Partition.even(24, group.size)
    x = data((6, 9), torch.bfloat16, 1).t()  # [9, 6], columns 1 apart
    weight = data((24, 6), torch.bfloat16, 2)
    layer = ColumnParallelLinear(6, 24, False, partition=cut, activation="relu", device=GPU).to(
        torch.bfloat16
    )
    with torch.no_grad():
        layer.weight.copy_(weight[cut.slice(group.rank)])
        y = layer(x)
    exact = F.linear(x.cpu().double(), weight.cpu().double()).relu()[:, cut.slice(group.rank)]
    check("column", y, exact, LIMITS[torch.bfloat16])


def test_strided_input_is_taken_as_it_is() -> None:
    share(takes_strided_input, 2)


def overlaps(group: Group) -> None:
    """Rows enough for several chunks: summed one by one beside the next GEMM."""
    rows, inner, columns = 8192, 512, 1024
    cut = tp.Partition.even(inner, group.size)
    part = cut.slice(group.rank)
    x, weight = data((rows, inner), torch.bfloat16, 1), data((columns, inner), torch.bfloat16, 2)
    layer = RowParallelLinear(inner, columns, False, partition=cut, device=GPU, dtype=x.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight[:, part])
        y = layer(x[:, part].contiguous())
        exact = torch.mm(x.double(), weight.double().t())
    check("row", y, exact.cpu(), LIMITS[torch.bfloat16])


def test_chunks_of_a_large_product_are_summed() -> None:
    share(overlaps, 2)


def cuts_tokens(group: Group, dtype: torch.dtype, tokens: list[int]) -> None:
    size, rank = group.size, group.rank
    scale = 32 if max(tokens) > 1000 else 1  # enough to be cut into chunks
    wide, widths = 48 * scale, [scale * (16 + 8 * r) for r in range(size)]
    cut = (group.order, widths, tokens, 0, rank, group.name)
    x = data((sum(tokens), wide), dtype, 1)
    up, down = data((sum(widths), wide), dtype, 2), data((wide, sum(widths)), dtype, 3)
    offset, bias = data((sum(widths),), dtype, 4), data((wide,), dtype, 5)
    mine = [
        part.clone().requires_grad_()
        for part in (
            x.split(tokens)[rank],
            up.split(widths)[rank],
            offset.split(widths)[rank],
            down.split(widths, 1)[rank],
            bias,
        )
    ]
    y, gathered = _ops.gathered_column_parallel_linear(*mine[:3], *cut)
    assert torch.equal(gathered, x)
    z = _ops.row_parallel_linear_scatter(y, *mine[3:], *cut)
    dz = data((sum(tokens), wide), dtype, 6)
    z.backward(dz.split(tokens)[rank])  # type: ignore[no-untyped-call]
    exact = [t.double().requires_grad_() for t in (x, up, offset, down, bias)]
    whole = F.linear(F.linear(exact[0], exact[1], exact[2]), exact[3], exact[4])
    whole.backward(dz.double())  # type: ignore[no-untyped-call]
    limit = 4 * LIMITS[dtype]  # two layers
    check("z", z, whole.split(tokens)[rank].cpu(), limit)
    cuts = [(tokens, 0), (widths, 0), (widths, 0), (widths, 1), ([wide], 0)]
    for n, (sizes, dim) in enumerate(cuts):
        grad = exact[n].grad
        assert grad is not None
        part = grad.split(sizes, dim)[rank if len(sizes) > 1 else 0]
        check(f"gradient {n}", mine[n].grad, part.cpu(), limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [[3, 5], [0, 4], [4096, 4100]], ids=["few", "none", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_tokens_are_cut_and_joined_with_the_products(dtype: torch.dtype, tokens: list[int]) -> None:
    share(cuts_tokens, 2, dtype, tokens)


def tunes(group: Group) -> None:
    model = nn.Sequential(
        ColumnParallelLinear(64, 256, activation="relu", group=group, device=GPU),
        RowParallelLinear(256, 64, group=group, device=GPU),
    )
    x = data((96, 64), torch.float32, 1)
    before = model(x)
    result = tp.tune_linear(model, [96], group, backward=True)
    assert {t.problem.kind for t in result.tuned} == {"row", "column_relu", "column_backward"}
    assert all(t.best_us <= t.heuristic_us for t in result.tuned)
    check("tuned", model(x), before.double().cpu(), LIMITS[torch.float32])


def test_products_are_tuned_and_stay_right() -> None:
    share(tunes, 2)


def normalises(group: Group, dtype: torch.dtype) -> None:
    cut = tp.Partition.even(21, group.size)
    part = cut.slice(group.rank)
    for rows in (0, 1, 9):
        x, weight = data((rows, 21), dtype, 1), data((40, 21), dtype, 2)
        bias, residual, scale = (
            data((40,), dtype, 3),
            data((rows, 40), dtype, 4),
            data((40,), dtype, 5),
        )
        layer = RowParallelLinear(21, 40, partition=cut, device=GPU, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(weight[:, part])
            assert layer.bias is not None
            layer.bias.copy_(bias)
            normed, hidden = layer.forward_add_rms_norm(
                x[:, part].contiguous(), residual, scale, eps=1e-5
            )
        wide = [t.cpu().double() for t in (x, weight, bias, residual, scale)]
        exact = F.linear(wide[0], wide[1], wide[2]) + wide[3]
        check("hidden", hidden, exact, 2 * LIMITS[dtype])
        norm = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * wide[4]
        check("normed", normed, norm, 3 * LIMITS[dtype])


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_residual_and_rms_norm_follow_the_sum(dtype: torch.dtype, world_size: int) -> None:
    share(normalises, world_size, dtype)


def looks_up(group: Group, dtype: torch.dtype) -> None:
    cut = tp.Partition.even(23, group.size)
    table = data((23, 6), dtype, 1)
    layer = VocabParallelEmbedding(23, 6, partition=cut, device=GPU, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(table[cut.slice(group.rank)])
    for ids in (torch.tensor([[0, 22, 7], [7, 11, 3]]), torch.empty(0, dtype=torch.int64)):
        y = layer(ids.to(GPU))
        assert torch.equal(y, F.embedding(ids.to(GPU), table))  # one rank's row and zeros
    y = layer(torch.tensor([3, 3, 22], device=GPU))
    y.backward(torch.ones_like(y))
    exact = torch.zeros(23, 6, dtype=dtype)
    exact[3], exact[22] = 2, 1
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad.cpu(), exact[cut.slice(group.rank)])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_embedding_and_its_gradient(dtype: torch.dtype, world_size: int) -> None:
    share(looks_up, world_size, dtype)


def counts_the_whole_vocabulary(group: Group, dtype: torch.dtype) -> None:
    whole = data((5, 23), dtype, 1)
    target = torch.tensor([0, 22, 7, -100, 19])
    for cut in (
        tp.Partition.even(23, group.size),
        tp.Partition.from_ratios(23, [0, 1, 2][-group.size :]),
    ):
        mine = cut.slice(group.rank)
        for vocab_size, smoothing, partition in (
            (None, 0.0, cut),
            (None, 0.1, None),
            (23, 0.1, cut),
        ):
            x = whole[:, mine].clone().requires_grad_()
            loss = tp.vocab_parallel_cross_entropy(
                x,
                target.to(GPU),
                label_smoothing=smoothing,
                vocab_size=vocab_size,
                partition=partition,
                group=group,
            )
            dense = whole.cpu().double().clone().requires_grad_()
            exact = F.cross_entropy(dense, target, reduction="none", label_smoothing=smoothing)
            # of its statistics, float32's at least
            limit = LIMITS[torch.float64 if dtype == torch.float64 else torch.float32]
            check("loss", loss.detach(), exact.detach(), limit)
            loss.sum().backward()
            exact.sum().backward()
            assert x.grad is not None and dense.grad is not None
            check("its gradient", x.grad, dense.grad[:, mine], LIMITS[dtype])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_cross_entropy_and_its_gradient(dtype: torch.dtype, world_size: int) -> None:
    share(counts_the_whole_vocabulary, world_size, dtype)


class Block(nn.Module):
    """Column, activation, row: a rank's part of an MLP."""

    def __init__(self, group: Group, hidden: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = ColumnParallelLinear(
            hidden, inner, group=group, activation="gelu_tanh", device=GPU, dtype=dtype
        )
        self.down = RowParallelLinear(inner, hidden, group=group, device=GPU, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x))
        return y


def replays(block: nn.Module, group: Group, x: Tensor) -> None:
    """A captured forward gives the eager one's bits, as often as it is replayed."""
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what it needs is there before the capture
            for _ in range(3):
                eager = block(x)
        torch.cuda.synchronize()
        group.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            y = block(x)
        for index in range(REPLAYS):
            graph.replay()
            if index % 100 == 99:
                assert torch.equal(y, eager), f"replay {index}"
                y.zero_()


def group_of_one(communicator: _C.Communicator) -> Group:
    """A world of one has no communicator of its own accord; this one runs its collectives."""
    config = tp.TensorParallelConfig(backend=communicator.backend, device=torch.device(GPU))
    group = Group(config, communicator, communicator.name)
    _C.register(group.name, communicator)
    return group


@pytest.mark.parametrize("rows", [64, 8192])
def test_a_captured_block_replays_to_the_same_bits(rows: int) -> None:
    """One rank: graphs of ranks that share a GPU might be run one after the other."""
    control = _C.make_local("tp:graph", 1, 60.0)[0]
    group = group_of_one(_C.make_peers(0, control))
    try:
        cut = [1024]
        x = data((rows, 512), torch.bfloat16, 1)
        up, bias = data((1024, 512), torch.bfloat16, 2), data((1024,), torch.bfloat16, 3)
        down = data((512, 1024), torch.bfloat16, 4)

        class Ops(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                args = (group.order, cut, group.name)
                y = _ops.column_parallel_linear_act(x, up, bias, "gelu_tanh", *args)
                return _ops.row_parallel_linear(y, down, None, *args)

        replays(Ops(), group, x)
    finally:
        group.close()


def disagrees(group: Group) -> None:
    try:
        group.all_reduce_(torch.ones(4 + group.rank, device=GPU))
        for _ in range(500):  # told by the watches, some milliseconds later
            group.check()
            time.sleep(0.01)
    except tp.CollectiveMismatchError as error:
        assert "all_reduce" in str(error)
        return
    raise AssertionError(f"rank {group.rank} was not told")


def test_a_mismatch_is_told_on_all_ranks() -> None:
    with pytest.raises(tp.CollectiveMismatchError):  # and the group stays failed
        share(disagrees, 2)


def fails_alone(group: Group) -> None:
    if group.rank == 1:
        raise ValueError("rank 1 has had enough")
    y = group.all_reduce_(torch.ones(4, device=GPU))
    y.cpu()  # comes back: the kernel that waits is ended


def test_a_rank_that_fails_ends_the_kernels_of_the_others() -> None:
    start = time.monotonic()
    with pytest.raises((ValueError, tp.TensorParallelError), match="enough"):
        share(fails_alone, 2)
    assert time.monotonic() - start < 5


# -- processes over NCCL that share the GPU


def nccl_process(rank: int, size: int, what: str, *, run_id: str) -> subprocess.Popen[str]:
    """``python test_cuda.py WHAT`` as one rank. NCCL takes each process for a host of its own."""
    env = {
        **os.environ,
        "NCCL_HOSTID": f"tpn-{rank}",
        "NCCL_NET": "Socket",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_ALGO": "Ring",
        "NCCL_PROTO": "Simple",
        "TP_NATIVE_NCCL_MAX_CTAS": "2",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": run_id,
    }
    return subprocess.Popen(
        [sys.executable, __file__, what],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent,
    )


def run_over_nccl(what: str, size: int, survivors: int | None = None) -> list[str]:
    """What each rank printed; every process is killed at the limit. ``survivors``: how many are
    expected to end well; None: all.
    """
    run_id = f"{os.getpid()}-{what}-{time.monotonic_ns()}"
    ranks = [nccl_process(rank, size, what, run_id=run_id) for rank in range(size)]
    end = time.monotonic() + PROCESS_LIMIT_S
    printed = []
    try:
        for rank in ranks:
            try:
                printed.append(rank.communicate(timeout=max(0.1, end - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                rank.kill()
                text = rank.communicate()[0]
                pytest.fail(
                    f"{what}: a rank of {size} was still running after "
                    f"{PROCESS_LIMIT_S:g} s; it said:\n{text[-4000:]}"
                )
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    good = [rank.returncode == 0 for rank in ranks]
    wanted = size if survivors is None else survivors
    assert sum(good) == wanted, "\n".join(
        f"status {r.returncode}:\n{t[-4000:]}" for r, t in zip(ranks, printed, strict=True)
    )
    return printed


@pytest.mark.parametrize("size", [1, 2])
def test_collectives_over_nccl(size: int) -> None:
    run_over_nccl("collectives", size)


@pytest.mark.parametrize("size", [1, 2])
def test_layers_over_nccl(size: int) -> None:
    run_over_nccl("layers", size)


@pytest.mark.parametrize("size", [1, 2])
def test_a_captured_block_over_nccl_replays_to_the_same_bits(size: int) -> None:
    run_over_nccl("graph", size)


def test_a_killed_peer_is_told_over_nccl() -> None:
    printed = run_over_nccl("killed", 2, survivors=1)
    assert "told after" in printed[0]


def test_a_mismatch_is_told_over_nccl() -> None:
    printed = run_over_nccl("mismatch", 2)
    assert all("told after" in text for text in printed)


def as_collectives(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for count in (1, 1003, (1 << 20) + 3):
            parts = [rank_data((count,), dtype, rank) for rank in range(group.size)]
            y = group.all_reduce_(parts[group.rank].to(GPU))
            exact = sum(part.double() for part in parts)
            assert isinstance(exact, Tensor)
            check("all_reduce", y, exact, LIMITS[dtype])
            same = group.all_gather(y)
            assert all(torch.equal(part, y) for part in same.chunk(group.size))
    if group.size > 1:
        moves_parts(group)


def as_layers(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rows in ((7,), (0,)):
            if group.size > 1:
                multiplies(group, dtype, rows)
        normalises(group, dtype)
        looks_up(group, dtype)


def as_graph(group: Group) -> None:
    for rows in (64, 4096):
        block = Block(group, 512, 1024, torch.bfloat16)
        replays(block, group, data((rows, 512), torch.bfloat16, 1))
        group.barrier()


def until_told(group: Group, kind: type[tp.TensorParallelError]) -> None:
    start = time.monotonic()
    try:
        while time.monotonic() - start < 10:
            group.all_reduce_(torch.ones(1024, device=GPU))
            group.check()
            time.sleep(0.001)
    except kind as error:
        took = time.monotonic() - start
        assert took < 5, f"told after {took:.1f} s"
        print(f"told after {took:.2f} s: {error}")
        return
    raise AssertionError("not told")


def as_killed(group: Group) -> None:
    group.all_reduce_(torch.ones(1024, device=GPU))
    torch.cuda.synchronize()
    group.barrier()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    until_told(group, tp.PeerLostError)


def as_mismatch(group: Group) -> None:
    start = time.monotonic()
    try:
        group.all_reduce_(torch.ones(16, device=GPU), "sum" if group.rank == 0 else "max")
        while time.monotonic() - start < 10:
            group.check()
            time.sleep(0.001)
    except tp.CollectiveMismatchError as error:
        took = time.monotonic() - start
        assert took < 5, f"told after {took:.1f} s"
        print(f"told after {took:.2f} s: {error}")
        return
    raise AssertionError("not told")


def main() -> None:
    """One rank of ``run_over_nccl``."""
    what = globals()[f"as_{sys.argv[1]}"]
    if sys.argv[1] in ("killed", "mismatch"):
        group = tp.init_tensor_parallel("nccl", timeout_s=30, init_timeout_s=30)
        what(group)  # the group has failed: nothing is left to close in order
        sys.stdout.flush()
        os._exit(0)
    if os.environ["WORLD_SIZE"] == "1":
        joined = group_of_one(gpu.make_nccl(_C.make_local("tp:one", 1, 30.0)[0], 0, 30.0))
    else:
        joined = tp.init_tensor_parallel("nccl", timeout_s=30, init_timeout_s=30)
    with joined as group:
        what(group)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
