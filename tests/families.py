"""Models of many families, drawn from a seed, and what it takes to say that a parallelized one is
the dense one: outputs, gradients, greedy tokens, and how much of it is sharded.

A maker gets a `Draw` and returns a `Case`. The makers are in ``families_bar.py`` (those that must
work), ``families_hf.py`` (more of transformers) and ``families_strangers.py`` (written by hand).
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tp_native as tp
from oracle import relative_error
from tp_native.group import Group
from tp_native.nn import mark_of

LIMIT = 1e-5  # fp32 sums in another order, two layers deep
QUIET = LIMIT / 3  # what rounding may make of the dense model itself, where the bar is measured
SHARE = 0.95  # of the elements of all weight matrices
NEW_TOKENS = 16
# A gradient below this part of the model's largest is zero but for rounding (the bias of keys
# under a softmax): it is measured against the largest.
_ZERO = 1e-6


class Draw:
    """Random sizes: heads that do not divide, an odd feed-forward width, a prime vocabulary."""

    def __init__(self, name: str, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(f"{name}/{seed}")
        self.heads = self.rng.choice([4, 5, 6, 7])
        self.kv_heads = self.rng.choice([n for n in range(1, 8) if self.heads % n == 0])
        self.head_dim = self.rng.choice([4, 8])
        self.hidden = self.heads * self.head_dim
        self.ffn = self.rng.randrange(2 * self.hidden, 3 * self.hidden) | 1
        self.vocab = self.rng.choice([83, 89, 97, 101])
        self.attention = ("eager", "sdpa")[seed % 2]

    def coin(self) -> bool:
        return self.rng.random() < 0.5

    def one_of(self, *values: Any) -> Any:
        return self.rng.choice(values)

    def ids(self, batch: int = 2, length: int = 7, vocab: int | None = None) -> Tensor:
        """Token ids from 3 on: below are pad, bos and eos."""
        return torch.randint(3, vocab or self.vocab, (batch, length), generator=self._generator(1))

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator(2))

    def fill(self, model: nn.Module) -> None:
        """New values for every parameter: matrices that keep a signal's size, and norms and biases
        that are not what they are initialised to.
        """
        generator = self._generator(3)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() < 2:
                    parameter.add_(0.3 * noise)
                else:
                    parameter.copy_(noise * 0.8 / parameter[0].numel() ** 0.5)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(10 * self.seed + stream)


def main_output(returned: Any) -> Tensor:
    """The logits of what a forward pass returned, or else its first floating tensor."""
    if isinstance(returned, Tensor):
        return returned
    if dataclasses.is_dataclass(returned) and not isinstance(returned, Mapping):
        returned = [getattr(returned, f.name) for f in dataclasses.fields(returned)]
    if isinstance(returned, Mapping):
        if isinstance(returned.get("logits"), Tensor):
            return returned["logits"]
        returned = list(returned.values())
    return next(v for v in returned if isinstance(v, Tensor) and v.is_floating_point())


def all_outputs(returned: Any) -> Tensor:
    """Every floating tensor of a tuple or dict of tensors, side by side."""
    values = returned.values() if isinstance(returned, Mapping) else returned
    return torch.cat([v.flatten() for v in values if isinstance(v, Tensor)])


@dataclass
class Case:
    """A dense model and what is asked of it. ``greedy(model)`` continues a prompt, if it can."""

    model: nn.Module
    inputs: dict[str, Any]
    output: Callable[[Any], Tensor] = main_output
    greedy: Callable[[Any], Tensor] | None = None
    has_gradients: bool = True

    def run(self, model: nn.Module) -> Tensor:
        """The output tensor; inputs are new ones, so that ranks share no graph."""
        inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        with torch.set_grad_enabled(self.has_gradients):
            return self.output(model(**inputs))


def loss(output: Tensor) -> Tensor:
    """A fixed random projection of the output."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(output.shape, generator=generator)
    return (output * weights).sum() / output.numel() ** 0.5


def greedy_loop(
    prompt: Tensor, step: Callable[[Any, Tensor], Any], room: int | None = None
) -> Callable[[Any], Tensor]:
    """Greedy decoding without a cache: ``step(model, ids)`` is called with all ids so far, or with
    the last ``room``.
    """

    def run(model: Any) -> Tensor:
        ids = prompt.clone()
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                seen = ids if room is None else ids[:, -room:]
                logits = main_output(step(model, seen))[:, -1]
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids

    return run


@dataclass(frozen=True)
class Family:
    """``kind``: "bar", "transformers" or "stranger"; ``may_refuse``: a PlanError is an answer."""

    name: str
    kind: str
    make: Callable[[Draw], Case]
    may_refuse: bool = False


FAMILIES: dict[str, Family] = {}


def family(name: str, kind: str, *, may_refuse: bool = False) -> Any:
    """Decorator that enters a maker in the registry."""

    def enter(make: Callable[[Draw], Case]) -> Callable[[Draw], Case]:
        assert name not in FAMILIES, name
        FAMILIES[name] = Family(name, kind, make, may_refuse)
        return make

    return enter


def load() -> dict[str, Family]:
    """The whole registry."""
    for module in ("families_bar", "families_hf", "families_strangers"):
        importlib.import_module(module)
    return FAMILIES


def build(name: str, seed: int) -> Case:
    """The case of a family, the same on every call."""
    draw = Draw(name, seed)
    torch.manual_seed(seed)
    case = load()[name].make(draw)
    draw.fill(case.model)
    return case


@dataclass
class Reference:
    """What the dense model does."""

    output: Tensor
    gradients: dict[str, Tensor | None]
    largest: float
    tokens: Tensor | None
    state: dict[str, Tensor]


def reference(case: Case) -> Reference:
    """Run the dense model; its ``grad`` is left as it was."""
    model = copy.deepcopy(case.model)
    output = case.run(model)
    if case.has_gradients:
        loss(output).backward()
    gradients = {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }
    sizes = [float(g.abs().max()) for g in gradients.values() if g is not None and g.numel()]
    tokens = case.greedy(model) if case.greedy is not None else None
    state = {n: v.clone() for n, v in case.model.state_dict().items() if isinstance(v, Tensor)}
    return Reference(output.detach(), gradients, max(sizes, default=0.0), tokens, state)


def rounding(case: Case, dense: Reference) -> tuple[float, float, str]:
    """How far fp32 takes the dense model's output and gradients from fp64, and whose gradient it
    takes furthest: some are small differences of large terms. RuntimeError where a model is fp32
    only.
    """
    inputs = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in case.inputs.items()
    }
    model = copy.deepcopy(case.model).double()
    exact = reference(Case(model, inputs, case.output, None, case.has_gradients))
    errors = {}
    for name, gradient in dense.gradients.items():
        expected = exact.gradients[name]
        if gradient is not None and expected is not None:
            holder = nn.Parameter(gradient)
            holder.grad = gradient
            errors[name] = gradient_error(holder, expected.float(), dense.largest) or 0.0
    gap, worst = max(((e, n) for n, e in errors.items()), default=(0.0, ""))
    return error_of(dense.output.double(), exact.output), gap, worst


def quiet(name: str, seed: int) -> tuple[Case, Reference]:
    """The first case from ``seed`` on, whose own rounding is well below the bar; every
    eighth is of the same kind.
    """
    for attempt in range(seed, seed + 80, 8):
        case = build(name, attempt)
        dense = reference(case)
        try:
            output, gap, _ = rounding(case, dense)
        except RuntimeError:
            return case, dense
        if max(output, gap) <= QUIET:
            return case, dense
    raise AssertionError(f"{name}: rounding reaches {QUIET:.1g} at every seed")


@dataclass
class Finding:
    """How far one rank's parallelized model is from the dense one."""

    output_error: float
    gradient_errors: dict[str, float] = field(default_factory=dict)
    tokens_equal: bool | None = None
    state_differs: list[str] = field(default_factory=list)
    collectives: int = 0
    held: dict[str, int] = field(default_factory=dict)  # elements of each weight matrix here

    @property
    def worst_gradient(self) -> tuple[float, str]:
        return max(((e, n) for n, e in self.gradient_errors.items()), default=(0.0, ""))


def rank_finding(group: Group, case: Case, dense: Reference, is_verified: bool = False) -> Finding:
    """Parallelize a copy of the model and compare everything; ``is_verified`` lets `parallelize`
    compare for itself first. Collective.
    """
    whole = copy.deepcopy(case.model)
    matrices = weight_matrices(whole)
    model = tp.parallelize(whole, group, verify=(case.inputs,) if is_verified else None)
    before = group.stats()["collectives"]
    output = case.run(model)
    found = Finding(error_of(output.detach(), dense.output))
    found.collectives = group.stats()["collectives"] - before
    if case.has_gradients:
        loss(output).backward()
        for name, parameter in model.named_parameters():
            gap = gradient_error(parameter, dense.gradients[name], dense.largest)
            if gap is not None:
                found.gradient_errors[name] = gap
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found.held = {name: parameters[name].numel() for name in matrices}
    if case.greedy is not None and dense.tokens is not None:
        found.tokens_equal = bool(torch.equal(case.greedy(model), dense.tokens))
    state = tp.full_state_dict(model)
    found.state_differs = sorted(state.keys() ^ dense.state.keys())
    for name in state.keys() & dense.state.keys():
        if not torch.equal(state[name], dense.state[name]):
            found.state_differs.append(name)
    return found


def error_of(actual: Tensor, expected: Tensor) -> float:
    """``max|actual - expected| / max|expected|``; infinite where it has no meaning."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    return relative_error(actual, expected) if expected.numel() else 0.0


def gradient_error(
    parameter: nn.Parameter, expected: Tensor | None, largest: float
) -> float | None:
    """The error of a gradient put together whole, and of this rank's part of it; None where the
    dense model has no gradient either. Collective for a shard.
    """
    if expected is None:
        useless = parameter.grad is None or not bool(parameter.grad.any())
        return None if useless else float("inf")
    if parameter.grad is None:
        return float("inf")
    mark = mark_of(parameter)
    pairs = [(parameter.grad, expected)]
    if mark is not None:
        pairs = [(mark.full(parameter.grad), expected), (parameter.grad, mark.local(expected))]
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    if scale <= _ZERO * largest:
        scale = largest
    worst = 0.0
    for ours, theirs in pairs:
        if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
            return float("inf")
        if ours.numel() and scale > 0:
            worst = max(worst, float((ours.double() - theirs.double()).abs().max()) / scale)
    return worst


def weight_matrices(model: nn.Module) -> dict[str, int]:
    """Elements of each weight matrix by its first name: Linear, Embedding, transformers' Conv1D,
    and the projections of nn.MultiheadAttention.
    """
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        kinds = (nn.Linear, nn.Embedding, nn.MultiheadAttention)
        if not isinstance(module, kinds) and type(module).__name__ != "Conv1D":
            continue
        for local, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{local}" if name else local] = parameter.numel()
    return found


def sharded_share(matrices: Mapping[str, int], findings: list[Finding]) -> tuple[float, list[str]]:
    """The share of elements in matrices that some rank holds less than whole, and the names of the
    others, largest first.
    """
    whole = [n for n, size in matrices.items() if all(f.held[n] == size for f in findings)]
    total = sum(matrices.values())
    kept = sum(matrices[name] for name in whole)
    return (1 - kept / total if total else 1.0), sorted(whole, key=lambda n: -matrices[n])


def problems(case: Case, findings: list[Finding]) -> list[str]:
    """What is below the bar, one line each; empty if all is well."""
    told = []
    for rank, found in enumerate(findings):
        gap, name = found.worst_gradient
        if not found.output_error <= LIMIT:
            told.append(f"rank {rank}: output departs by {found.output_error:.2g}")
        if not gap <= LIMIT:
            bad = sum(not error <= LIMIT for error in found.gradient_errors.values())
            told.append(f"rank {rank}: gradient of {name} departs by {gap:.2g} ({bad} do)")
        if found.tokens_equal is False:
            told.append(f"rank {rank}: generates other tokens")
        if found.state_differs:
            told.append(f"rank {rank}: full_state_dict differs in {found.state_differs[:4]}")
    if len(findings) > 1:
        share, whole = sharded_share(weight_matrices(case.model), findings)
        if share < SHARE:
            told.append(f"{share:.1%} of the weight matrices are sharded; whole: {whole[:6]}")
    return told


def report(name: str, case: Case, findings: list[Finding]) -> str:
    """What was found, in a few lines; the last ones say what is below the bar."""
    share, whole = sharded_share(weight_matrices(case.model), findings)
    gap, worst = max(found.worst_gradient for found in findings)
    lines = [
        f"{name} ({type(case.model).__name__}) on {len(findings)} ranks:",
        f"  output departs by {max(found.output_error for found in findings):.2g}",
        f"  gradients depart by {gap:.2g} at most{f', {worst}' if worst else ''}",
        f"  {share:.1%} of the weight matrices are sharded, {len(whole)} are whole",
        f"  {findings[0].collectives} collectives in a forward pass",
    ]
    return "\n".join([*lines, *(f"  BELOW THE BAR: {p}" for p in problems(case, findings))])
