"""How jobs end with their launchers, start side by side and in namespaces, and what they leave."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

import tp_native as tp
from nursery import INIT, LIMIT_S, SIGNAL_S, Nursery, Rank, job_env, script
from tp_native.config import job_address

# -- row 23 and 24: launchers


LAUNCH = """
    from tp_native import launch
    wait = launch._wait
    def told(processes):
        print("waiting", flush=True)
        return wait(processes)
    launch._wait = told
    {}
    sys.exit(launch.launch(["generate", "--model", "/nowhere", "--prompt", "x", "--tp", "2"], 2))
"""


def launched(nursery: Nursery) -> tuple[Rank, list[psutil.Process]]:
    """A launcher and its two ranks, which are stopped before they have imported torch."""
    launcher = nursery.start(script(LAUNCH.format("")))
    launcher.said("waiting")
    process = psutil.Process(launcher.pid)
    end = time.monotonic() + LIMIT_S
    while len(ranks := process.children()) < 2 or not all(
        rank.cmdline()[1:3] == ["-m", "tp_native"] for rank in ranks
    ):
        assert time.monotonic() < end, launcher.errors()
        time.sleep(0.005)
    for rank in ranks:
        rank.suspend()
    return launcher, ranks


def gone(processes: Sequence[psutil.Process], limit_s: float) -> None:
    """All ended within the limit; what did not is killed and fails."""
    _, left = psutil.wait_procs(processes, timeout=limit_s)
    for process in left:
        process.kill()
    assert not left, left


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, None, 130, marks=pytest.mark.soak),
        (signal.SIGTERM, None, 143),
    ],
)
def test_a_launcher_ends_its_ranks(
    nursery: Nursery, first: signal.Signals, second: signal.Signals | None, status: int
) -> None:
    launcher, ranks = launched(nursery)
    try:
        at = time.monotonic()
        launcher.signal(first)
        limit_s = SIGNAL_S
        if second is not None:  # a hard exit at once, though the ranks answer nothing
            time.sleep(0.3)
            at = time.monotonic()
            launcher.signal(second)
            limit_s = 1.0  # patience would take 2.2 s more
        end = nursery.ends([launcher])[0]
        assert end.status == status, (end, launcher.errors())
        assert launcher.told_at("closed") - at <= limit_s
        assert not launcher.errors()
    finally:
        gone(ranks, 0.5)


INTERRUPTED = """
    made = launch.subprocess.Popen.__init__
    def interrupted(self, *args, **options):
        made(self, *args, **options)
        print("made", self.pid, flush=True)
        if options["env"]["RANK"] == "1":
            signal.raise_signal(signal.SIGINT)
    launch.subprocess.Popen.__init__ = interrupted
"""


def test_a_ctrl_c_while_a_rank_is_started_leaves_no_orphan(nursery: Nursery) -> None:
    text = LAUNCH.replace("{}", INTERRUPTED.strip())
    launcher = nursery.start(script(text))
    assert nursery.ends([launcher])[0].status == 130, launcher.errors()
    pids = [int(line.split()[1]) for line in launcher.said("made").splitlines() if "made" in line]
    assert len(pids) == 2
    gone([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], 0.5)


@pytest.mark.soak
def test_ranks_end_with_a_launcher_that_died_while_they_started(nursery: Nursery) -> None:
    launcher, ranks = launched(nursery)
    launcher.signal(signal.SIGKILL)
    nursery.ends([launcher])
    ranks[1].kill()  # the other one would wait a minute for it
    ranks[0].resume()
    gone(ranks[:1], 40.0)  # the import of torch on a busy machine is in it


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
UNDER_TORCHRUN = """
import os, sys, time
import torch
import tp_native as tp
group = tp.init_tensor_parallel()
open(os.path.join(sys.argv[1], str(group.rank)), "w").write(str(os.getpid()))
while True:
    group.barrier()
    time.sleep(0.01)
"""


def under_torchrun(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    (folder / "worker.py").write_text(UNDER_TORCHRUN)
    agent = subprocess.Popen(
        [*TORCHRUN, str(folder / "worker.py"), str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 60
    marks = [folder / str(rank) for rank in range(2)]
    while not all(mark.exists() and mark.read_text() for mark in marks):
        assert time.monotonic() < end and agent.poll() is None, agent.poll()
        time.sleep(0.02)
    return agent, [psutil.Process(int(mark.read_text())) for mark in marks]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.soak),
        pytest.param(signal.SIGINT, marks=pytest.mark.soak),
        pytest.param(signal.SIGHUP, marks=pytest.mark.soak),
        signal.SIGKILL,
    ],
)
def test_ranks_end_with_their_torchrun_agent(tmp_path: Path, number: signal.Signals) -> None:
    agent, ranks = under_torchrun(tmp_path)
    try:
        agent.send_signal(number)
        gone(ranks, 5.0 if number == signal.SIGKILL else SIGNAL_S)
        agent.communicate(timeout=10)
        assert agent.returncode != 0
    finally:
        for process in (agent, *ranks):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        agent.communicate()


# -- rows 8, 9, 28: starts, namespaces, what is left


STARTS = INIT + textwrap.dedent("""
    total = float(group.all_reduce_(torch.tensor([{job}.0])))
    assert total == {job} * group.size, total
    group.close()
""")


@pytest.mark.parametrize("starts", [1, pytest.param(50, marks=pytest.mark.soak)])
@pytest.mark.timeout(600)
def test_4_jobs_start_at_once_with_one_master_port(nursery: Nursery, starts: int) -> None:
    for start in range(starts):
        jobs = [
            nursery.job(*[script(STARTS.format(job=job + 1))] * 2, run_id=f"{start}-{job}-of-four")
            for job in range(4)
        ]
        for ranks in jobs:
            ends = nursery.ends(ranks, 60)
            assert [end.status for end in ends] == [0, 0], [rank.errors() for rank in ranks]
            assert not any(rank.errors() for rank in ranks)


UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
IN_NAMESPACE = script("""
    group = tp.init_tensor_parallel()
    total = float(group.all_reduce_(torch.ones(1)))
    print("pid", os.getpid(), total, flush=True)
    if group.rank == 1:
        sys.stdin.readline()
        os._exit(9)
    try:
        group.barrier()
    except tp.PeerLostError as error:
        print("told", time.monotonic(), error.peer, error, flush=True)
""")


NEW_NAMESPACE = """
    import ctypes
    if ctypes.CDLL(None).unshare(0x20000000) != 0:  # CLONE_NEWPID: for children
        print("not allowed", flush=True)
        os._exit(0)
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_ranks_in_unlike_pid_namespaces_meet_and_notice_a_death(nursery: Nursery) -> None:
    text = script(NEW_NAMESPACE) + IN_NAMESPACE.replace("sys.stdin.readline()", "time.sleep(0.2)")
    ranks = nursery.job(text, text)
    ends = nursery.ends(ranks)
    if "not allowed" in ranks[0].said(""):
        pytest.skip("needs the right to make pid namespaces")
    assert [end.status for end in ends] == [0, 9], [rank.errors() for rank in ranks]
    told = ranks[0].said("told")
    assert "pid 1 2.0" in told and "pid 1 2.0" in ranks[1].said("pid"), told
    assert "rank 1 (pid 1) died" in told, told
    assert abs(ends[1].at - ranks[0].told_at("told")) <= 1.0


@pytest.mark.soak
def test_ranks_with_unlike_proc_mounts_meet_and_notice_a_death() -> None:
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to make pid namespaces (unshare --pid)")
    run_id = uuid.uuid4().hex
    ranks = [
        subprocess.Popen(
            [*UNSHARE, sys.executable, "-c", IN_NAMESPACE],
            env={**os.environ, **job_env(rank, 2, run_id)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "pid 1 2.0\n"
        assert ranks[1].stdin is not None and ranks[0].stdout is not None
        at = time.monotonic()
        ranks[1].stdin.write("\n")
        ranks[1].stdin.flush()
        word, told_at, peer, text = ranks[0].stdout.readline().split(" ", 3)
        assert (word, peer) == ("told", "1") and "died" in text, text
        assert float(told_at) - at <= 1.0
        assert [rank.wait(20) for rank in ranks] == [0, 9]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


VIOLENT = [
    "os._exit(5)",
    "os.kill(os.getpid(), signal.SIGKILL)",
    "os.kill(os.getpid(), signal.SIGSEGV)",
    "os.abort()",
    "raise ValueError('told to')",
    "os.kill(os.getpid(), signal.SIGHUP)",
]
ABNORMAL = """
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    group = tp.init_tensor_parallel(init_timeout_s=2.0)
    held = group.empty_shared(100_000).fill_(1.0)
    end = time.monotonic() + {delay}
    while group.rank != {victim} or time.monotonic() < end:
        group.all_reduce_(held)
    {violence}
"""


def left_behind(folder: Path) -> dict[str, list[str]]:
    """All that an exit may leave on the machine. Names of other people's jobs change too, so only
    ours count.
    """
    sockets = Path("/proc/net/unix").read_text().splitlines()
    return {
        "/dev/shm": sorted(n for n in os.listdir("/dev/shm") if not n.startswith("tpn-bench-")),
        "temporary files": sorted(os.listdir(folder)),
        "sockets": sorted(line.split()[-1] for line in sockets if "@tp_native-" in line),
    }


@pytest.mark.parametrize("count", [5, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.timeout(1800)
def test_abnormal_exits_leave_nothing(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    rng = random.Random(8)
    nurse = psutil.Process(nursery.process.pid)
    descriptors = nurse.num_fds()
    run_ids = [f"{uuid.uuid4().hex}" for _ in range(count)]
    shm_before = left_behind(tmp_path)["/dev/shm"]
    for i, run_id in enumerate(run_ids):
        size = rng.choice([2, 2, 3])
        text = ABNORMAL.format(
            delay=rng.random() * 0.05,
            victim=rng.randrange(size),
            violence=VIOLENT[i % len(VIOLENT)],
        )
        ranks = nursery.job(*[script(text)] * size, run_id=run_id, env={"TMPDIR": str(tmp_path)})
        ends = nursery.ends(ranks)
        assert all(end.status != 0 for end in ends), ends
    assert not nurse.children(recursive=True)
    assert nurse.num_fds() == descriptors
    assert "memfd:tp_native" not in Path(f"/proc/{nurse.pid}/maps").read_text()
    now = left_behind(tmp_path)
    assert not now["temporary files"]
    assert now["/dev/shm"] == shm_before
    config = tp.TensorParallelConfig(0, 2, 0, 2)
    for name, value in job_env(0, 2, "").items():
        monkeypatch.setenv(name, value)
    for run_id in run_ids:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        assert f"@{job_address(config)}" not in now["sockets"]
