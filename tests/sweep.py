"""One line for every family and world: what holds, by how much, or the first line of the error.

``python tests/sweep.py [names...] [--kind bar] [--world N] [--seed S]``; names may have wildcards.
Each case runs in a process of its own with thread ranks, so that nothing stops the sweep.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import multiprocessing
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from transformers import LlamaForCausalLM  # noqa: F401  slow to import: once, before the forks

import families
import tp_native as tp
from families import LIMIT, QUIET, SHARE, Case, Family
from tp_native.config import TensorParallelConfig
from tp_native.errors import PlanError

COLUMNS = "{:<28} {:>5} {:>4}  {:<8} {:>8} {:>8} {:>6} {:>8} {:>5} {:>6}  {}"


def run(family: Family, world: int, seed: int, options: argparse.Namespace) -> tuple[str, str]:
    """(verdict, line) of one case."""
    begin = time.perf_counter()
    cells = ["-"] * 5
    blame = "DENSE"
    try:
        case = families.build(family.name, seed)
        dense = families.reference(case)
        blame = "error"
        if options.dense:
            verdict, cells, note = dense_cells(case, dense)
        else:
            findings = tp.simulate(families.rank_finding, world, case, dense, options.verify)
            verdict, cells, note = cells_of(case, dense, findings)
            if options.explain:
                note += "\n" + tp.plan(case.model, world).explain()
    except Exception as error:
        verdict = "refused" if isinstance(error, PlanError) and family.may_refuse else blame
        first = str(error).strip().splitlines() or [""]
        note = f"{type(error).__name__}: {first[0]}"
        if options.trace:
            note += "\n" + traceback.format_exc()
    took = f"{time.perf_counter() - begin:.1f}s"
    return verdict, COLUMNS.format(family.name, world, seed, verdict, *cells, took, note)


def cells_of(
    case: Case, dense: families.Reference, findings: list[families.Finding]
) -> tuple[str, list[str], str]:
    share, whole = families.sharded_share(families.weight_matrices(case.model), findings)
    output = max(found.output_error for found in findings)
    gap, name = max(found.worst_gradient for found in findings)
    tokens = {found.tokens_equal for found in findings}
    said = "-" if None in tokens else "no" if False in tokens else "yes"
    cells = [
        f"{output:.1e}",
        f"{gap:.1e}" if case.has_gradients else "-",
        f"{share:.1%}",
        f"{findings[0].collectives}",
        said,
    ]
    notes = []
    if not gap <= LIMIT:
        notes.append(f"gradient of {name}")
        with contextlib.suppress(RuntimeError):
            notes.append(
                f"the dense model's own rounding is {families.rounding(case, dense)[1]:.1e}"
            )
    if findings[0].state_differs:
        notes.append(f"state differs: {findings[0].state_differs[:3]}")
    if len(findings) > 1 and share < SHARE:
        notes.append(f"whole: {', '.join(whole[:4])}{' ...' if len(whole) > 4 else ''}")
    wrong = families.problems(case, findings)
    right = not [line for line in wrong if "sharded" not in line]
    verdict = "ok" if not wrong else "whole" if right else "WRONG"
    return verdict, cells, "; ".join(notes)


def dense_cells(case: Case, dense: families.Reference) -> tuple[str, list[str], str]:
    """How the dense model's own fp32 rounding compares with the bar: a second run in fp64."""
    count = sum(families.weight_matrices(case.model).values())
    notes = [f"std {dense.output.std().item():.2g}"]
    idle = [n for n, gradient in dense.gradients.items() if gradient is None]
    if idle and case.has_gradients:
        notes.append(f"no gradient: {', '.join(idle[:3])}{' ...' if len(idle) > 3 else ''}")
    output = gap = float("nan")
    try:
        output, gap, name = families.rounding(case, dense)
    except RuntimeError as error:
        notes.append(f"not in fp64: {str(error).splitlines()[0]}")
    else:
        if gap > QUIET:
            notes.append(f"gradient of {name}")
    said = "-" if dense.tokens is None else "yes"
    cells = [f"{output:.1e}", f"{gap:.1e}" if case.has_gradients else "-", f"{count}", "-", said]
    verdict = "ok"
    if not dense.output.isfinite().all():
        verdict = "NAN"
    elif output > QUIET or gap > QUIET:
        verdict = "noisy"
    return verdict, cells, "; ".join(notes)


def child(pipe: Connection, family: Family, world: int, seed: int, options: Any) -> None:
    torch.set_num_threads(1)
    TensorParallelConfig.timeout_s = options.timeout / 2
    if not options.trace:
        warnings.simplefilter("ignore")
        sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    pipe.send(run(family, world, seed, options))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families, with wildcards; default: all")
    parser.add_argument("--kind", action="append", help="bar, transformers, stranger")
    parser.add_argument("--world", type=int, action="append", help="default: 2; may be repeated")
    parser.add_argument("--seed", type=int, action="append", help="default: 0; may be repeated")
    parser.add_argument("--seeds", type=int, help="the first N seeds")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one case")
    parser.add_argument("--trace", action="store_true", help="whole tracebacks and warnings")
    parser.add_argument("--verify", action="store_true", help="parallelize(verify=...) as well")
    parser.add_argument("--explain", action="store_true", help="print each plan")
    parser.add_argument("--dense", action="store_true", help="the dense model alone, with fp64")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [
        family
        for family in families.load().values()
        if (not options.kind or family.kind in options.kind)
        and (not options.names or any(fnmatch.fnmatch(family.name, n) for n in options.names))
    ]
    if not chosen:
        parser.error(f"no family is named {options.names}; --list shows all")
    if options.list:
        for family in chosen:
            print(f"{family.name:<28} {family.kind}{'  may refuse' if family.may_refuse else ''}")
        return 0
    seeds = list(range(options.seeds)) if options.seeds else options.seed or [0]
    waiting = [
        (family, world, seed)
        for family in chosen
        for world in ([1] if options.dense else options.world or [2])
        for seed in seeds
    ]
    heads = ("verdict", "output", "gradient", "matrix", "collect", "text", "time", "note")
    print(COLUMNS.format("family", "world", "seed", *heads), flush=True)
    counts: dict[str, int] = {}
    for verdict, line in swept(waiting, options):
        counts[verdict] = counts.get(verdict, 0) + 1
        print(line, flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return 0 if set(counts) <= {"ok", "refused"} else 1


def swept(waiting: list[Any], options: argparse.Namespace) -> Any:
    """Yield every case's verdict and line, in order, ``--jobs`` at a time."""
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[int, Any, float]] = {}
    done: dict[int, tuple[str, str]] = {}
    following = told = 0
    while told < len(waiting):
        while following < len(waiting) and len(running) < options.jobs:
            ours, theirs = context.Pipe(False)
            process = context.Process(target=child, args=(theirs, *waiting[following], options))
            process.start()
            theirs.close()
            running[ours] = (following, process, time.monotonic())
            following += 1
        ready = wait(list(running), timeout=1.0)
        for pipe, (index, process, begin) in list(running.items()):
            late = time.monotonic() - begin > options.timeout
            if pipe not in ready and not late:
                continue
            family, world, seed = waiting[index]
            empty = [family.name, world, seed, "DIED", "-", "-", "-", "-", "-", "-"]
            try:
                done[index] = pipe.recv() if pipe in ready else ("LATE", "")
            except EOFError:
                process.join()
                note = f"exit status {process.exitcode}"
                done[index] = ("DIED", COLUMNS.format(*empty, note))
            if done[index][0] == "LATE":
                empty[3] = "LATE"
                done[index] = ("LATE", COLUMNS.format(*empty, f"over {options.timeout:.0f} s"))
                process.kill()
            process.join()
            pipe.close()
            del running[pipe]
        while told in done:
            yield done[told]
            told += 1


if __name__ == "__main__":
    sys.exit(main())
