"""How ranks end: by returning, raising and signals, in every phase."""

from __future__ import annotations

import random
import signal
import textwrap
import time
import uuid
from pathlib import Path

import pytest

import tiny
from nursery import INIT, SIGNAL_S, Nursery, job_env, script

EXIT_S = 2.0  # from the action to the end of what we do at exit: the group is closed
FINAL_S = 6.0  # to the process's end, on a busy machine: torch's own teardown is 0.3 s of work


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
