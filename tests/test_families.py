"""Any model, cut from its structure, is the dense model: outputs, every gradient, 16 greedy tokens,
and no large weight left whole. `families.py` has the models and the measure, ``python
tests/sweep.py`` the same as a table.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import families
import tp_native as tp
from families import Case, Finding
from tp_native.config import TensorParallelConfig
from tp_native.errors import PlanError

REGISTRY = families.load()
BAR = [name for name, family in REGISTRY.items() if family.kind == "bar"]
OTHERS = [name for name, family in REGISTRY.items() if family.kind != "bar"]
SOAK_SEEDS = 6  # both attentions, training and evaluation


@pytest.fixture(autouse=True)
def one_thread_a_rank_and_no_long_wait(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ranks that share two cores don't also share them among OpenMP's threads; one that waits for a
    rank that went another way says so before pytest's timeout does.
    """
    monkeypatch.setattr(TensorParallelConfig, "timeout_s", 40.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def is_refused_by_name(case: Case, error: PlanError) -> bool:
    """Whether the error names the model or one of its modules."""
    names = [type(case.model).__name__, *(name for name, _ in case.model.named_modules() if name)]
    return any(name in str(error) for name in names)


def check(name: str, world_size: int, seed: int) -> None:
    case, dense = families.quiet(name, seed)
    try:
        findings = tp.simulate(families.rank_finding, world_size, case, dense)
    except PlanError as error:
        if REGISTRY[name].may_refuse and is_refused_by_name(case, error):
            return
        raise
    told = families.report(name, case, findings)
    print(told)
    assert not families.problems(case, findings), told


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", BAR)
def test_the_families_that_must_work(name: str, world_size: int) -> None:
    check(name, world_size, seed=3 * (world_size - 2))  # eager and not training, sdpa and training


@pytest.mark.parametrize(
    ("name", "world_size", "seed"),
    [(name, 2 + i % 3, i % 4) for i, name in enumerate(OTHERS)],
)
def test_other_families(name: str, world_size: int, seed: int) -> None:
    check(name, world_size, seed)


@pytest.mark.soak
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", REGISTRY)
def test_every_family_at_every_world_from_many_seeds(name: str, world_size: int) -> None:
    for seed in range(SOAK_SEEDS):
        check(name, world_size, seed)


def test_the_measure_sees_a_wrong_gradient_and_a_whole_matrix() -> None:
    case = families.build("llama", 0)
    (found,) = tp.simulate(families.rank_finding, 1, case, families.reference(case))
    assert not families.problems(case, [found])
    assert found.tokens_equal
    assert found.gradient_errors.keys() == dict(case.model.named_parameters()).keys()
    wrong = Finding(2e-5, {"a.weight": 1e-4, "b.weight": float("nan")}, False, ["a"], 1, found.held)
    told = "\n".join(families.problems(case, [wrong, wrong]))
    for part in ("output departs by 2e-05", "2 do", "other tokens", "0.0% of the weight matrices"):
        assert part in told
