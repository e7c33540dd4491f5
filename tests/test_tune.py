"""Which rank's choice of algorithms the ranks use; the timing itself needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import tp_native as tp
from harness import run_ranks
from tp_native import tune
from tp_native.agreement import all_gather_bytes
from tp_native.group import Group
from tp_native.nn import ColumnParallelLinear, RowParallelLinear
from tp_native.tune import LinearProblem, owners_of

PROBLEM = LinearProblem(
    kind="row",
    tokens=64,
    out_features=8,
    in_features=4,
    sizes=(4, 4),
    dtype="torch.bfloat16",
    has_bias=False,
    alignments=(256,),
    allows_tf32=False,
    gpu="one",
)


def test_the_lowest_rank_that_has_a_problem_owns_it() -> None:
    wide, narrow = replace(PROBLEM, in_features=5), PROBLEM
    assert owners_of([[wide], [narrow, wide], [narrow, narrow]]) == {narrow: (1, 2), wide: (0, 1)}
    assert owners_of([[], [], []]) == {}


def test_all_ranks_see_the_problems_in_one_order() -> None:
    problems = [replace(PROBLEM, tokens=n, has_bias=b) for n in (3, 1, 2) for b in (True, False)]
    expected = list(owners_of([problems, problems]))
    assert list(owners_of([problems[::-1], problems])) == expected
    assert list(owners_of([problems[2:], problems[:4]])) == expected


@pytest.mark.parametrize(
    "change", [{"gpu": "other"}, {"allows_tf32": True}, {"sizes": (3, 5)}, {"alignments": (16,)}]
)
def test_what_decides_the_algorithm_keeps_problems_apart(change: dict[str, Any]) -> None:
    assert len(owners_of([[PROBLEM], [replace(PROBLEM, **change)]])) == 2


def test_arguments_that_make_no_sense_are_refused() -> None:
    for tokens, candidates in (([], 8), ([0], 8), ([4, -1], 8), ([4], 0)):
        with pytest.raises(ValueError, match="tune_linear: tokens"):
            tp.tune_linear(nn.Linear(2, 2), tokens, candidates=candidates)


def does_nothing_on_a_cpu(group: Group) -> None:
    before = group.stats()["collectives"]
    result = tp.tune_linear(RowParallelLinear(8, 4), [3])
    assert result.tuned == [] and "torch's own products" in result.why_nothing
    assert str(result).startswith("nothing was tuned: the group works on cpu")
    assert group.stats()["collectives"] == before


@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_is_tuned_on_a_cpu(world_size: int) -> None:
    run_ranks(does_nothing_on_a_cpu, world_size)


def bytes_of_all_ranks_come(group: Group) -> None:
    for lengths in ([0, 0, 0], [3, 0, 1000], [1, 2, 3]):
        each = [bytes([r]) * lengths[r] for r in range(group.size)]
        assert all_gather_bytes(group, each[group.rank]) == each


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bytes_of_unlike_lengths_are_gathered(world_size: int) -> None:
    run_ranks(bytes_of_all_ranks_come, world_size)


class Recorded:
    """Stands in for the ops: a tuning is this rank's name, and what was imported is kept."""

    def __init__(self, rank: int, fails: bool = False) -> None:
        self.rank, self.fails = rank, fails
        self.tuned: list[tuple[str, int, int]] = []
        self.imported: list[tuple[str, int, int, int]] = []

    def tune_linear(
        self, x: Tensor, weight: Tensor, bias: Any, grad: Any, kind: str, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        if self.fails:
            raise tp.TensorParallelError("cublasLtMatmul failed")
        self.tuned.append((kind, x.shape[0], weight.shape[1]))
        assert (grad is not None) == (kind == "column_backward")
        us = torch.tensor([[10.0, 8.0], [5.0, 5.0]], dtype=torch.float64)
        return torch.tensor([self.rank, 7], dtype=torch.uint8), us

    def import_linear_choices(
        self, x: Tensor, weight: Tensor, bias: Any, grad: Any, kind: str, sizes: Any, choices: Any,
        group: str,
    ) -> None:  # fmt: skip
        assert choices[1] == 7
        self.imported.append((kind, x.shape[0], weight.shape[1], int(choices[0])))


def agrees(group: Group, cut: list[int]) -> tuple[Any, Any, Any]:
    ops = Recorded(group.rank)
    partition = tp.Partition.from_sizes(cut)
    model = nn.Sequential(
        ColumnParallelLinear(6, partition.size, activation="relu", partition=partition),
        RowParallelLinear(partition.size, 6, partition=partition),
        RowParallelLinear(partition.size, 6, bias=False, partition=partition),
        nn.Linear(6, 6),
    )
    state = torch.get_rng_state()
    aligned = mock.patch.object(tune, "_alignment", lambda t: 256)  # as torch does on a GPU
    with mock.patch.object(tune, "_ops", ops), aligned:
        result = tune._tune(model, [2, 9], group, 8, True)
    assert torch.equal(state, torch.get_rng_state())
    return result, ops.tuned, ops.imported


def test_ranks_with_equal_shards_use_the_lowest_ranks_choice() -> None:
    results = run_ranks(agrees, 3, [4, 4, 4])
    assert results[0][0] == results[1][0] == results[2][0]
    for t in results[0][0].tuned:
        is_biased_sum = t.problem.kind == "row" and t.problem.has_bias  # in rank 0's product
        expected = (0,) if is_biased_sum else (0, 1, 2)
        assert t.ranks == expected and t.rank == expected[0]
        assert (t.heuristic_us, t.best_us) == (15.0, 13.0)
    assert results[0][2] == []
    for rank in (1, 2):
        assert {owner for *_, owner in results[rank][2]} == {0}


def test_uneven_shards_tune_for_themselves_and_call_alike() -> None:
    results = run_ranks(agrees, 3, [5, 4, 4])
    assert results[0][0] == results[1][0] == results[2][0]
    assert results[0][2] == [] and results[1][2] == []  # nobody below has rank 1's shapes
    assert {owner for *_, owner in results[2][2]} == {1}
    assert results[2][1] == []
    assert {width for *_, width in results[0][1]} == {5, 6}


def a_failure_is_shared(group: Group) -> None:
    ops = Recorded(group.rank, fails=group.rank == 1)
    layer = RowParallelLinear(9, 6, partition=tp.Partition.from_sizes([4, 5]))
    with (
        mock.patch.object(tune, "_ops", ops),
        pytest.raises(tp.TensorParallelError, match="cublasLtMatmul failed"),
    ):
        tune._tune(layer, [2], group, 8, False)
    group.barrier()  # and it goes on


def test_a_rank_that_cannot_tune_is_told_on_all() -> None:
    run_ranks(a_failure_is_shared, 2)
