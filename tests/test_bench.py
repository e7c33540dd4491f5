"""The benchmarks run, verify what they time, and say on what they were measured."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tp_native as tp
from tp_native import _C
from tp_native.group import Group

BENCH = Path(__file__).parents[1] / "bench"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=110)


@pytest.fixture(scope="module")
def microbench() -> Path:
    installed = Path(sysconfig.get_path("platlib")) / "tp_native"  # of an editable install
    places = [folder / "bin" / "tpn_microbench" for folder in (Path(tp.__file__).parent, installed)]
    found = [place for place in places if place.is_file()]
    assert found, f"tpn_microbench is in none of {places}: install tp_native again"
    return found[0]


def check_microbench(result: dict[str, Any], sizes: list[int]) -> None:
    assert result["verified"] is True
    assert result["ranks"] == 2
    rows = {(row["name"], row["bytes"]): row for row in result["rows"]}
    assert rows["barrier", 0]["best_us"] > 0
    assert rows["flag_round_trip", 0]["best_us"] > 0
    for size in sizes:
        for name in ("memcpy/one", "memcpy/all", "read_peer", "exchange"):
            assert rows[name, size]["payload_gb_per_s"] > 0
        for op in ("all_reduce", "all_gather", "broadcast"):
            row = rows[f"{op}/private/producer_consumer", size]
            assert {"best_us", "median_us", "spread", "gross_best_us", "bus_gb_per_s"} <= set(row)
    assert [row["bytes"] for row in result["fractions"]] == sizes
    assert all("private_of_exchange" in row for row in result["fractions"])
    assert "shared_of_read_peer" in result["fractions"][-1]


def test_microbench_measures_collectives_beside_the_limits(
    microbench: Path, tmp_path: Path
) -> None:
    path = tmp_path / "microbench.json"
    done = run(microbench, "--quick", "--sizes", "256,64K", "--json", path)
    assert done.returncode == 0, done.stderr
    assert "64 KiB" in done.stdout
    check_microbench(json.loads(path.read_text()), [256, 64 << 10])


@pytest.mark.parametrize(
    "arguments",
    [["--ranks", "1"], ["--sizes", "7"], ["--sizes"], ["--fast"], ["--json", "/nowhere/x.json"]],
    ids=lambda arguments: " ".join(arguments),
)
def test_microbench_refuses_bad_arguments_in_one_line(
    microbench: Path, arguments: list[str]
) -> None:
    done = run(microbench, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tpn_microbench: ")
    assert done.stderr.count("\n") == 1
    assert arguments[0] in done.stderr


def test_bench_collectives_compares_verified_results(microbench: Path, tmp_path: Path) -> None:
    path = tmp_path / "collectives.json"
    script = BENCH / "bench_collectives.py"
    done = run(sys.executable, script, "--quick", "--json", path, "--microbench", microbench)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert {"commit", "torch", "cpu", "cores", "reduce_isa"} <= set(result["environment"])
    assert result["plan"]["rounds"] >= 9
    assert all(row["verified"] is True for row in result["rows"])
    assert {row["op"] for row in result["rows"]} == {"all_reduce", "barrier"}
    assert {row.get("dtype") for row in result["rows"]} == {None, "float32", "bfloat16"}
    for row in result["rows"]:
        for path_name in ("gloo", "private", *(["shared"] if row["bytes"] else [])):
            assert {"best_us", "median_us", "spread"} <= set(row[path_name])
    check_microbench(result["microbench"], [256, 64 << 10, 1 << 20])
    assert str(result["environment"]["cores"]) in done.stdout


def test_bench_block_compares_verified_results_and_weighs_the_ranks(tmp_path: Path) -> None:
    path = tmp_path / "block.json"
    done = run(sys.executable, BENCH / "bench_block.py", "--quick", "--json", path)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert {(row["kind"], row["tokens"]) for row in result["rows"]} == {
        ("forward", 1),
        ("forward", 16),
        ("forward", 128),
        ("training", 128),
    }
    for row in result["rows"]:
        assert row["verified"] is True and row["dtensor_over_tp_native"] > 0
        assert ("sequence" in row) == (row["tokens"] > 1)
    assert [row["ranks"] for row in result["memory"]] == [1, 2, 3, 4] * 3
    for row in result["memory"]:
        assert row["worst"] <= 0.02 and row["passes"]
        assert row["sharded_share"] >= 0.95


PEERS = ["vllm", "deepspeed", "impi", "openmpi"]
FACTS = {"commit", "torch", "cpu", "cores", "reduce_isa"}
TIMING = {"best_us", "median_us", "spread"}


def test_bench_peers_reports_each_absent_peer_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    script = BENCH / "bench_peers.py"
    done = run(sys.executable, script, "--quick", "--peers", tmp_path / "none", "--json", path)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert set(result["environment"]) >= FACTS
    assert [run["peer"] for run in result["runs"]] == PEERS
    assert result["bars"] == []
    for peer in result["runs"]:
        assert "install_peers.sh" in peer["missing"]
        assert peer["missing"] in done.stdout
        assert "rows" not in peer


@pytest.fixture
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def peers_result(private_us: float) -> dict[str, Any]:
    """One run beside vLLM, which takes 3 us at any size."""
    cases = importlib.import_module("cases")
    rows = []
    for dtype in cases.DTYPES:
        for size in (256, 4 << 20):
            times = {"gloo": 100.0, "vllm": 3.0, "private": private_us, "shared": 1.0}
            row: dict[str, Any] = {"op": "all_reduce", "dtype": dtype, "bytes": size}
            row |= {name: {"best_us": us, "median_us": us} for name, us in times.items()}
            rows.append(row | cases.ratios(row, ["gloo", "vllm"], ["private", "shared"]))
    runs = [{"peer": "vllm", "ranks": 2, "crowded": False, "missing": "", "rows": rows}]
    return {"runs": runs, "environment": {"cpu": "some CPU", "cores": 2}}


def test_peers_are_judged_by_size_and_path(bench_modules: None) -> None:
    bench_peers = importlib.import_module("bench_peers")
    verdicts = bench_peers.judge(peers_result(private_us=2.9)["runs"])
    judged = {(v["peer"], v["path"], v["bytes"]): v["passes"] for v in verdicts}
    assert judged == {
        ("gloo", "private", 256): True,  # 34 times: 15 are asked for
        ("gloo", "private", 4 << 20): True,
        ("gloo", "shared", 256): True,
        ("gloo", "shared", 4 << 20): True,
        ("vllm", "private", 256): False,  # 1.03 times: 1.15 are asked for
        ("vllm", "private", 4 << 20): False,
        ("vllm", "shared", 256): True,
        ("vllm", "shared", 4 << 20): True,
    }


def test_a_time_lost_in_the_noise_reaches_no_bar(bench_modules: None) -> None:
    bench_peers = importlib.import_module("bench_peers")
    verdicts = bench_peers.judge(peers_result(private_us=-0.5)["runs"])
    assert not any(v["passes"] for v in verdicts if v["path"] == "private")


def test_plot_draws_a_picture(bench_modules: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "peers.png"
    importlib.import_module("plot_collectives").draw(peers_result(private_us=2.0), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_bench_linear_compares_verified_layers(tmp_path: Path) -> None:
    path = tmp_path / "linear.json"
    done = run(sys.executable, BENCH / "bench_linear.py", "--quick", "--json", path)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert set(result["environment"]) >= FACTS
    assert result["plan"]["rounds"] >= 9
    assert [(row["hidden"], row["tokens"]) for row in result["rows"]] == [(1024, 1), (1024, 16)]
    for row in result["rows"]:
        assert row["verified"] is True
        assert row["copies"] >= 3
        for name in ("tp_native", "gloo", "no_comm", "one_thread", "two_threads"):
            assert set(row[name]) >= TIMING
        for name, bar in row["bars"].items():
            assert bar["passes"] == (bar["ratio"] >= bar["at_least"])
            assert row[f"{name}_over_tp_native"] > 0
    assert set(result["rows"][0]["bars"]) == {"gloo", "one_thread"}


@pytest.mark.soak
def test_bench_overhead_subtracts_native_time(microbench: Path, tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    script = BENCH / "bench_overhead.py"
    done = run(sys.executable, script, "--quick", "--json", path, "--microbench", microbench)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert set(result["environment"]) >= FACTS
    assert result["verified"] is True
    times = result["times"]
    assert set(times) == {"op", "module", "mm_python", "mm", "pair", "scripted"}
    for name, at_most in (("op", 1.0), ("module", 2.0)):
        over = result["over_native"][name]
        native = times["mm"]["best_us"] + result["native_all_reduce"]["best_us"]
        assert over["best_us"] == pytest.approx(times[name]["best_us"] - native)
        assert over["at_most_us"] == at_most
        assert over["passes"] == (over["best_us"] <= at_most)


class OnTheCpu:
    """What bench_gpu asks of torch.cuda, where there is none; times are made up."""

    def __init__(self, bench_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bench_gpu, self.names = bench_gpu, []
        stream = type("Stream", (), {"wait_stream": lambda *_: None})
        properties = type("Properties", (), {"L2_cache_size": 1 << 12})
        for name, value in {
            "get_device_properties": lambda *_: properties,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "memory_allocated": lambda: 0,
            "max_memory_allocated": lambda: 1 << 20,
            "reset_peak_memory_stats": lambda: None,
            "Stream": stream,
            "current_stream": stream,
            "stream": lambda _: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        small = {"GPU": torch.device("cpu"), "K": 48, "N": 32, "EDGE": 64, "REPLAYS": 3}
        small |= {"WIDE_SHAPES": ((64, 32, 48),), "TOKENS": (2, 3), "HIDDEN": 16, "INNER": 32}
        for name, value in {**small, "measure": self.measure, "measure_host": self.measure}.items():
            monkeypatch.setattr(bench_gpu, name, value)
        monkeypatch.setattr(bench_gpu, "group_of_one", self.group_of_one)
        monkeypatch.setattr(bench_gpu, "compile_or_none", lambda fn, *_: fn)

    def measure(self, cases: list[Any], rounds: Any, in_graph: bool = False) -> dict[str, Any]:
        for case in cases:
            self.bench_gpu.verify(case)
            case.run(1)
        self.names += [case.name for case in cases]
        timing = importlib.import_module("timing").Timing
        return {case.name: timing.of([3.0, 2.0, 4.0]) for case in cases}

    @contextlib.contextmanager
    def group_of_one(self, over: str) -> Iterator[Any]:
        communicator = _C.make_local(f"tp:bench:{over}", 1, 5.0)[0]
        group = Group(tp.TensorParallelConfig(backend="local"), communicator, communicator.name)
        _C.register(group.name, communicator)
        with group:
            yield group


@pytest.mark.parametrize(
    "part", ["share", "epilogues", "square", "swiglu", "backward", "host_linear"]
)
def test_bench_gpus_parts_compute_what_they_compare(
    bench_modules: None, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    bench_gpu = importlib.import_module("bench_gpu")
    stand_in = OnTheCpu(bench_gpu, monkeypatch)
    report = bench_gpu.Report(bench_gpu.Rounds.quick())
    monkeypatch.setattr(bench_gpu, "run_host_all_reduce", lambda report: None)
    getattr(bench_gpu, f"run_{part.removesuffix('_linear')}")(report, False)
    assert "ours" in stand_in.names
    assert report.rows and report.bars and all(row["verified"] for row in report.rows)
    for bar in report.bars:
        limit = bar.get("at_most", bar.get("at_least"))
        assert bar["reached"] == (
            bar["figure"] <= limit if "at_most" in bar else bar["figure"] >= limit
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", ["bench_gpu", "microbench"])
def test_without_a_gpu_there_is_one_line(microbench: Path, command: str) -> None:
    script = [sys.executable, BENCH / "bench_gpu.py"]
    done = run(*(script if command == "bench_gpu" else [microbench, "--gpu"]))
    assert done.returncode == 77
    assert done.stdout == ""
    assert "skipped: " in done.stderr and done.stderr.count("\n") == 1


STEPS = """
set -eu
STEPS_DEADLINE=$(($(date +%s) + {time_s})) STEPS_LOGS={logs}
. {scripts}/steps.sh
step good 9 echo fine
step bad 9 sh -c 'echo why; exit 3'
step absent 9 sh -c 'echo no such thing here; exit 77'
step slow 1 sh -c 'echo begun; sleep 60'
steps_end
"""


def test_steps_say_what_became_of_each(tmp_path: Path) -> None:
    script = STEPS.format(time_s=60, logs=tmp_path, scripts=BENCH.parent / "scripts")
    start = time.monotonic()
    done = run("sh", "-c", script)
    assert time.monotonic() - start < 20
    assert done.returncode == 1
    table = {line.split()[0]: line for line in done.stdout.splitlines()[-4:]}
    assert " passed " in table["good"]
    assert " failed " in table["bad"] and "status 3" in table["bad"]
    assert " skipped " in table["absent"] and "no such thing here" in table["absent"]
    assert " failed " in table["slow"] and "stopped after its 1 s; last: begun" in table["slow"]
    assert (tmp_path / "bad.log").read_text() == "why\n"


def test_steps_that_all_pass_are_a_success_and_a_late_one_is_a_failure(tmp_path: Path) -> None:
    script = STEPS.format(time_s=60, logs=tmp_path, scripts=BENCH.parent / "scripts")
    good = [line for line in script.splitlines() if not line.startswith("step ") or "good" in line]
    assert run("sh", "-c", "\n".join(good)).returncode == 0
    late = [line.replace("+ 60", "+ 0") for line in good]
    done = run("sh", "-c", "\n".join(late))
    assert done.returncode == 1 and "no time was left for it" in done.stdout


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_gpu_check_without_a_gpu_is_one_line_and_a_failure() -> None:
    done = run("sh", BENCH.parent / "scripts" / "gpu_check.sh")
    assert done.returncode == 1
    assert done.stderr == (
        "gpu-check: no NVIDIA GPU on this machine; this target runs the device tests\n"
    )
