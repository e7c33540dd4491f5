"""The ops under torch's own checks: schemas, fake kernels, autograd registration, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tp_native as tp
from harness import run_ranks
from tp_native.group import Group
from tp_native.nn import ColumnParallelLinear, RowParallelLinear


def samples(group: Group) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every op with arguments that need a gradient where it has one."""
    size, rank, order, name = group.size, group.rank, group.order, group.name

    def t(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

    widths = [4 + r for r in range(size)]
    mine = widths[rank]
    yield "row_parallel_linear", (t(3, mine), t(5, mine), t(5), order, widths, name)
    yield "row_parallel_linear", (t(2, 2, mine), t(5, mine), None, order, widths, name)
    residual, scale = t(2, 2, 5), t(5)
    args = (t(2, 2, mine), t(5, mine), t(5), residual, scale, 1e-5, order, widths, name)
    yield "row_parallel_linear_add_rms_norm", args
    yield "column_parallel_linear", (t(3, 6), t(mine, 6), t(mine), order, widths, name)
    for act in ("relu", "gelu_tanh"):
        args = (t(3, 6), t(mine, 6), t(mine), act, order, widths, name)
        yield "column_parallel_linear_act", args
    for has_bias in (False, True):
        args = (t(2, 3, mine), t(2, 3, 6), t(mine, 6), has_bias, order, widths, name)
        yield "column_parallel_linear_backward", args
    for shape, dim in (((sum(widths),), 0), ((2, sum(widths)), 1), ((sum(widths), 2), 0)):
        args = (t(*shape, mine), t(5, mine), t(5), order, widths, widths, dim, rank, name)
        yield "row_parallel_linear_scatter", args
        cut = [mine if n == dim else size for n, size in enumerate(shape)]
        args = (t(*cut, 6), t(mine, 6), t(mine), order, widths, widths, dim - 1 - len(shape), rank)
        yield "gathered_column_parallel_linear", (*args, name)
    weight, x = torch.randn(5, mine), torch.randn(3, mine)
    yield "tune_linear", (x, weight, None, None, "row", widths, 8, name)
    choices = torch.empty(0, dtype=torch.uint8)
    yield "import_linear_choices", (x, weight, None, None, "row", widths, choices, name)
    for act in ("silu", "gelu", "gelu_tanh"):
        yield "glu", (t(3, 8), act)
    yield "glu_backward", (torch.randn(2, 3, 4), torch.randn(2, 3, 8), "silu")
    yield "all_reduce", (t(7), order, "sum", name)
    yield "copy_to_ranks", (t(7), order, name)
    yield "scatter_to_ranks", (t(3, sum(widths)), order, widths, -1, rank, name)
    yield "broadcast", (t(7), order, 0, rank, name)
    yield "all_gather", (t(3, mine), order, widths, -1, "replicated", rank, name)
    yield "all_gather", (t(3, 4), order, [4] * size, 1, "partial", rank, name)
    yield "reduce_scatter", (t(3, 4 * size), order, [4] * size, 1, "sum", rank, name)
    yield "reduce_scatter", (t(sum(widths), 2), order, widths, 0, "avg", rank, name)
    ids = torch.tensor([[0, 1, sum(widths) - 1], [2, 3, 1]])
    yield "vocab_parallel_embedding", (ids, t(mine, 3), order, widths, 2, rank, name)
    labels = torch.tensor([[0, -100, sum(widths) - 1], [2, 5, 1]])
    for sizes, vocab_size, smoothing in ((widths, None, 0.1), ([], sum(widths) - 1, 0.0)):
        target = labels.clamp(max=sum(widths) - 2)
        args = (t(2, 3, mine), target, order, sizes, vocab_size, -100, smoothing, rank, name)
        yield "vocab_parallel_cross_entropy", args
    place = torch.tensor([sum(widths[:rank]), sum(widths)])
    statistics = torch.rand(2, 2, 3) + 3
    args = (torch.rand(2, 3), torch.rand(2, 3, mine), labels, statistics, place, -100, 0.1)
    yield "vocab_parallel_cross_entropy_backward", args
    yield "all_reduce_", (torch.randn(7), order, "sum", name)
    yield "broadcast_", (torch.randn(7), order, 0, name)
    whole = torch.randn(sum(widths), 2)
    yield "gather_into", (torch.randn(mine, 2), order, whole, widths, size - 1, name)
    yield "scatter_into", (whole, order, torch.randn(mine, 2), widths, 0, name)


def passes_opcheck(group: Group) -> set[str]:
    torch.library.opcheck(  # its values are undefined: nothing to compare but shape, dtype, strides
        torch.ops.tp_native.empty_shared.default,
        (group.order, [3, 4], torch.bfloat16, group.name),
        test_utils=("test_autograd_registration", "test_faketensor"),
    )
    seen = {"empty_shared"}
    for op, args in samples(group):
        torch.library.opcheck(getattr(torch.ops.tp_native, op).default, args)
        seen.add(op)
    return seen


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_every_op_passes_opcheck_in_lockstep(world_size: int) -> None:
    schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("tp_native::")]
    every = {name.removeprefix("tp_native::") for name in schemas} - {
        "join_c10d",
        "join_hosts",
    }  # take no tensor
    for seen in run_ranks(passes_opcheck, world_size):
        assert seen == every


class Paired(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        cut = tp.Partition.from_sizes(widths)
        self.up = ColumnParallelLinear(8, cut.size, partition=cut)
        self.down = RowParallelLinear(cut.size, 8, partition=cut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


def compiles(group: Group, layers: list[list[int]]) -> list[tuple[str, str, int]]:
    torch._dynamo.reset()
    model = nn.Sequential(*[Paired(widths) for widths in layers])
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = model(x)
    expected.square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None] + [x.grad.clone()]  # type: ignore[union-attr]
    model.zero_grad()
    x.grad = None
    compiled = torch.compile(model, fullgraph=True)
    before = group.stats()["collectives"]
    y = compiled(x)
    y.square().sum().backward()
    ran = group.stats()["collectives"] - before
    torch.testing.assert_close(
        y, expected, rtol=1e-5, atol=1e-6
    )  # inductor fuses relu differently at most
    got = [p.grad for p in model.parameters()] + [x.grad]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    return [(op, dtype, signature) for _, op, dtype, signature in group.op_log()[-ran:]]


def test_two_paired_linears_compile_to_one_full_graph() -> None:
    layers = [
        [8, 512],
        [512, 8],
        [8, 512],
    ]  # the widths that made compilers reorder: DESIGN.md section 7
    logs = run_ranks(compiles, 2, layers)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2 * len(
        layers
    )  # one forward, one backward a pair: none lost, none doubled


def allocates_in_a_graph(group: Group, backend: str) -> None:
    torch._dynamo.reset()

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = group.empty_shared(*x.shape, dtype=torch.float64)
        second = group.empty_shared(*x.shape, dtype=torch.float64)
        third = group.empty_shared(x.shape[0], 2)
        return group.all_reduce_(first.copy_(x)), second, third.zero_()

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for rows in (3, 5, 6):  # the second shape makes the size symbolic
        first, second, third = compiled(torch.ones(rows, 4))
        second.fill_(-1.0)  # no compiler made one tensor of the two
        assert torch.equal(first, torch.full((rows, 4), group.size, dtype=torch.float64))
        assert torch.equal(third, torch.zeros(rows, 2))
        assert second.dtype == torch.float64


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_empty_shared_compiles(world_size: int, backend: str) -> None:
    run_ranks(allocates_in_a_graph, world_size, backend)


def meta_shapes_need_no_group() -> dict[str, list[int]]:
    ops = torch.ops.tp_native
    order = torch.empty(1, dtype=torch.int64, device="meta")

    def t(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    return {
        "row": list(
            ops.row_parallel_linear(t(2, 3, 4), t(5, 4), None, order, [4, 6], "tp:nowhere").shape
        ),
        "column": list(
            ops.column_parallel_linear(t(2, 4), t(7, 4), None, order, [7, 6], "tp:nowhere").shape
        ),
        "gather": list(
            ops.all_gather(t(2, 4), order, [4, 6], -1, "replicated", 0, "tp:nowhere").shape
        ),
    }


def test_meta_kernels_look_no_group_up() -> None:
    assert meta_shapes_need_no_group() == {"row": [2, 3, 5], "column": [2, 7], "gather": [2, 10]}


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(tp.TensorParallelError, match='no group "tp:nowhere" in this process'):
        torch.ops.tp_native.all_reduce(
            torch.ones(1), torch.zeros(1, dtype=torch.int64), "sum", "tp:nowhere"
        )
