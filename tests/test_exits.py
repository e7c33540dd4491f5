"""How ranks end: by returning, raising, signals and kills, in every phase, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import tiny
import tp_native as tp
from tp_native.config import job_address

EXIT_S = 2.0  # from the action to the end of what we do at exit: the group is closed
FINAL_S = 6.0  # to the process's end, on a busy machine: torch's own teardown is 0.3 s of work
SIGNAL_S = 3.0
LIMIT_S = 20.0  # what no rank may need, whatever happens

# Has imported everything and forks a rank per request. The rank's code runs at module level, so
# that it ends as a script does: atexit, threads and finalization included.
NURSERY = """
import atexit, gc, importlib, json, os, signal, sys, time
nursery = os.getpid()
atexit.register(lambda: os.getpid() != nursery and print("closed", time.monotonic(), flush=True))
import torch
import tp_native  # its own atexit callback comes later, so it runs earlier
torch.set_num_threads(1)
gc.freeze()  # or the collector would walk through all of torch at each end
while line := sys.stdin.readline():
    request = json.loads(line)
    if "load" in request:
        importlib.import_module(request["load"])
        gc.freeze()
        print("true", flush=True)
        continue
    if "wait" in request:
        ended, end = {}, time.monotonic() + request["limit_s"]
        while len(ended) < len(request["wait"]) and time.monotonic() < end:
            for pid in set(request["wait"]) - set(ended):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[pid] = [os.waitstatus_to_exitcode(status), time.monotonic()]
            time.sleep(0.002)
        print(json.dumps([ended.get(pid) for pid in request["wait"]]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    os._exit(0)
for number, path in enumerate(("/dev/null", request["out"], request["err"])):
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(opened, number)
    os.close(opened)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.update(request["env"])
exec(compile(request["code"], "rank.py", "exec"), {"__name__": "__main__"})
"""


@dataclass
class Rank:
    """A rank process and the files that it writes to."""

    pid: int
    out: Path
    err: Path

    def said(self, text: str, limit_s: float = LIMIT_S) -> str:
        """What it wrote, once that contains ``text``."""
        end = time.monotonic() + limit_s
        while text not in (written := self.out.read_text() if self.out.exists() else ""):
            assert time.monotonic() < end, (text, written, self.errors())
            time.sleep(0.002)
        return written

    def told_at(self, word: str) -> float:
        """The time that it wrote behind ``word``."""
        return float(self.said(word).split(word, 1)[1].split()[0])

    def errors(self) -> str:
        return self.err.read_text() if self.err.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


@dataclass
class End:
    """Exit status and time of one rank."""

    status: int
    at: float


def job_env(rank: int, size: int, run_id: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": run_id,
        "OMP_NUM_THREADS": "1",
    }


class Nursery:
    """Starts ranks at 10 ms each instead of the seconds that importing torch takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, code: str, env: dict[str, str] | None = None) -> Rank:
        self.started += 1
        out, err = (self.folder / f"{self.started}.{kind}" for kind in ("out", "err"))
        pid = self._ask(code=code, env=env or {}, out=str(out), err=str(err))
        return Rank(pid, out, err)

    def load(self, module: str) -> None:
        """Import ``module`` for all ranks to come."""
        self._ask(load=module)

    def job(self, *codes: str, run_id: str = "", env: dict[str, str] | None = None) -> list[Rank]:
        """One rank per code."""
        run_id = run_id or uuid.uuid4().hex
        size = len(codes)
        return [
            self.start(code, {**job_env(rank, size, run_id), **(env or {})})
            for rank, code in enumerate(codes)
        ]

    def ends(self, ranks: Sequence[Rank], limit_s: float = LIMIT_S) -> list[End]:
        """How the ranks ended; kills what still runs at the limit and fails."""
        pids = [rank.pid for rank in ranks]
        found = self._ask(wait=pids, limit_s=limit_s)
        hung = [pid for pid, end in zip(pids, found, strict=True) if end is None]
        told = {rank.pid: rank.errors() for rank in ranks}
        for pid in hung:
            os.kill(pid, signal.SIGKILL)
        if hung:
            self._ask(wait=hung, limit_s=LIMIT_S)
        assert not hung, f"still running after {limit_s} s: {hung}, {told}"
        return [End(*end) for end in found]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        left = psutil.Process(self.process.pid).children(recursive=True)
        for process in left:
            process.kill()
        self.process.kill()
        self.process.wait()
        assert not left, left


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    started = Nursery(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def script(text: str) -> str:
    heading = "import os, signal, sys, threading, time\nimport torch\nimport tp_native as tp\n"
    return heading + textwrap.dedent(text)


# -- row 22: the interpreter's end

ACTIONS = {
    "return": ("pass", 0),
    "exit 0": ("sys.exit(0)", 0),
    "exit 3": ("sys.exit(3)", 3),
    "raise": ("raise ValueError('told to')", 1),
    "_exit 5": ("os._exit(5)", 5),
    "exit in thread": ("t = threading.Thread(target=sys.exit, args=(3,)); t.start(); t.join()", 0),
}
IN_THREAD = """
    def waits():
        try:
            {call}
        except tp.TensorParallelError:
            pass
    threading.Thread(target=waits, daemon=True).start()
    time.sleep(0.1)
    act()
"""
INIT = "group = tp.init_tensor_parallel()\n"
SHARED = """
    group = tp.init_tensor_parallel()
    held = [group.empty_shared(5000).fill_(1.0) for _ in range(3)]
    group.all_reduce_(held[0])
    made = tp.all_reduce_sum(held[1])
    {}
"""
PHASES = {
    "before init": "act()",
    "in init": IN_THREAD.format(call="tp.init_tensor_parallel()"),
    "after init": INIT + "act()",
    "in a collective": INIT + textwrap.dedent(IN_THREAD.format(call="group.barrier()")),
    "inside simulate": INIT
    + textwrap.dedent("""
        def fn(g):
            g.barrier()
            if g.rank == 0:
                act()
            g.barrier()
        tp.simulate(fn, 2)
    """),
    "after close": INIT + "group.close()\nact()",
    "in a with block": "with tp.init_tensor_parallel() as group:\n    act()",
    "shared tensors alive": SHARED.format("act()"),
}
PEER = """
    try:
        group.barrier()
        print("nobody was missed")
    except tp.TensorParallelError as error:
        print("told", time.monotonic(), error, flush=True)
"""
ALONE = ("before init", "in init")


def acting(phase: str, action: str) -> str:
    act = (
        f"def act():\n    print('acting', time.monotonic(), flush=True)\n    {ACTIONS[action][0]}\n"
    )
    return script(act) + textwrap.dedent(PHASES[phase])


def peer_of(phase: str) -> str:
    if phase == "shared tensors alive":
        return script(SHARED.format("pass")) + textwrap.dedent(PEER)
    late = "time.sleep(0.6)\n" if phase == "in a collective" else ""
    return script(INIT + late) + textwrap.dedent(PEER)


def end_once(nursery: Nursery, phase: str, action: str) -> None:
    codes = [acting(phase, action)]
    if phase in ALONE:
        ranks = [nursery.start(codes[0], job_env(0, 2, uuid.uuid4().hex))]
    else:
        ranks = nursery.job(*codes, peer_of(phase))
    ends = nursery.ends(ranks)
    case = (phase, action, ends[0], ranks[0].errors())
    assert ends[0].status == ACTIONS[action][1], case
    acted_at = ranks[0].told_at("acting")
    assert ends[0].at - acted_at <= FINAL_S, case
    if action != "_exit 5":
        assert ranks[0].told_at("closed") - acted_at <= EXIT_S, case
    lines = ranks[0].errors().splitlines()
    if action == "raise":
        assert lines[0].startswith("Traceback"), case
        assert lines[-1] == "ValueError: told to" and len(lines) < 30, case
        assert sum(line.startswith("Traceback") for line in lines) == 1, case
    else:
        assert not lines, case
    if len(ranks) == 2:
        assert ends[1].status == 0 and not ranks[1].errors(), (case, ends[1], ranks[1].errors())
        if phase != "in a collective":
            assert ranks[1].told_at("told") - acted_at <= EXIT_S, case
        told = ranks[1].said("told")
        assert "rank 0" in told, told


@pytest.mark.parametrize("phase", PHASES)
def test_the_interpreter_ends_as_it_should(nursery: Nursery, phase: str) -> None:
    others = [action for action in ACTIONS if action != "raise"]
    first = list(PHASES).index(phase)
    for action in ("raise", others[first % 5], others[(first + 2) % 5]):
        end_once(nursery, phase, action)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_200_ends_of_the_interpreter(nursery: Nursery) -> None:
    rng = random.Random(22)
    for _ in range(200):
        end_once(nursery, rng.choice(list(PHASES)), rng.choice(list(ACTIONS)))


# -- row 23: signals

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
REACHED = "    print('reached', time.monotonic(), flush=True)\n"


def in_phase(phase: str, folder: Path) -> str:
    """A rank that says ``reached`` in ``phase`` and would stay there for a minute."""
    texts = {
        "init": """
            print("reached", flush=True)
            os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = "3"  # the third never comes
            tp.init_tensor_parallel()
        """,
        "load": f"""
            from tp_native.checkpoint import reader
            read = reader.SafetensorsFile._pread
            def slow(*args):
                print("reached", flush=True)
                time.sleep(0.05)
                return read(*args)
            reader.SafetensorsFile._pread = slow
            group = tp.init_tensor_parallel()
            while True:
                tp.load_pretrained({str(folder)!r}, group)
        """,
        "collective": """
            group = tp.init_tensor_parallel()
            print("reached", flush=True)
            while True:
                group.all_reduce_(torch.ones(50_000))
                if group.rank == 0:
                    time.sleep(0.01)
        """,
        "wait": """
            group = tp.init_tensor_parallel()
            print("reached", flush=True)
            if group.rank == 0:
                group.barrier()
            time.sleep(60)
        """,
        "generate": f"""
            group = tp.init_tensor_parallel()
            model = tp.load_pretrained({str(folder)!r}, group)
            while True:
                tp.generate(model, torch.tensor([[5, 6, 7]]), 40,
                            on_token=lambda ids: print("reached", flush=True))
        """,
    }
    return script(texts[phase])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("signals") / "model")


def signal_once(
    nursery: Nursery, model_folder: Path, phase: str, number: signal.Signals, whom: str
) -> None:
    if phase in ("load", "generate"):
        nursery.load("transformers.models.llama.modeling_llama")
    ranks = nursery.job(*[in_phase(phase, model_folder)] * 2)
    for rank in ranks:
        rank.said("reached")
    time.sleep(0.05)
    at = time.monotonic()
    told = ranks if whom == "all" else ranks[1:]
    for rank in told:
        rank.signal(number)
    ends = nursery.ends(ranks, SIGNAL_S + (FINAL_S if whom == "all" else 2.0))
    case = (ends, [rank.errors() for rank in ranks])
    for rank, end in zip(ranks, ends, strict=True):
        assert end.at - at <= SIGNAL_S or end.status > 0, case  # > 0: Python's own end is in it
        if rank not in told:  # the survivor says whom it lost and fails
            assert end.status == 1, case
            last = rank.errors().splitlines()[-1]
            assert last.startswith("tp_native.errors."), case
            assert "rank 1" in last and "Fatal" not in rank.errors(), case
        elif number == signal.SIGINT:
            # KeyboardInterrupt, or the other rank's interruption, whichever came first
            assert end.status in (-signal.SIGINT, 130, 1), case
            assert "Fatal" not in rank.errors() and "terminate" not in rank.errors(), case
        else:
            assert end.status == -number, case
            assert not rank.errors(), case


@pytest.mark.parametrize(
    ("phase", "number", "whom"),
    [
        ("init", signal.SIGINT, "all"),
        ("collective", signal.SIGTERM, "all"),
        ("wait", signal.SIGINT, "all"),
        ("load", signal.SIGHUP, "all"),
        ("generate", signal.SIGINT, "all"),
        ("init", signal.SIGTERM, "one"),
        ("collective", signal.SIGINT, "one"),
        ("load", signal.SIGINT, "one"),
        ("generate", signal.SIGHUP, "one"),
    ],
)
def test_a_signal_ends_all_ranks(
    nursery: Nursery, model_folder: Path, phase: str, number: signal.Signals, whom: str
) -> None:
    signal_once(nursery, model_folder, phase, number, whom)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_signal_in_every_phase(nursery: Nursery, model_folder: Path) -> None:
    for number in SIGNALS:
        for phase in ("init", "collective", "wait", "load", "generate"):
            for _ in range(3):
                signal_once(nursery, model_folder, phase, number, "all")
        for _ in range(3):
            signal_once(nursery, model_folder, "collective", number, "one")
            signal_once(nursery, model_folder, "generate", number, "one")


HANDLED = """
    group = tp.init_tensor_parallel()
    def handler(number, frame):
        {}
        print("handled", time.monotonic(), flush=True)
        os._exit(7)
    signal.signal(signal.SIGTERM, handler)
    print("reached", flush=True)
    if group.rank == 0:
        group.barrier()
    time.sleep(30)
"""


@pytest.mark.parametrize(
    "call",
    [
        "group.abort('SIGTERM')",
        "group.stats()",
        pytest.param("group.op_log()", marks=pytest.mark.soak),
        "group.close()",
        pytest.param("group.barrier(0.1)", marks=pytest.mark.soak),
    ],
)
def test_a_signal_handler_may_use_the_group(nursery: Nursery, call: str) -> None:
    """As a preemption handler does: leave the group in good order, then save."""
    call = call if "barrier" not in call else f"try: {call}\n        except Exception: pass"
    ranks = nursery.job(*[script(HANDLED.format(call))] * 2)
    for rank in ranks:
        rank.said("reached")
    time.sleep(0.2)
    ranks[0].signal(signal.SIGTERM)
    try:
        assert nursery.ends(ranks[:1], 2.0)[0].status == 7, ranks[0].errors()
    finally:
        ranks[1].signal(signal.SIGKILL)
        nursery.ends(ranks[1:])


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
