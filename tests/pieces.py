"""What a rule promises, put to the test: code run on slices gives slices of what it gives whole.

`commutes` follows a piece of code on labelled tensors, cuts axes that nothing mixed, and compares
each rank's outputs with slices of the whole ones: through `Translator`, and as the replay would
accept the code itself. It knows no rule.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tp_native.errors import TensorParallelError
from tp_native.partition import Partition, ShardLayout
from tp_native.structure import replay, rules, trace
from tp_native.structure.axes import Axis, Dim, opaque, parts, size_of
from tp_native.structure.solve import Cut, Pair, Solution
from tp_native.structure.translate import Translator

Body = Callable[..., Any]
Labelled = tuple[Tensor, "list[Dim] | None"]


@dataclass
class Agreement:
    """How often code on slices gave slices of the whole, and how often it was refused."""

    axes: int = 0  # that could be cut
    mixed: list[str] = field(default_factory=list)
    translated: int = 0
    refused: list[str] = field(default_factory=list)
    native: int = 0


def drawn(rng: random.Random, *dims: Dim | int, dtype: torch.dtype = torch.float64) -> Labelled:
    """Random numbers with these axes; an int is a dimension of no weight."""
    labels = [opaque(dim) if isinstance(dim, int) else dim for dim in dims]
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    values = torch.randn([size_of(d) for d in labels], dtype=torch.float64, generator=generator)
    return values.to(dtype), labels


def plain(rng: random.Random, *sizes: int) -> Labelled:
    """Random numbers that come from no weight."""
    return drawn(rng, *sizes)[0], None


def partition(rng: random.Random, size: int, ranks: int) -> Partition:
    """Any cut, a rank with nothing now and then."""
    if size >= ranks and rng.random() < 0.85:
        bounds = sorted(rng.sample(range(1, size), ranks - 1))
    else:
        bounds = sorted(rng.randrange(size + 1) for _ in range(ranks - 1))
    return Partition(tuple(b - a for a, b in zip([0, *bounds], [*bounds, size], strict=True)))


def sliced(tensor: Tensor, dims: Sequence[Dim] | None, solution: Solution, rank: int) -> Tensor:
    """A rank's part of the whole, taken element by element."""
    for at, dim in enumerate(dims or ()):
        held = [i for a, b in solution.ranges(dim, rank) for i in range(a, b)]
        tensor = tensor.index_select(at, torch.tensor(held, dtype=torch.long))
    return tensor


def cut(axes: Sequence[Axis], ranks: int, rng: random.Random) -> Solution:
    """A solution that cuts these axes."""
    cuts = [
        Cut(Pair(axis, [], [], 0), ShardLayout.of(partition(rng, axis.size, ranks)))
        for axis in axes
    ]
    return Solution(ranks, cuts)


def commutes(
    body: Body, *inputs: Labelled, rng: random.Random, trials: int = 3, together: bool = True
) -> Agreement:
    """Follow ``body``, cut and compare; ``together``: several axes at a time as well.

    Raises: AssertionError where a rank's output is not the whole's slice.
    """
    found = Agreement()
    tracer = trace.Tracer(nn.Module(), {})
    given = [tensor.clone() for tensor, _ in inputs]
    for tensor, (_, dims) in zip(given, inputs, strict=True):
        tracer._remember(tensor, dims, False)
    labels = [None if dims is None else [list(dim) for dim in dims] for _, dims in inputs]
    with tracer:
        result = body(*given)
    whole = list(rules.tensors(result))
    dims_out = [tracer.value_of(tensor).dims for tensor in whole]
    leaves = [part for dims in labels for dim in dims or () for axis in dim for part in parts(axis)]
    unique = list({id(leaf): leaf for leaf in leaves}.values())
    found.mixed = [leaf.mixed for leaf in unique if leaf.mixed is not None and not leaf.is_opaque]
    free = [
        leaf
        for leaf in unique
        if leaf.mixed is None and not leaf.is_open and not leaf.is_opaque and leaf.size > 1
    ]
    found.axes = len(free)
    for _ in range(trials if free else 0):
        count = rng.randrange(1, len(free) + 1) if together else 1
        solution = cut(rng.sample(free, count), rng.choice([2, 3]), rng)
        for rank in range(solution.ranks):
            locals_ = [
                sliced(t, d, solution, rank).clone()
                for (t, _), d in zip(inputs, labels, strict=True)
            ]
            wanted = [sliced(t, d, solution, rank) for t, d in zip(whole, dims_out, strict=True)]
            _translated(body, locals_, labels, wanted, solution, rank, found)
            _native(body, locals_, labels, wanted, solution, rank, tracer, found)
    return found


def _translated(
    body: Body,
    locals_: list[Tensor],
    labels: list[Any],
    wanted: list[Tensor],
    solution: Solution,
    rank: int,
    found: Agreement,
) -> None:
    translator = Translator(solution, rank, "here", lambda tensor: tensor)
    given = [t.clone() for t in locals_]
    for tensor, dims in zip(given, labels, strict=True):
        if dims is not None:
            translator.label(tensor, dims)
    try:
        with translator:
            outs = list(rules.tensors(body(*given)))
    except (TensorParallelError, RuntimeError, IndexError, TypeError, ValueError) as error:
        found.refused.append(f"{type(error).__name__}: {error}"[:200])
        return
    _compare(outs, wanted, f"translated on rank {rank} of {_said(solution)}")
    found.translated += 1


def _native(
    body: Body,
    locals_: list[Tensor],
    labels: list[Any],
    wanted: list[Tensor],
    solution: Solution,
    rank: int,
    tracer: trace.Tracer,
    found: Agreement,
) -> None:
    runner = replay._Replay(nn.Module(), {}, tracer.trace, solution, rank, ())
    given = [t.clone() for t in locals_]
    refusals = (replay.Departure, RuntimeError, IndexError, TypeError, ValueError)
    with contextlib.suppress(*refusals):
        with runner:
            outs = list(rules.tensors(body(*given)))
        if runner.event is None:
            _compare(outs, wanted, f"as it is, on rank {rank} of {_said(solution)}")
            found.native += 1


def _said(solution: Solution) -> str:
    return ", ".join(f"{cut.pair.axis} {cut.outer.local_sizes.sizes}" for cut in solution.cuts)


def _compare(outs: list[Tensor], wanted: list[Tensor], where: str) -> None:
    assert len(outs) == len(wanted), where
    for at, (out, expected) in enumerate(zip(outs, wanted, strict=True)):
        said = f"output {at} {where}"
        near = 1e-2 if out.dtype in (torch.float16, torch.bfloat16) else 1e-5  # some steps are fp32
        torch.testing.assert_close(
            out, expected, rtol=near, atol=near, equal_nan=True, msg=lambda m, s=said: f"{s}: {m}"
        )
