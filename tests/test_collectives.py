"""Collectives against a sum in rank order computed in this process."""

from __future__ import annotations

import threading

import pytest
import torch

import tp_native as tp
from harness import run_ranks
from oracle import rank_data, reduce_in_rank_order
from tp_native.group import Group

WORLDS = [1, 2, 3, 4]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# around the switches: one-shot 2 KiB, two-phase 32 KiB, chunk 256 KiB, and odd tails
COUNTS = [0, 1, 7, 511, 513, 8191, 65537, 262147, 400003]


def reduces_like_the_oracle(group: Group, dtype: torch.dtype) -> None:
    for count in COUNTS:
        parts = [rank_data((count,), dtype, r) for r in range(group.size)]
        for op in ("sum", "avg", "max", "min") if count == 513 else ("sum",):
            expected = reduce_in_rank_order(parts, op)
            mine = parts[group.rank].clone()
            assert group.all_reduce_(mine, op) is mine
            assert torch.equal(mine, expected), (count, op, "private")
            shared = group.empty_shared(count, dtype=dtype).copy_(parts[group.rank])
            group.all_reduce_(shared, op)
            assert torch.equal(shared, expected), (count, op, "shared")
            mixed = (
                group.empty_shared(count, dtype=dtype)
                if group.rank % 2
                else torch.empty(count, dtype=dtype)
            )
            group.all_reduce_(mixed.copy_(parts[group.rank]), op)
            assert torch.equal(mixed, expected), (count, op, "mixed")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("world_size", WORLDS)
def test_all_reduce_equals_the_sum_in_rank_order(world_size: int, dtype: torch.dtype) -> None:
    run_ranks(reduces_like_the_oracle, world_size, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_thread_ranks_reduce_alike(dtype: torch.dtype) -> None:
    tp.simulate(reduces_like_the_oracle, 3, dtype)


def reduces_any_layout(group: Group) -> None:
    def whole(rank: int) -> torch.Tensor:
        return rank_data((6, 50, 40), torch.float32, rank)

    expected = reduce_in_rank_order([whole(r) for r in range(group.size)])
    views = {
        "transposed": lambda t: t.transpose(0, 2),
        "strided": lambda t: t[:, ::3, 1::2],
        "offset by one element": lambda t: t.flatten()[1:],
        "expanded": lambda t: t[:1, :, :].clone().expand(1, 50, 40),
    }
    for name, view in views.items():
        mine = whole(group.rank)
        group.all_reduce_(view(mine))
        if name != "expanded":  # the clone is what was reduced there
            assert torch.equal(view(mine), view(expected)), name
    untouched = whole(group.rank)
    group.all_reduce_(untouched[:, ::3, 1::2])
    mask = torch.ones_like(untouched, dtype=torch.bool)
    mask[:, ::3, 1::2] = False
    assert torch.equal(untouched[mask], whole(group.rank)[mask])


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_reduce_takes_any_layout_and_writes_nothing_else(world_size: int) -> None:
    run_ranks(reduces_any_layout, world_size)


def gathers_and_scatters(group: Group, dtype: torch.dtype) -> None:
    size, rank = group.size, group.rank
    for rows, width, inner in [(3, 5, 2), (1, 1, 1), (0, 4, 3), (17, 0, 2), (300, 150, 7)]:
        sizes = [max(0, width - r) if rows != 300 else width + 13 * r for r in range(size)]
        partition = tp.Partition.from_sizes(sizes)
        parts = [
            (100 * rank_data((rows, n, inner), torch.float64, r)).to(dtype)
            for r, n in enumerate(sizes)
        ]
        gathered = group.all_gather(parts[rank], 1, partition)
        assert torch.equal(gathered, torch.cat(parts, 1))
        front = group.all_gather(parts[rank].transpose(0, 1), 0, partition)
        assert torch.equal(front, torch.cat(parts, 1).transpose(0, 1))
        if dtype.is_floating_point:
            wholes = [rank_data((rows, sum(sizes), inner), dtype, 50 + r) for r in range(size)]
            expected = reduce_in_rank_order(wholes).narrow(1, partition.offset(rank), sizes[rank])
            assert torch.equal(group.reduce_scatter(wholes[rank], 1, partition), expected)
        for src in range(size):
            data = (
                parts[rank].clone()
                if rank == src
                else torch.empty(rows, sizes[src], inner, dtype=dtype)
            )
            assert torch.equal(group.broadcast_(data, src), parts[src])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str
)
@pytest.mark.parametrize("world_size", WORLDS)
def test_gather_scatter_broadcast_move_uneven_shares(world_size: int, dtype: torch.dtype) -> None:
    run_ranks(gathers_and_scatters, world_size, dtype)


def replicated_bits(group: Group) -> list[bytes]:
    found = []
    for dtype in FLOATS:
        t = rank_data((70001,), dtype, group.rank) * 1e3
        found.append(group.all_reduce_(t).view(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_replicated_results_are_bitwise_equal_on_all_ranks(world_size: int) -> None:
    bits = run_ranks(replicated_bits, world_size)
    assert all(b == bits[0] for b in bits)


def holds_outputs(group: Group, holder: int, steps: int) -> None:
    held: list[tuple[int, torch.Tensor]] = []
    for step in range(steps):
        count = 600 + 37 * (step % 50)  # above the size that is staged
        parts = [float(r + 1) * (step + 1) for r in range(group.size)]
        t = group.empty_shared(count).fill_(parts[group.rank])
        group.all_reduce_(t)
        assert torch.equal(t, torch.full((count,), sum(parts))), step
        if group.rank == holder:
            held.append((step, t))
        out = tp.all_reduce_sum(torch.full((count,), parts[group.rank]))
        assert torch.equal(out, t)
        if group.rank == holder:
            held.append((step, out))
    for step, t in held:
        assert torch.equal(
            t, torch.full_like(t, sum((r + 1) * (step + 1.0) for r in range(group.size)))
        ), step


@pytest.mark.parametrize("world_size", [2, 3])
def test_outputs_held_on_one_rank_only_stay_intact_for_1000_steps(world_size: int) -> None:
    run_ranks(holds_outputs, world_size, 0, 1000)


def outlives_close() -> None:
    def keep(group: Group) -> torch.Tensor:
        return group.all_reduce_(group.empty_shared(5000).fill_(2.0))

    kept = tp.simulate(keep, 2)
    for t in kept:
        t += 1  # an ordinary private tensor by now
        assert torch.equal(t, torch.full((5000,), 5.0))


def test_shared_tensors_outlive_their_group() -> None:
    outlives_close()


def gradients_follow_the_rules(group: Group) -> None:
    size, rank = group.size, group.rank

    def leaf(shape: tuple[int, ...], r: int = rank) -> torch.Tensor:
        return rank_data(shape, torch.float64, r).requires_grad_()

    def grad(y: torch.Tensor, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, x, cotangent)[0]

    same = rank_data((4, 6), torch.float64, 77)  # a replicated cotangent
    partial = [rank_data((4, 6), torch.float64, 90 + r) for r in range(size)]
    total = reduce_in_rank_order(partial)

    x = leaf((4, 6))
    assert torch.equal(grad(tp.all_reduce_sum(x), x, same), same)
    x = leaf((4, 6), 0)
    y = tp.copy_to_ranks(x)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    assert torch.equal(grad(y, x, partial[rank]), total)
    x = leaf((4, 6))
    src = size - 1
    y = tp.broadcast_tensor(x, src)
    assert torch.equal(y, rank_data((4, 6), torch.float64, src))
    expected = total if rank == src else torch.zeros_like(total)
    assert torch.equal(grad(y, x, partial[rank]), expected)

    sizes = [3 + r for r in range(size)]
    cut = tp.Partition.from_sizes(sizes)
    whole = [rank_data((2, cut.size), torch.float64, 40 + r) for r in range(size)]
    x = leaf((2, sizes[rank]))
    y = tp.all_gather_tensor(x, partition=cut)
    assert torch.equal(grad(y, x, whole[0]), whole[0][:, cut.slice(rank)])
    y = tp.all_gather_tensor(x, grad="partial", partition=cut)
    assert torch.equal(grad(y, x, whole[rank]), reduce_in_rank_order(whole)[:, cut.slice(rank)])
    x = leaf((2, cut.size))
    y = tp.reduce_scatter_sum(x, 1, partition=cut)
    scattered = [rank_data((2, n), torch.float64, 60 + r) for r, n in enumerate(sizes)]
    assert torch.equal(grad(y, x, scattered[rank]), torch.cat(scattered, 1))
    x = leaf((2, cut.size), 0)  # replicated
    y = tp.scatter_to_ranks(x, 1, partition=cut)
    assert torch.equal(y, x[:, cut.slice(rank)])
    assert torch.equal(grad(y, x, scattered[rank]), torch.cat(scattered, 1))
    if size > 1:
        with pytest.raises(ValueError, match="adds up to"):
            tp.scatter_to_ranks(x, 0, partition=tp.Partition.from_sizes([4] * size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_of_the_collectives(world_size: int) -> None:
    run_ranks(gradients_follow_the_rules, world_size)


def refuses_gradients(group: Group) -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="use all_reduce_sum"):
        group.all_reduce_(x)
    with pytest.raises(RuntimeError, match="use broadcast_tensor"):
        group.broadcast_(x)
    for op in ("max", "avg"):
        with pytest.raises(NotImplementedError, match="no gradient"):
            torch.ops.tp_native.all_reduce(x, group.order, op, group.name)
    with torch.no_grad():
        group.all_reduce_(x)
    assert torch.equal(x, torch.full((3,), 2.0))


def test_in_place_and_extreme_reductions_refuse_gradients() -> None:
    run_ranks(refuses_gradients, 2)


def bad_arguments(group: Group) -> None:
    t = torch.ones(4)
    with pytest.raises(ValueError, match='reduce op "mean": expected "sum"'):
        group.all_reduce_(t, "mean")
    with pytest.raises(ValueError, match="src 5 is not a rank"):
        group.broadcast_(t, 5)
    with pytest.raises(ValueError, match=r"dimension 0 is 4 on rank \d, expected [12]"):
        group.all_gather(t, 0, tp.Partition.from_sizes([1, 2]))
    with pytest.raises(ValueError, match="has 3 entries, expected one for each of the 2 ranks"):
        group.all_gather(t, 0, tp.Partition.from_sizes([4, 4, 4]))
    with pytest.raises(ValueError, match="adds up to 3"):
        group.reduce_scatter(t, 0, tp.Partition.from_sizes([1, 2]))
    with pytest.raises(IndexError, match="dim 3 is out of range"):
        group.reduce_scatter(torch.ones(2, 2), 3, tp.Partition.from_sizes([1, 1]))
    with pytest.raises(TypeError, match="dtype ComplexFloat cannot be sent"):
        group.all_gather(torch.ones(2, dtype=torch.complex64))
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(TypeError, match='values have no "avg"'):
            group.all_reduce_(torch.ones(2, dtype=dtype), "avg")
    with pytest.raises(ValueError, match="gather: dst 2 is not a rank"):
        group.gather(t, 2)
    with pytest.raises(
        ValueError, match=r"scatter: rank \d (needs|must not give) the whole tensor"
    ):
        group.scatter(t, None if group.rank == 0 else t, 0)
    with pytest.raises(IndexError, match="no dimensions"):
        group.all_gather(torch.tensor(1.0), 0)
    ops, other = torch.ops.tp_native, 1 - group.rank  # what a graph traced on another rank calls
    table, ids = torch.ones(2, 3), torch.tensor([0])
    for call in (
        lambda: ops.broadcast(t, group.order, 0, other, group.name),
        lambda: ops.all_gather(t, group.order, [4, 4], 0, "partial", other, group.name),
        lambda: ops.reduce_scatter(t, group.order, [2, 2], 0, "sum", other, group.name),
        lambda: ops.vocab_parallel_embedding(
            ids, table, group.order, [2, 2], -1, other, group.name
        ),
    ):
        with pytest.raises(ValueError, match=rf"called as rank {other} of group tp:0"):
            call()
    assert torch.equal(
        group.all_reduce_(t), torch.full((4,), 2.0)
    )  # nothing was sent, nothing is lost


def test_bad_arguments_are_refused_before_anything_is_sent() -> None:
    run_ranks(bad_arguments, 2)


def reduces_in_a_plain_thread(group: Group) -> float:
    found: list[float] = []

    def work() -> None:
        found.append(float(tp.all_reduce_sum(torch.ones(3)).sum()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_a_plain_thread_uses_the_process_group() -> None:
    assert run_ranks(reduces_in_a_plain_thread, 2) == [6.0, 6.0]


def counts(group: Group) -> tuple[int, int]:
    before = group.stats()
    group.all_reduce_(torch.ones(1000))
    after = group.stats()
    return after["collectives"] - before["collectives"], after["bytes"] - before["bytes"]


def test_stats_count_collectives_and_bytes() -> None:
    assert run_ranks(counts, 1) == [(0, 0)]
    assert run_ranks(counts, 2) == [(1, 4000)] * 2


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def reduces_integers(group: Group, dtype: torch.dtype) -> None:
    for count in (0, 1, 20, 1000, 70001):  # in the announcing line, one-shot, in two phases
        parts = [
            torch.randint(0, 2 if dtype is torch.bool else 100, (count,)).to(dtype).roll(r)
            for r in range(group.size)
        ]
        stacked = torch.stack(parts)
        expected = {
            "sum": stacked.any(0) if dtype is torch.bool else stacked.sum(0).to(dtype),
            "max": stacked.any(0) if dtype is torch.bool else stacked.amax(0),
            "min": stacked.all(0) if dtype is torch.bool else stacked.amin(0),
        }
        for op, whole in expected.items():
            assert torch.equal(group.all_reduce_(parts[group.rank].clone(), op), whole), (count, op)
            shared = group.empty_shared(count, dtype=dtype).copy_(parts[group.rank])
            assert torch.equal(group.all_reduce_(shared, op), whole), (count, op)
            cut = tp.Partition.even(count, group.size)
            mine = group.reduce_scatter(parts[group.rank], op=op)
            assert torch.equal(mine, whole[cut.slice(group.rank)]), (count, op)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("world_size", WORLDS)
def test_integers_and_bool_are_reduced_as_torch_does(world_size: int, dtype: torch.dtype) -> None:
    run_ranks(reduces_integers, world_size, dtype)


def moves_to_and_from_one_rank(group: Group, dtype: torch.dtype) -> None:
    for rows, width in [(3, 4), (1, 0), (0, 5), (700, 301)]:
        sizes = [width + 7 * r for r in range(group.size)]
        cut = tp.Partition.from_sizes(sizes)
        parts = [
            (100 * rank_data((rows, n), torch.float64, r)).to(dtype) for r, n in enumerate(sizes)
        ]
        whole = torch.cat(parts, 1)
        for root in range(group.size):
            found = group.gather(parts[group.rank], root, 1, cut)
            assert (found is None) == (group.rank != root)
            assert found is None or torch.equal(found, whole)
            out = torch.empty(rows, sizes[group.rank], dtype=dtype)
            given = whole if group.rank == root else None
            assert group.scatter(out, given, root, 1, cut) is out
            assert torch.equal(out, parts[group.rank])
            strided = torch.zeros(sizes[group.rank], rows, 2, dtype=dtype)[:, :, 1]
            group.scatter(strided, None if given is None else given.t(), root, 0, cut)
            assert torch.equal(strided, parts[group.rank].t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("world_size", WORLDS)
def test_gather_and_scatter_cut_unevenly(world_size: int, dtype: torch.dtype) -> None:
    run_ranks(moves_to_and_from_one_rank, world_size, dtype)


def test_sixteen_thread_ranks_reduce_alike() -> None:
    tp.simulate(reduces_like_the_oracle, 16, torch.float32)
