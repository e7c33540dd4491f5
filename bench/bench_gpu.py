"""One GPU's part of the work through torch: our ops beside torch's own steps and fused calls.

Every bar is a ratio in one run: candidates in turn, one batch each per round, the order rotated,
operands used in turn so that memory is not the cache, every result verified against float64. What
takes less time than its launch is replayed as a CUDA graph. One GPU says nothing of links: no
figure here is bus bandwidth, a latency of NCCL or a speed-up from tensor parallelism. The kernels
alone, overlap and chunks are ``tpn_microbench --gpu``'s.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import tp_native as tp
from timing import Timing, environment, output_of, write_json
from tp_native import _C, _ops, gpu
from tp_native.group import Group

SKIPPED = 77
KIND = torch.bfloat16
GPU = torch.device("cuda", 0)
GRAPH_TURNS = 16
HEAD_START_CYCLES = 500_000  # what the host needs to stay ahead of the device
CALLS = 500  # timed on the host; well below what a stream takes before a launch waits
REPLAYS = 1000
PROMPT_ROWS, QUICK_ROWS = (8, 64, 256, 1024, 4096), (8, 1024, 4096)
K, N = 8192, 3584  # one rank's share of a large model's MLP
WIDE_SHAPES = ((4096, 3584, 8192), (4096, 4096, 14336))
EDGE = 8192
TOKENS, HIDDEN, INNER = (64, 256), 4096, 16384  # what four GPUs are to share


@dataclass(frozen=True)
class Case:
    """``run(turn)`` enqueues one repetition; ``check`` raises unless turn 0's result is right."""

    name: str
    run: Callable[[int], Any]
    check: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Rounds:
    """How much is measured."""

    count: int = 11
    batch_s: float = 20e-3

    @classmethod
    def quick(cls) -> Rounds:
        return cls(5, 5e-3)


@dataclass
class Report:
    """Rows, and the bars that they reach or miss."""

    rounds: Rounds
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, part: str, what: str, timings: dict[str, Timing], **more: Any) -> None:
        self.rows += [
            {"part": part, "what": what, "name": name, "verified": True, **t.figures(), **more}
            for name, t in timings.items()
        ]

    def bar(
        self,
        bar: str,
        what: str,
        figure: float,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        reached = figure <= at_most if at_most is not None else figure >= (at_least or 0.0)
        limit = {"at_most": at_most} if at_most is not None else {"at_least": at_least}
        self.bars.append({"bar": bar, "what": what, "figure": figure, **limit, "reached": reached})


def ratio(a: Timing, b: Timing) -> float:
    """Time of ``a`` over time of ``b``: the median of the rounds' own ratios."""
    own = sorted(x / y for x, y in zip(a.rounds_us, b.rounds_us, strict=True))
    return (own[(len(own) - 1) // 2] + own[len(own) // 2]) / 2


# -- the timers


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``run`` as a graph, and what it returned: rewritten by every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a stream needs is there before the capture
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = run()
    return graph, result


def measure(cases: list[Case], rounds: Rounds, *, in_graph: bool = False) -> dict[str, Timing]:
    """Time on the device, of one repetition."""
    batches: list[tuple[Callable[[int], None], int]] = []
    for case in cases:
        verify(case)
        unit, batch = 1, partial(_repeat, case)
        if in_graph:
            graph, _ = capture(lambda case=case: [case.run(turn) for turn in range(GRAPH_TURNS)])
            unit, batch = GRAPH_TURNS, partial(_replay, graph)
        count = 2 * unit
        for _ in range(2):  # the first one is cold and counts too few
            each_s = _batch_s(batch, count) / count
            count = max(unit, min(4096, int(rounds.batch_s / max(each_s, 1e-9))) // unit * unit)
        batches.append((batch, count))
    each_us: list[list[float]] = [[] for _ in cases]
    for index in range(rounds.count):
        for offset in range(len(cases)):
            k = (index + offset) % len(cases)
            batch, count = batches[k]
            each_us[k].append(1e6 * _batch_s(batch, count) / count)
    for case in cases:
        verify(case)
    return {case.name: Timing.of(us) for case, us in zip(cases, each_us, strict=True)}


def verify(case: Case) -> None:
    result = case.run(0)
    if case.check is not None:
        case.check(result)


def _repeat(case: Case, count: int) -> None:
    for turn in range(count):
        case.run(turn)


def _replay(graph: torch.cuda.CUDAGraph, count: int) -> None:
    for _ in range(count // GRAPH_TURNS):
        graph.replay()


def _batch_s(batch: Callable[[int], None], count: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    batch(count)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e-3


def measure_host(cases: list[Case], rounds: Rounds) -> dict[str, Timing]:
    """Time on the host, of one call; the device is idle at first."""
    each_us: list[list[float]] = [[] for _ in cases]
    for case in cases:
        verify(case)
    for index in range(-1, 2 * rounds.count):  # the first round is cold
        for offset in range(len(cases)):
            k = (index + 1 + offset) % len(cases)
            run = cases[k].run
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                run(0)
            seconds = time.perf_counter() - start
            if index >= 0:
                each_us[k].append(1e6 * seconds / CALLS)
    torch.cuda.synchronize()
    return {case.name: Timing.of(us) for case, us in zip(cases, each_us, strict=True)}


# -- operands and groups


@contextmanager
def group_of_one(over: str) -> Iterator[Group]:
    """Ops run their GPU path in it: over our own kernels ("peers") or over NCCL."""
    name = f"tp:bench:{over}"
    control = _C.make_local(name, 1, 60.0)[0]
    made = _C.make_peers(0, control) if over == "peers" else gpu.make_nccl(control, 0, 60.0)
    group = Group(tp.TensorParallelConfig(backend="local", device=GPU), made, name)
    _C.register(name, made)
    try:
        yield group
    finally:
        torch.cuda.synchronize()
        group.close()


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=GPU) * scale).to(KIND)


class Layer:
    """One rank's linear layer; weights take turns, four times the cache in all."""

    def __init__(self, group: Group, m: int, k: int, n: int) -> None:
        cache = torch.cuda.get_device_properties(GPU).L2_cache_size
        copies = max(2, min(64, -(-4 * cache // (2 * n * k))))
        self.x = draw(m, k)
        self.weights = [draw(n, k, scale=k**-0.5) for _ in range(copies)]
        self.bias = draw(n)
        self.cut = (group.order, [n], group.name)

    def w(self, turn: int) -> Tensor:
        return self.weights[turn % len(self.weights)]

    def ours(self, turn: int, activation: str = "gelu_tanh") -> Tensor:
        return _ops.column_parallel_linear_act(
            self.x, self.w(turn), self.bias, activation, *self.cut
        )

    def linear(self, turn: int) -> Tensor:
        return F.linear(self.x, self.w(turn), self.bias)

    def steps(self, turn: int) -> Tensor:
        return F.gelu(self.linear(turn), approximate="tanh")

    def torchs_fused(self, turn: int) -> Tensor:
        y: Tensor = torch._addmm_activation(self.bias, self.x, self.w(turn).t(), use_gelu=True)
        return y

    def check(self, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
        """The first rows against float64."""
        rows = slice(0, 16)
        exact = activation(F.linear(self.x[rows].double(), self.w(0).double(), self.bias.double()))
        return partial(check_close, exact=exact)


def check_close(y: Tensor, exact: Tensor) -> None:
    """Rounded to bf16 up to four times (2^-9 each; SiLU and GELU can double what their argument was
    off by), and by a tanh that is good to 2^-11.
    """
    got = y[: exact.shape[0]].double()
    limit = 4 * 2**-8 * exact.abs() + 2**-7 * exact.abs().mean() + 2e-3
    wrong = int(((got - exact).abs() > limit).sum())
    if wrong or not bool(torch.isfinite(y).all()):
        raise AssertionError(f"{wrong} of {exact.numel()} values are wrong, or some are not finite")


gelu_tanh = partial(F.gelu, approximate="tanh")


# -- the parts


def run_epilogues(report: Report, quick: bool) -> None:
    """B1, B2."""
    shapes = [(m, K, N) for m in (QUICK_ROWS if quick else PROMPT_ROWS)]
    if not quick:
        shapes += WIDE_SHAPES
    with group_of_one("peers") as group:
        for m, k, n in shapes:
            layer = Layer(group, m, k, n)
            small = m <= 256
            is_gelu, is_linear = layer.check(gelu_tanh), layer.check(lambda y: y)
            t = measure(
                [
                    Case("ours", layer.ours, is_gelu),
                    Case("F.linear, F.gelu", layer.steps, is_gelu),
                    Case("_addmm_activation", layer.torchs_fused, is_gelu),
                    Case("F.linear", layer.linear, is_linear),
                ],
                report.rounds,
                in_graph=small,
            )
            what = f"M={m} K={k} N={n}"
            report.add("linear + bias + GELU(tanh)", what, t, in_graph=small)
            ours = t["ours"]
            report.bar(
                "B1",
                f"{what}: ours / F.linear, F.gelu",
                ratio(ours, t["F.linear, F.gelu"]),
                at_most=0.92 if small else 0.96,
            )
            report.bar(
                "B2",
                f"{what}: ours / _addmm_activation",
                ratio(ours, t["_addmm_activation"]),
                at_most=1.01,
            )
            report.bar(
                "B2", f"{what}: ours / F.linear alone", ratio(ours, t["F.linear"]), at_most=1.02
            )
            del layer


def run_square(report: Report, quick: bool) -> None:
    """B3: the relu costs nothing beside the product, and takes our path."""
    edge = EDGE
    x, w = draw(edge, edge), draw(edge, edge, scale=edge**-0.5)
    exact = F.linear(x[:16].double(), w.double())
    with group_of_one("peers") as group:
        cut = (group.order, [edge], group.name)
        t = measure(
            [
                Case(
                    "ours",
                    lambda _: _ops.column_parallel_linear_act(x, w, None, "relu", *cut),
                    partial(check_close, exact=exact.relu()),
                ),
                Case("torch", lambda _: F.linear(x, w), partial(check_close, exact=exact)),
            ],
            report.rounds,
        )
    flop = 2.0 * edge**3
    for name, timing in t.items():
        rate = flop / timing.median_us * 1e-6
        report.add("GEMM", f"{edge}^3", {name: timing}, tflop_per_s=rate)
    report.bar(
        "B3", f"{edge}^3: our rate over torch's", ratio(t["torch"], t["ours"]), at_least=0.95
    )


def compile_or_none(fn: Callable[..., Tensor], *args: Tensor) -> Callable[..., Tensor] | None:
    """``fn`` compiled for these arguments, where this machine can."""
    try:
        compiled: Callable[..., Tensor] = torch.compile(fn, fullgraph=True)
        compiled(*args)
    except Exception as error:  # no C compiler, no Triton
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        print(f"torch.compile is left out: {first[0]}", file=sys.stderr)
        return None
    return compiled


def run_swiglu(report: Report, quick: bool) -> None:
    """B4, end to end."""

    def steps(x: Tensor, w: Tensor) -> Tensor:
        gate, up = F.linear(x, w).chunk(2, -1)
        return F.silu(gate) * up

    with group_of_one("peers") as group:
        for m in (8, 4096) if quick else (8, 256, 1024, 4096):
            layer = Layer(group, m, K, 2 * N)
            exact = steps(layer.x[:16].double(), layer.w(0).double())
            right = partial(check_close, exact=exact)

            def ours(turn: int, layer: Layer = layer) -> Tensor:
                y = _ops.column_parallel_linear(layer.x, layer.w(turn), None, *layer.cut)
                return _ops.glu(y, "silu")

            cases = [
                Case("ours", ours, right),
                Case("torch", lambda turn, y=layer: steps(y.x, y.w(turn)), right),
            ]
            if compiled := compile_or_none(steps, layer.x, layer.w(0)):
                cases.append(
                    Case("compiled", lambda turn, y=layer, f=compiled: f(y.x, y.w(turn)), right)
                )
            t = measure(cases, report.rounds, in_graph=m <= 256)
            what = f"M={m} K={K} N=2x{N}"
            report.add("GEMM, SwiGLU", what, t, in_graph=m <= 256)
            report.bar("B4", f"{what}: ours / torch", ratio(t["ours"], t["torch"]), at_most=0.93)
            if "compiled" in t:
                report.bar(
                    "B4",
                    f"{what}: ours / torch.compile'd",
                    ratio(t["ours"], t["compiled"]),
                    at_most=1.0,
                )
            del layer


def run_backward(report: Report, quick: bool) -> None:
    """B5, as far as the ops offer it: the GELU's own derivative is a pass of torch's there."""
    m = 1024 if quick else 4096
    x = draw(m, K).requires_grad_()
    up, bias = draw(N, K, scale=K**-0.5).requires_grad_(), draw(N).requires_grad_()
    down = draw(K, N, scale=N**-0.5).requires_grad_()
    grad = draw(m, K)
    wanted = (x, up, bias, down)
    with group_of_one("peers") as group:
        cut = (group.order, [N], group.name)
        inner = _ops.column_parallel_linear_act(x, up, bias, "gelu_tanh", *cut)
        ours = _ops.row_parallel_linear(inner, down, None, *cut)
        torchs = F.linear(F.gelu(F.linear(x, up, bias), approximate="tanh"), down)
        exact = [t.double() for t in torch.autograd.grad(torchs, wanted, grad, retain_graph=True)]

        def right(grads: tuple[Tensor, ...]) -> None:
            for got, other in zip(grads, exact, strict=True):  # torch's in bf16 too: both round
                error = (got.double() - other).abs().max() / other.abs().max()
                if not error <= 0.02:
                    raise AssertionError(f"a gradient is off by {error:.2g} of the largest value")

        def backward(y: Tensor, _: int) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, wanted, grad, retain_graph=True)

        t = measure(
            [
                Case("ours", partial(backward, ours), right),
                Case("torch", partial(backward, torchs), right),
            ],
            report.rounds,
        )
    what = f"MLP M={m} K={K} N={N}"
    report.add("backward", what, t)
    report.bar("B5", f"{what}: ours / torch", ratio(t["ours"], t["torch"]), at_most=0.95)


def run_host(report: Report, quick: bool) -> None:
    """B6."""
    x, w = draw(64, 64), draw(64, 64)
    with torch.inference_mode(), group_of_one("peers") as group:
        cut = (group.order, [64], group.name)
        column = Case("ours", lambda _: _ops.column_parallel_linear(x, w, None, *cut))
        fused = Case(
            "ours with GELU",
            lambda _: _ops.column_parallel_linear_act(x, w, None, "gelu_tanh", *cut),
        )
        torchs = Case("F.linear", lambda _: F.linear(x, w))
        t = measure_host([column, fused, torchs], report.rounds)
        report.add("host cost", "linear 64 x 64 x 64", t)
        report.bar(
            "B6", "linear: host time / F.linear's", ratio(t["ours"], t["F.linear"]), at_most=1.2
        )
        replayed = measure([fused, torchs], report.rounds, in_graph=True)
        report.add("graph replay", "linear 64 x 64 x 64", replayed, in_graph=True)
        report.bar(
            "B6",
            "linear with GELU, replayed / F.linear replayed",
            ratio(replayed["ours with GELU"], replayed["F.linear"]),
            at_most=1.0,
        )
    run_host_all_reduce(report)


def run_host_all_reduce(report: Report) -> None:
    t = torch.ones(256, device=GPU)
    with tempfile.TemporaryDirectory() as folder, group_of_one("nccl") as group:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=GPU)
        try:
            times = measure_host(
                [
                    Case("ours", lambda _: _ops.all_reduce_(t, group.order, "sum", group.name)),
                    Case("torch.distributed", lambda _: dist.all_reduce(t)),
                ],
                report.rounds,
            )
        finally:
            dist.destroy_process_group()
    report.add("host cost", "all-reduce of 1 KiB over NCCL, one rank", times)
    report.bar(
        "B6",
        "all-reduce of one rank: host time / torch.distributed's",
        ratio(times["ours"], times["torch.distributed"]),
        at_most=0.5,
    )


def run_capture(report: Report, quick: bool) -> None:
    """B7: halves of the rows on two streams."""
    x, up, bias = draw(2048, 1024), draw(2048, 1024, scale=2**-5), draw(2048)
    down = draw(1024, 2048, scale=2**-5)
    side = torch.cuda.Stream()
    with torch.inference_mode(), group_of_one("peers") as group:
        cut = (group.order, [2048], group.name)

        def block(rows: Tensor) -> Tensor:
            y = _ops.column_parallel_linear_act(rows, up, bias, "gelu_tanh", *cut)
            return _ops.row_parallel_linear(y, down, None, *cut)

        def both() -> tuple[Tensor, Tensor]:
            main = torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                second = block(x[1024:])
            first = block(x[:1024])
            main.wait_stream(side)
            return first, second

        eager = [t.clone() for t in both()]
        graph, outputs = capture(both)
        different = 0
        for _ in range(REPLAYS):
            for t in outputs:
                t.fill_(float("nan"))
            graph.replay()
            different += sum(not torch.equal(a, b) for a, b in zip(outputs, eager, strict=True))
    report.bar(
        "B7",
        f"{REPLAYS} replays of a block on two streams: those that differ from eager",
        float(different),
        at_most=0.0,
    )


def run_share(report: Report, quick: bool) -> None:
    """The part of one of four ranks."""
    local = INNER // 4
    for dtype in (KIND, torch.float32):
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        x = torch.randn(*TOKENS, HIDDEN, device=GPU, dtype=dtype)
        w = torch.randn(local, HIDDEN, device=GPU, dtype=dtype) * HIDDEN**-0.5
        bias = torch.randn(local, device=GPU, dtype=dtype)
        exact = F.linear(x.flatten(0, 1)[:16].double(), w.double(), bias.double())
        with torch.inference_mode(), group_of_one("peers") as group:
            cut = (group.order, [local], group.name)
            case = Case(
                "ours",
                lambda _, x=x, w=w, b=bias, cut=cut: _ops.column_parallel_linear(x, w, b, *cut),
                lambda y, exact=exact: check_close(y.flatten(0, 1), exact),
            )
            torch.cuda.reset_peak_memory_stats()
            y = case.run(0)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - held
            del y
            t = measure([case], report.rounds)
        sizes = " x ".join(str(n) for n in (*TOKENS, HIDDEN))
        what = f"a quarter of {sizes} -> {INNER}, {str(dtype).removeprefix('torch.')}"
        report.add("share", what, t, peak_bytes=peak)
        report.bar("share", f"{what}: ms", t["ours"].median_us * 1e-3, at_most=10.0)
        report.bar("share", f"{what}: peak GB", peak * 1e-9, at_most=2.0)


PARTS: dict[str, Callable[[Report, bool], None]] = {
    "share": run_share,
    "epilogues": run_epilogues,
    "square": run_square,
    "swiglu": run_swiglu,
    "backward": run_backward,
    "capture": run_capture,
    "host": run_host,
}


# -- the whole


def gpu_environment() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(GPU)
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "driver": driver.splitlines()[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        **gpu.facts(),
    }


def print_report(result: dict[str, Any]) -> None:
    facts = result["environment"]
    print(
        f"tp_native {facts['tp_native']} at {facts['commit'][:12]}, torch {facts['torch']}, CUDA "
        f"{facts['cuda']}, {facts['gpu']}, driver {facts['driver']}; bf16, every result verified"
    )
    part = ""
    for row in result["rows"]:
        if f"{row['part']}, {row['what']}" != part:
            part = f"{row['part']}, {row['what']}"
            print(f"\n{part}")
        print(
            f"  {row['name']:20} {row['median_us']:10.1f} us (best {row['best_us']:.1f}, spread "
            f"{100 * row['spread']:.1f}%)"
        )
    print(f"\n{'bar':6} {'':66} {'figure':>9}  asked")
    for bar in result["bars"]:
        asked = f"<= {bar['at_most']:g}" if "at_most" in bar else f">= {bar['at_least']:g}"
        verdict = "reached" if bar["reached"] else "MISSED"
        print(f"{bar['bar']:6} {bar['what']:66} {bar['figure']:9.3f}  {asked:8} {verdict}")
    for failure in result["failures"]:
        print(f"{failure['part']} failed: {failure['why']}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="PATH", help="write all figures and the environment")
    parser.add_argument("--quick", action="store_true", help="few sizes, 5 short rounds")
    parser.add_argument("--only", metavar="PART,...", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--only: no part {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print(
            "bench_gpu: skipped: torch sees no NVIDIA GPU "
            f"({_C.gpu_status()[1] or 'this torch has no CUDA'})",
            file=sys.stderr,
        )
        return SKIPPED
    if not _C.has_cuda_kernels():
        print("bench_gpu: skipped: built without the CUDA kernels", file=sys.stderr)
        return SKIPPED
    torch.manual_seed(0)
    torch.cuda.set_device(GPU)
    report = Report(Rounds.quick() if args.quick else Rounds())
    for name in chosen:
        try:
            PARTS[name](report, args.quick)
        except Exception as error:  # the others may still tell something
            report.failures.append({"part": name, "why": f"{type(error).__name__}: {error}"})
        torch.cuda.empty_cache()
    facts = {**environment(), **gpu_environment()}
    if args.commit:
        facts["commit"] = args.commit
    result = {
        "benchmark": "bench_gpu",
        "quick": args.quick,
        "plan": {"rounds": report.rounds.count, "batch_s": report.rounds.batch_s},
        "environment": facts,
        "rows": report.rows,
        "bars": report.bars,
        "failures": report.failures,
    }
    print_report(result)
    if args.json:
        write_json(args.json, result)
    return 1 if report.failures else 0


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    sys.exit(main())
