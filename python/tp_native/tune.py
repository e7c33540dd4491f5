"""Matrix products timed on the GPU that runs them, with choices that ranks share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor, nn

from . import _ops
from .agreement import agreed, all_gather_bytes
from .group import Group, GroupLike, current_group
from .nn import ColumnParallelLinear, RowParallelLinear, matrix_of

_FUSED = ("relu", "gelu_tanh")  # activations that run in a product's epilogue


@dataclass(frozen=True, order=True)
class LinearProblem:
    """What decides how a layer's products are computed: equal on two ranks, equally computed."""

    kind: str
    tokens: int
    out_features: int  # of this rank's weight
    in_features: int
    sizes: tuple[int, ...]  # the layer's partition: it decides how rows are cut
    dtype: str
    has_bias: bool  # in this rank's product: a row-parallel layer's is in rank 0's
    alignments: tuple[int, ...]  # of the weight and of that bias, in bytes
    allows_tf32: bool
    gpu: str
    is_transposed: bool = False  # the weight lies (in_features, out_features)


@dataclass(frozen=True)
class TunedLinear:
    """One problem: whose choice its ranks use, and what its products took there, in sum."""

    problem: LinearProblem
    rank: int
    ranks: tuple[int, ...]
    heuristic_us: float
    best_us: float


@dataclass(frozen=True)
class LinearTuning:
    """What :func:`tune_linear` did, the same on all ranks; ``why_nothing`` where it did nothing."""

    tuned: list[TunedLinear] = field(default_factory=list)
    why_nothing: str = ""

    def __str__(self) -> str:
        if self.why_nothing:
            return f"nothing was tuned: {self.why_nothing}"
        return "\n".join(
            f"{t.problem.kind} {t.problem.tokens} x {t.problem.out_features} x "
            f"{t.problem.in_features} {t.problem.dtype}: "
            f"{t.heuristic_us:.1f} -> {t.best_us:.1f} us on rank {t.rank}, used by {len(t.ranks)}"
            for t in self.tuned
        )


def tune_linear(
    module: nn.Module,
    tokens: Sequence[int],
    group: GroupLike | None = None,
    *,
    candidates: int = 8,
    backward: bool = False,
) -> LinearTuning:
    """Time the products of ``module``'s row- and column-parallel layers on this GPU, and use the
    fastest from now on.

    ``tokens``: rows that the layers will get, each tuned apart. ``candidates``: how many algorithms
    are timed for each product. ``backward``: also those of the column-parallel layers' gradients.
    Ranks with the same problem all use the lowest such rank's choice, so that what they compute
    alike is bitwise equal. Layers of other groups are passed over. Where torch's own products run,
    on a CPU and in a world of one, nothing is tuned and the result says so.

    Collective: every rank of ``group`` calls it with the same arguments but for its shards.
    Raises: ValueError for no positive ``tokens`` or ``candidates``.
    """
    if not tokens or min(tokens) < 1 or candidates < 1:
        raise ValueError(
            f"tune_linear: tokens {list(tokens)}, candidates {candidates}: expected at least one "
            "number of tokens, and all of them positive"
        )
    g = current_group(group)
    if g.device.type != "cuda":
        return LinearTuning(why_nothing=f"the group works on {g.device}, with torch's own products")
    if g.size == 1:
        return LinearTuning(why_nothing="a world of one runs torch's own products")
    return _tune(module, sorted(set(tokens)), g, candidates, backward)


def owners_of(
    problems: Sequence[Sequence[LinearProblem]],
) -> dict[LinearProblem, tuple[int, ...]]:
    """The ranks that have each problem, ascending; in an order that is the same on all ranks.

    ``problems[r]`` are rank ``r``'s.
    """
    ranks: dict[LinearProblem, list[int]] = {}
    for rank, own in enumerate(problems):
        for problem in dict.fromkeys(own):
            ranks.setdefault(problem, []).append(rank)
    return {problem: tuple(ranks[problem]) for problem in sorted(ranks)}


@dataclass
class _Operands:
    """A problem's layer, with data as large as it will get."""

    layer: ColumnParallelLinear | RowParallelLinear
    kind: str
    tokens: int

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, list[int]]:
        """What the ops take; data drawn anew, because all problems' would not fit."""
        weight = matrix_of(self.layer).detach()
        bias = self.layer.bias.detach() if self.layer.bias is not None else None
        generator = torch.Generator(weight.device).manual_seed(0)  # torch's own is left alone

        def random(width: int) -> Tensor:
            x = torch.empty(self.tokens, width, dtype=weight.dtype, device=weight.device)
            return x.normal_(generator=generator)

        grad = random(weight.shape[0]) if self.kind == "column_backward" else None
        return random(weight.shape[1]), weight, bias, grad, self.kind, self._sizes()

    def _sizes(self) -> list[int]:
        return list(self.layer.partition.sizes)

    def problem(self, rank: int) -> LinearProblem:
        """What the ranks compare."""
        weight, bias = matrix_of(self.layer), self.layer.bias
        uses_bias = bias is not None and (self.kind != "row" or rank == 0)
        operands = [weight, bias] if bias is not None and uses_bias else [weight]
        return LinearProblem(
            kind=self.kind,
            tokens=self.tokens,
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            sizes=tuple(self._sizes()),
            dtype=str(weight.dtype),
            has_bias=uses_bias,
            alignments=tuple(_alignment(t) for t in operands),
            allows_tf32=torch.backends.cuda.matmul.allow_tf32,
            gpu=_gpu_name(weight.device),
            is_transposed=weight is not self.layer.weight,
        )


def _alignment(t: Tensor) -> int:
    return min(t.data_ptr() & -t.data_ptr(), 256)  # cuBLASLt looks no further


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _problems(
    module: nn.Module, tokens: Sequence[int], group: Group, backward: bool
) -> dict[LinearProblem, _Operands]:
    found: dict[LinearProblem, _Operands] = {}
    for layer in module.modules():
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            continue
        if layer.group is not group:
            continue
        kinds = []
        if isinstance(layer, RowParallelLinear):
            kinds.append("row")
        elif layer.activation in _FUSED:
            kinds.append(f"column_{layer.activation}")
        if isinstance(layer, ColumnParallelLinear) and backward:
            kinds.append("column_backward")
        for kind in kinds:
            for n in tokens:
                operands = _Operands(layer, kind, n)
                found.setdefault(operands.problem(group.rank), operands)
    return found


def _tune(
    module: nn.Module, tokens: Sequence[int], group: Group, candidates: int, backward: bool
) -> LinearTuning:
    with agreed(group):
        mine = _problems(module, tokens, group, backward)
        listed = json.dumps([astuple(problem) for problem in mine]).encode()
    everyones = [
        [_problem_of(values) for values in json.loads(each)]
        for each in all_gather_bytes(group, listed)
    ]
    owners = owners_of(everyones)
    found: list[tuple[str, float, float]] = []
    with agreed(group):
        for problem, ranks in owners.items():
            if ranks[0] != group.rank:
                continue
            arguments = mine[problem].arguments()
            choices, us = _ops.tune_linear(*arguments, candidates, group.name)
            times = us.sum(0).tolist()
            found.append((bytes(choices.tolist()).hex(), times[0], times[1]))
    made = [iter(json.loads(each)) for each in all_gather_bytes(group, json.dumps(found).encode())]
    tuned = []
    with agreed(group):
        for problem, ranks in owners.items():
            choices_hex, heuristic_us, best_us = next(made[ranks[0]])
            tuned.append(TunedLinear(problem, ranks[0], ranks, heuristic_us, best_us))
            if group.rank in ranks[1:]:
                choices = torch.tensor(list(bytes.fromhex(choices_hex)), dtype=torch.uint8)
                _ops.import_linear_choices(*mine[problem].arguments(), choices, group.name)
    why = "" if tuned else "no layer runs a product of ours on these tokens"
    return LinearTuning(tuned, why)


def _problem_of(values: list[object]) -> LinearProblem:
    return LinearProblem(*(tuple(v) if isinstance(v, list) else v for v in values))  # type: ignore[arg-type]
