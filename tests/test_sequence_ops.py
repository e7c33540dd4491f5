"""The linear ops between which tokens are cut: a product and its reduce-scatter, an all-gather and
its product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tp_native as tp
from harness import World, run_ranks
from oracle import rank_data, reduce_in_rank_order, relative_error
from tp_native import _C, _ops
from tp_native.group import Group

# widths and tokens of each rank; the shape that the tokens are put in, with -1 for them
WIDTHS = {1: [5], 2: [5, 2], 3: [3, 0, 4], 4: [1, 2, 3, 4]}
TOKENS = {1: [[4], [0]], 2: [[3, 4], [0, 5]], 3: [[2, 0, 3], [0, 0, 0]], 4: [[1, 2, 0, 4], [2] * 4]}
SHAPES: list[list[int]] = [[-1], [-1, 2], [3, -1], [1, -1], [2, -1, 3], [0, -1]]
OUT = 6


@contextmanager
def cut_of(group: Group) -> Iterator[tuple[Tensor, int, str]]:
    """Order, rank and name of a group that has a communicator, in a world of one too."""
    if group.size > 1:
        yield group.order, group.rank, group.name
        return
    name = "tp:one"
    communicator = _C.make_local(name, 1, 5.0)[0]
    _C.register(name, communicator)
    try:
        yield group.order, 0, name
    finally:
        communicator.close()
        _C.unregister(name)


def whole(shape: list[int], tokens: int, width: int, seed: int) -> Tensor:
    return rank_data((*(tokens if n < 0 else n for n in shape), width), torch.float64, 0, seed)


def part(t: Tensor, sizes: list[int], dim: int, rank: int) -> Tensor:
    return t.split(sizes, dim)[rank].clone()


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None and expected is not None and actual.shape == expected.shape
    assert expected.numel() == 0 or relative_error(actual, expected) <= 1e-12


def strided(t: Tensor) -> Tensor:
    """The same values, laid out the other way round."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def each_case(size: int) -> Iterator[tuple[list[int], list[int], int, bool, Callable[..., Tensor]]]:
    for tokens in TOKENS[size]:
        for number, shape in enumerate(SHAPES):
            for has_bias in (False, True):
                layout = strided if number % 2 == has_bias else torch.clone
                yield tokens, shape, shape.index(-1), has_bias, layout


def scatters(group: Group) -> None:
    size, widths = group.size, WIDTHS[group.size]
    with cut_of(group) as (order, rank, name):
        for tokens, shape, dim, has_bias, layout in each_case(size):
            x = whole(shape, sum(tokens), sum(widths), 1).requires_grad_()
            w = rank_data((OUT, sum(widths)), torch.float64, 0, 2).requires_grad_()
            b = rank_data((OUT,), torch.float64, 0, 3).requires_grad_() if has_bias else None
            expected = F.linear(x, w, b)
            dy = rank_data(tuple(expected.shape), torch.float64, 0, 4)
            expected.backward(dy)

            my_x = layout(part(x.detach(), widths, -1, rank)).requires_grad_()
            my_w = layout(part(w.detach(), widths, 1, rank)).requires_grad_()
            my_b = b.detach().clone().requires_grad_() if b is not None else None
            before = group.stats()["collectives"]
            y = _ops.row_parallel_linear_scatter(
                my_x, my_w, my_b, order, widths, tokens, dim - len(shape) - 1, rank, name
            )
            assert y.is_contiguous()
            close(y, part(expected.detach(), tokens, dim, rank))
            y.backward(layout(part(dy, tokens, dim, rank)))
            assert size == 1 or group.stats()["collectives"] == before + 2
            close(my_x.grad, part(x.grad, widths, -1, rank))  # type: ignore[arg-type]
            close(my_w.grad, part(w.grad, widths, 1, rank))  # type: ignore[arg-type]
            if my_b is not None:
                close(my_b.grad, b.grad)  # type: ignore[union-attr]


def gathers(group: Group) -> None:
    size, widths = group.size, WIDTHS[group.size]
    with cut_of(group) as (order, rank, name):
        for tokens, shape, dim, has_bias, layout in each_case(size):
            x = whole(shape, sum(tokens), OUT, 1).requires_grad_()
            w = rank_data((sum(widths), OUT), torch.float64, 0, 2).requires_grad_()
            b = rank_data((sum(widths),), torch.float64, 0, 3).requires_grad_()
            expected = F.linear(x, w, b if has_bias else None)
            dy = rank_data(tuple(expected.shape), torch.float64, 0, 4)
            expected.backward(dy)

            my_x = layout(part(x.detach(), tokens, dim, rank)).requires_grad_()
            my_w = layout(part(w.detach(), widths, 0, rank)).requires_grad_()
            my_b = part(b.detach(), widths, 0, rank).requires_grad_() if has_bias else None
            before = group.stats()["collectives"]
            y, gathered = _ops.gathered_column_parallel_linear(
                my_x, my_w, my_b, order, widths, tokens, dim, rank, name
            )
            assert torch.equal(gathered, x) and not gathered.requires_grad
            close(y, part(expected.detach(), widths, -1, rank))
            y.backward(layout(part(dy, widths, -1, rank)))
            assert size == 1 or group.stats()["collectives"] == before + 2
            close(my_x.grad, part(x.grad, tokens, dim, rank))  # type: ignore[arg-type]
            close(my_w.grad, part(w.grad, widths, 0, rank))  # type: ignore[arg-type]
            if my_b is not None:
                close(my_b.grad, part(b.grad, widths, 0, rank))  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_scattered_sums_and_their_gradients_are_the_dense_layers(world_size: int) -> None:
    run_ranks(scatters, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gathered_products_and_their_gradients_are_the_dense_layers(world_size: int) -> None:
    run_ranks(gathers, world_size)


def sums_in_rank_order(group: Group) -> None:
    size, rank = group.size, group.rank
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens, width in (([3 + r for r in range(size)], 7), ([64] * size, 96)):
            xs = [rank_data((sum(tokens), width), dtype, r, 1) for r in range(size)]
            ws = [rank_data((130, width), dtype, r, 2) for r in range(size)]
            products = [x.mm(w.t()) for x, w in zip(xs, ws, strict=True)]
            cut = ([width] * size, tokens, 0, rank, group.name)
            y = _ops.row_parallel_linear_scatter(xs[rank], ws[rank], None, group.order, *cut)
            partition = tp.Partition.from_sizes(tokens)
            assert torch.equal(y, group.reduce_scatter(products[rank], partition=partition))
            assert torch.equal(y, reduce_in_rank_order(products).split(tokens)[rank])
            bias = rank_data((130,), dtype, 0, 3)
            again = _ops.row_parallel_linear_scatter(xs[rank], ws[rank], bias, group.order, *cut)
            assert torch.equal(again, y + bias)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_sum_is_reduce_scatters_bit_by_bit(world_size: int) -> None:
    run_ranks(sums_in_rank_order, world_size)


def needs_only_some_gradients(group: Group) -> None:
    size, rank = group.size, group.rank
    tokens, widths = [2] * size, [3] * size
    cut = (group.order, widths, tokens, 0, rank, group.name)
    for wanted in range(1, 8):
        x, w, b = (
            rank_data((2 * size, 3), torch.float64, 0),
            torch.ones(4, 3).double(),
            torch.ones(4),
        )
        operands = [x, w, b.double()]
        for i, t in enumerate(operands):
            t.requires_grad_(bool(wanted >> i & 1))
        before = group.stats()["collectives"]
        _ops.row_parallel_linear_scatter(*operands, *cut).sum().backward()  # type: ignore[no-untyped-call]
        assert group.stats()["collectives"] == before + 2
        assert [t.grad is not None for t in operands] == [t.requires_grad for t in operands]
        x = rank_data((2, 4), torch.float64, rank)
        operands = [x, torch.ones(3, 4).double(), torch.ones(3).double()]
        for i, t in enumerate(operands):
            t.requires_grad_(bool(wanted >> i & 1))
        before = group.stats()["collectives"]
        _ops.gathered_column_parallel_linear(*operands, *cut)[0].sum().backward()  # type: ignore[no-untyped-call]
        assert group.stats()["collectives"] == before + (2 if x.requires_grad else 1)
        assert [t.grad is not None for t in operands] == [t.requires_grad for t in operands]


def test_a_frozen_operand_costs_no_collective_of_its_own() -> None:
    run_ranks(needs_only_some_gradients, 2)


def autocasts(group: Group) -> None:
    size, rank = group.size, group.rank
    tokens, widths = [2] * size, [3] * size
    cut = (group.order, widths, tokens, 0, rank, group.name)
    w, b = torch.ones(4, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = _ops.row_parallel_linear_scatter(torch.ones(2 * size, 3), w, b, *cut)
        z, gathered = _ops.gathered_column_parallel_linear(y, w.t(), None, *cut)
    assert y.dtype == z.dtype == gathered.dtype == torch.bfloat16
    assert torch.equal(y, torch.full((2, 4), 3.0 * size + 1).bfloat16())
    z.sum().backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None and w.grad.dtype == torch.float32


def test_autocast_casts_the_operands() -> None:
    run_ranks(autocasts, 2)


def refuses(group: Group) -> None:
    size, rank = group.size, group.rank
    tokens, widths = [2] * size, [3] * size
    x, w = torch.ones(2 * size, 3), torch.ones(4, 3)

    def scatter(x: Tensor, dim: int, tokens: list[int], rank: int = rank) -> Any:
        cut = (group.order, widths, tokens, dim, rank, group.name)
        return _ops.row_parallel_linear_scatter(x, w, None, *cut)

    for dim in (1, -1, 5, -3):
        with pytest.raises(IndexError, match=f"dim {dim} does not count tokens of an input of"):
            scatter(x, dim, tokens)
    with pytest.raises(ValueError, match=r"0 is 4 on rank \d, expected 5, the sum"):
        scatter(x, 0, [2, 3])
    with pytest.raises(ValueError, match="one for each of the 2 ranks"):
        scatter(x, 0, [2, 1, 1])
    with pytest.raises(ValueError, match="called as rank"):
        scatter(x, 0, tokens, 1 - rank)
    with pytest.raises(ValueError, match="expected 2, its share of the tokens"):
        cut = (group.order, widths, tokens, 0, rank, group.name)
        _ops.gathered_column_parallel_linear(torch.ones(3, 4), torch.ones(3, 4), None, *cut)
    with pytest.raises(tp.CollectiveMismatchError, match="row_parallel_linear_scatter"):
        scatter(torch.ones(4, 3), 0, [2, 2] if rank == 0 else [1, 3])


def test_what_does_not_fit_is_refused_and_unlike_cuts_are_told() -> None:
    world = World(2)
    try:
        world.run(refuses)
    finally:
        world.kill()


def has_no_second_derivative(group: Group) -> None:
    cut = (group.order, [3] * group.size, [2] * group.size, 0, group.rank, group.name)
    x = torch.ones(2 * group.size, 3, requires_grad=True)
    y = _ops.row_parallel_linear_scatter(x, torch.ones(4, 3), None, *cut)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    x = torch.ones(2, 4, requires_grad=True)
    y, _ = _ops.gathered_column_parallel_linear(x, torch.ones(3, 4), None, *cut)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_second_derivative_is_refused() -> None:
    run_ranks(has_no_second_derivative, 2)


def compiles_alike(group: Group, widths: list[int]) -> list[tuple[str, str, int]]:
    torch._dynamo.reset()
    size, rank = group.size, group.rank
    tokens = [3 + r for r in range(size)]
    up = torch.ones(widths[rank], 4, requires_grad=True)
    down = torch.ones(4, widths[rank], requires_grad=True)

    def block(x: Tensor) -> Tensor:
        cut = (group.order, widths, tokens, 0, rank, group.name)
        y, _ = _ops.gathered_column_parallel_linear(x, up, None, *cut)
        return _ops.row_parallel_linear_scatter(torch.relu(y), down, None, *cut)

    x = rank_data((tokens[rank], 4), torch.float32, rank).requires_grad_()
    expected = block(x)
    expected.square().sum().backward()  # type: ignore[no-untyped-call]
    wanted = [x.grad, up.grad, down.grad]
    x.grad = up.grad = down.grad = None
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    before = group.stats()["collectives"]
    y = compiled(x)
    y.square().sum().backward()
    ran = group.stats()["collectives"] - before
    torch.testing.assert_close([y, x.grad, up.grad, down.grad], [expected, *wanted])
    return [line[1:] for line in group.op_log()[-ran:]]


def test_a_block_compiles_to_one_graph_with_one_collective_each_way_and_layer() -> None:
    logs = run_ranks(compiles_alike, 2, [8, 512])
    assert logs[0] == logs[1] and len(logs[0]) == 4
