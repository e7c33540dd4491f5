"""The parallel run, compared with what was recorded of the dense one, in step on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..agreement import agree, agreed
from ..errors import CollectiveMismatchError, PlanError, TensorParallelError
from ..group import Group
from ..nn.linear import matrix_of
from ..nn.sharded import ShardedModule, take
from ..partition import ShardLayout
from ..plan import ShardEntry, ShardPlan
from ..plan.shards import ROW
from .recording import Call, Recording, Tensors, forward, hooked, kept


def compare(
    model: nn.Module,
    dense: Recording,
    inputs: Sequence[Any],
    plan: ShardPlan | None,
    group: Group,
    rtol: float | None = None,
) -> None:
    """Run the parallel ``model`` and compare with ``dense``; PlanError on all ranks alike."""
    comparison = _Comparison(model, dense, plan, group, rtol)
    with agreed(group):
        comparison.check_shapes()
    with kept(model):
        comparison.run(inputs)
    agree(group, comparison.error)


class _Stopped(BaseException):
    """Ends a forward pass; no ``except Exception`` of the model's catches it."""


class _Comparison:
    """The parallel run. Ranks meet before and after every module, so that a rank that departs or
    raises stops all of them at that module, none of them inside a collective.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: Recording,
        plan: ShardPlan | None,
        group: Group,
        rtol: float | None,
    ) -> None:
        self.model, self.dense, self.group, self.rtol = model, dense, group, rtol
        self.plan = plan
        self.entries: Mapping[str, ShardEntry] = plan.entries if plan is not None else {}
        self.error: Exception | None = None
        self.steps = 0
        self.running: list[str] = []
        self.counts: dict[str, int] = {}
        self.given: dict[str, Tensors] = {}
        self.open: list[str] = []  # layers that gave their part since the last whole output
        self.compared = 0

    def check_shapes(self) -> None:
        """PlanError unless every parameter has the shape that the plan gives this rank."""
        if self.plan is None:
            return
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name not in self.plan.shapes:
                continue
            expected = self.plan.local_shape(name, self.group.rank)
            if tuple(parameter.shape) != expected:
                raise PlanError(
                    f"{name} has shape {tuple(parameter.shape)} on rank {self.group.rank}, its "
                    f"plan says {expected} of the whole {self.plan.shapes[name]}"
                )

    def run(self, inputs: Sequence[Any]) -> None:
        """One forward pass up to its end or the first departure, which is left in ``error``."""
        try:
            with hooked(self.model, self.before, self.after, self.running.append):
                forward(self.model, inputs)
            self.meet()
            if not self.compared:
                self.error = PlanError(
                    f"verify found nothing to compare in {self.label('')}: no module gives a "
                    "floating tensor in both models"
                )
        except _Stopped:
            return
        except CollectiveMismatchError as error:  # known to every rank already
            raise PlanError(self.told_raised(error, "all ranks")) from error
        except TensorParallelError as error:
            if type(error) not in (TensorParallelError, PlanError):
                raise  # a peer is lost or late: no plan's fault
            self.stop(error)
        except Exception as error:
            self.stop(error)

    def stop(self, raised: Exception) -> None:
        """End the run of the other ranks too, because this one's raised."""
        self.error = PlanError(self.told_raised(raised))
        self.error.__cause__ = raised
        try:
            self.meet()
        except _Stopped:
            return
        except CollectiveMismatchError:  # they were in a collective of this very module
            raise self.error from raised

    def meet(self, error: PlanError | None = None) -> None:
        """Go on if every rank is here without an error; else stop. Collective."""
        self.error = self.error or error
        self.steps += 1
        places = [[int(self.error is not None), self.steps]]
        if self.group.size > 1:
            mine = torch.tensor(places, dtype=torch.int64, device=self.group.device)
            places = self.group.all_gather(mine).tolist()
        if any(failed for failed, _ in places):
            raise _Stopped
        if len({step for _, step in places}) > 1:
            here = self.label(self.running[-1] if self.running else "")
            self.error = PlanError(
                f"{here}: the ranks run other modules than each other from here on; the model's "
                "code depends on sizes or values that differ between ranks"
            )
            raise _Stopped

    def before(self, name: str, module: nn.Module, inputs: Tensors) -> None:
        """Compare what a cut layer gets."""
        entry, call = self.entries.get(name), self.call_of(name)
        error = None
        if entry is not None and call is not None:
            self.given[name] = inputs
            for key, expected in call.inputs.items():
                if key in inputs and error is None:
                    part = expected
                    if entry.style == ROW:
                        part = self.part(expected, entry)
                    error = self.departure(name, "input", key, inputs[key], part, expected, call)
        self.meet(error)

    def after(self, name: str, module: nn.Module, outputs: Tensors) -> None:
        """Compare what a module gave."""
        entry, call = self.entries.get(name), self.call_of(name)
        self.counts[name] = self.counts.get(name, 0) + 1
        error = None
        if call is not None:
            compared = self.compared
            error = self.output_error(name, entry, outputs, call)
            if compared == self.compared and error is None:
                error = self.parameter_error(name, module, call)
        self.meet(error)
        while self.running and self.running.pop() != name:
            pass
        if entry is not None and entry.is_local:
            self.open.append(name)
        elif entry is not None:
            self.open.clear()

    def output_error(
        self, name: str, entry: ShardEntry | None, outputs: Tensors, call: Call
    ) -> PlanError | None:
        if not name and outputs.keys() != call.outputs.keys():
            return PlanError(
                f"{self.label(name)}: the model returns tensors {list(outputs)} on rank "
                f"{self.group.rank}, the dense one {list(call.outputs)}"
            )
        main = next((key for key, value in call.outputs.items() if value.dim()), None)
        for key, expected in call.outputs.items():
            actual = outputs.get(key)
            if actual is None:
                continue
            part = expected
            if entry is not None and entry.is_local:
                part = self.part(expected, entry)
            elif entry is None and self.is_part_of(name, key != main, actual, expected, call):
                continue
            error = self.departure(name, "output", key, actual, part, expected, call)
            if error is not None:
                return error
        return None

    def parameter_error(self, name: str, module: nn.Module, call: Call) -> PlanError | None:
        """Of a whole module in a cut region, whose output can't be compared: its parameters."""
        dense = self.dense.modules.get(name)
        for local, parameter in module._parameters.items():
            theirs = dense._parameters.get(local) if dense is not None else None
            if parameter is None or theirs is None or parameter.shape != theirs.shape:
                continue
            error = relative_gap(parameter, theirs)
            if error > (self.rtol if self.rtol is not None else call.limit):
                return PlanError(
                    f"{self.label(name)}: its {local} departs from the dense model's by "
                    f"{error:.3g} of its largest value on rank {self.group.rank}; {self.cut(name)}"
                )
        return None

    def is_part_of(
        self, name: str, may_be_part: bool, actual: Tensor, expected: Tensor, call: Call
    ) -> bool:
        """Whether a tensor of an uncut module lies in a cut region, where what reads it or the
        next whole tells; of the model's own, whether it is local by nature.
        """
        if actual.shape == expected.shape:
            return False
        return bool(name) or (may_be_part and _is_part(actual, expected, call.limit))

    def call_of(self, name: str) -> Call | None:
        calls, at = self.dense.calls.get(name, []), self.counts.get(name, 0)
        return calls[at] if at < len(calls) else None

    def part(self, whole: Tensor, entry: ShardEntry) -> Tensor:
        return take(whole, -1, ShardLayout.of(entry.partition).ranges[self.group.rank])

    # -- words

    def departure(
        self,
        name: str,
        what: str,
        key: str,
        actual: Tensor,
        expected: Tensor,
        whole: Tensor,
        call: Call,
    ) -> PlanError | None:
        """The error of one tensor, if there is one."""
        which = what if not key or what == "input" else f"{what} {key}"
        shapes = f"whole {tuple(whole.shape)}, local {tuple(actual.shape)}"
        if actual.shape != expected.shape:
            why = self.why_shape(name, what)
            return PlanError(
                f"{self.label(name)}: {which} has shape {tuple(actual.shape)} on rank "
                f"{self.group.rank}, expected {tuple(expected.shape)} of the dense model's "
                f"{tuple(whole.shape)}; {self.cut(name)}; {why}"
            )
        self.compared += 1
        limit = self.rtol if self.rtol is not None else call.limit
        error = relative_gap(actual, expected)
        if error <= limit:
            return None
        why = self.why_input() if what == "input" else self.why(name, actual, expected, limit)
        return PlanError(
            f"{self.label(name)}: {which} departs from the dense model by {error:.3g} of its "
            f"largest value (limit {limit:.3g}) on rank {self.group.rank}, the first module to do "
            f"so; {self.cut(name)}, {shapes}; {why}"
        )

    def why(self, name: str, actual: Tensor, expected: Tensor, limit: float) -> str:
        """What a wrong output looks like."""
        module, dense = self.model.get_submodule(name), self.dense.modules.get(name)
        for local, parameter in module.named_parameters(recurse=False):
            theirs = dense._parameters.get(local) if dense is not None else None
            if theirs is None:
                continue
            mark = module.mark(local) if isinstance(module, ShardedModule) else None
            expected_part = theirs if mark is None else mark.local(theirs)
            if parameter.shape != expected_part.shape or not torch.equal(parameter, expected_part):
                kind = "" if mark is None else "this rank's part of "
                return f"its {local} is not {kind}the dense model's"
        entry = self.entries.get(name)
        x = next(iter(self.given.get(name, {}).values()), None)
        bias = module._parameters.get("bias")
        if entry is None:
            inside = [n for n in self.entries if n.startswith(f"{name}." if name else "")]
            if inside:
                return "the cut layers in it give what they should: the code between them does not"
            return "it is whole, and its inputs may come from code between cut layers"
        if bias is not None:
            for times in {-1, 1, self.group.size - 1} - {0}:
                if relative_gap(actual - times * bias, expected) <= limit:
                    return f"its bias is added {times + 1} times"
        if entry.style == ROW and x is not None:
            summand = F.linear(x, matrix_of(module))
            for added in (summand, summand if bias is None else summand + bias):
                if relative_gap(actual, added.to(actual.dtype)) <= limit:
                    return "its output is this rank's summand: the sum over the ranks is missing"
        return "its input and parameters are right: its style or its forward is wrong"

    def why_input(self) -> str:
        if not self.open:
            return "the code before it gives something else on a cut model"
        return (
            f"before it {self.parts_given()} gave their own parts: these cuts don't fit each other "
            "or this one, or the code between them isn't for parts"
        )

    def why_shape(self, name: str, what: str) -> str:
        entry = self.entries.get(name)
        if what == "input" and entry is not None and entry.style == ROW and not self.open:
            return (
                "no layer before it is cut by columns; column and row swapped, or the column "
                "layer left whole"
            )
        if self.open:
            return f"a column split without its row split: {self.parts_given()}, perhaps"
        return "its cut and that of the layers before it don't fit"

    def parts_given(self) -> str:
        return ", ".join(f"{name} ({self.sizes(name)})" for name in dict.fromkeys(self.open))

    def told_raised(self, error: Exception, where: str = "") -> str:
        said = (str(error).splitlines() or [""])[0]
        where = where or f"rank {self.group.rank}"
        before = f"; before it {self.parts_given()} gave their own parts" if self.open else ""
        name = self.running[-1] if self.running else ""
        return (
            f"{self.label(name)}: the dense model runs, the parallel one raised "
            f"{type(error).__name__} on {where}: {said}; {self.cut(name)}{before}"
        )

    def cut(self, name: str) -> str:
        entry = self.entries.get(name)
        return "it is not cut" if entry is None else f"it is {entry.style}, {self.sizes(name)}"

    def sizes(self, name: str) -> str:
        layout = ShardLayout.of(self.entries[name].partition)
        return f"{'/'.join(map(str, layout.local_sizes))} of {layout.size}"

    def label(self, name: str) -> str:
        return name or type(self.model).__name__


def relative_gap(actual: Tensor, expected: Tensor) -> float:
    """``max|actual - expected| / max|expected|``; infinite unless both have the same values that
    are not finite.
    """
    if not expected.numel():
        return 0.0
    ours, theirs = actual.detach().double(), expected.detach().double()
    odd = ~(ours.isfinite() & theirs.isfinite())
    if odd.any():
        if not torch.equal(ours[odd].nan_to_num(0.5), theirs[odd].nan_to_num(0.5)):
            return float("inf")
        ours, theirs = ours.masked_fill(odd, 0.0), theirs.masked_fill(odd, 0.0)
    scale, gap = float(theirs.abs().max()), float((ours - theirs).abs().max())
    return gap / scale if scale > 0 else gap


def _is_part(actual: Tensor, whole: Tensor, limit: float) -> bool:
    """Whether a tensor is a run of the whole along one dimension, as a cache of local heads is."""
    if actual.dim() != whole.dim():
        return False
    pairs = zip(actual.shape, whole.shape, strict=True)
    dims = [dim for dim, (a, b) in enumerate(pairs) if a != b]
    if len(dims) != 1 or actual.size(dims[0]) > whole.size(dims[0]):
        return False
    dim, size = dims[0], actual.size(dims[0])
    starts = range(whole.size(dim) - size + 1)
    return any(relative_gap(actual, whole.narrow(dim, at, size)) <= limit for at in starts)
