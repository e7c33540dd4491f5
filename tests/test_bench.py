"""The benchmarks run, verify what they time, and say on what they were measured."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import tp_native as tp

BENCH = Path(__file__).parents[1] / "bench"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60)


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
