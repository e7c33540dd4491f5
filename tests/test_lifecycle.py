"""Groups under random programs, against a model of what each call must do; and forked children."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

import tp_native as tp
from harness import World
from nursery import Nursery, script
from test_soak import all_collectives
from tp_native.group import Group

SIZE = 2
STEP_S = 20.0  # no step may need it, whatever happened before
Answer = tuple[str, Any]  # ("value", value) or the error's class and text

# -- what a rank does, one step at a time


class Mine:
    """This rank process's groups and tensors, from step to step."""

    groups: list[Group] = []  # noqa: RUF012
    held: list[tuple[torch.Tensor, float]] = []  # noqa: RUF012
    baseline: tuple[int, int] | None = None


def descriptors_and_maps() -> tuple[int, int]:
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:tp_native")


def forget_all(_: Group) -> tuple[int, int]:
    """Close and drop everything; how many descriptors and mappings that leaves."""
    if tp.current_group().name != "tp:alone":
        tp.current_group().close()
    Mine.groups.clear()
    Mine.held.clear()
    gc.collect()
    gc.freeze()  # all of torch: a collection takes 1 ms then, not 300
    return descriptors_and_maps()


def collective(group: Group, kind: str, count: int) -> float:
    """One collective; a number that is the same on all ranks."""
    mine = torch.full((count,), float(group.rank + 1))
    if kind == "all_reduce":
        return float(group.all_reduce_(mine).sum())
    if kind == "shared":
        return float(group.all_reduce_(group.empty_shared(count).copy_(mine)).sum())
    if kind == "all_gather":
        return float(group.all_gather(mine).sum())
    if kind == "broadcast":
        return float(group.broadcast_(mine, 1).sum())
    if kind == "reduce_scatter":
        parts = group.reduce_scatter(torch.full((2 * count,), float(group.rank + 1)))
        return float(parts.sum())
    if kind == "linear":
        layer = tp.RowParallelLinear(4, 4, bias=False, group=group)
        with torch.no_grad():
            layer.weight.fill_(1.0)
            return float(layer(torch.ones(count, layer.local_in_features)).sum())
    group.barrier()
    return 0.0


def expected_of(kind: str, count: int) -> float:
    ranks = sum(range(1, SIZE + 1))
    return {
        "all_reduce": float(ranks * count),
        "shared": float(ranks * count),
        "all_gather": float(ranks * count),
        "broadcast": 2.0 * count,
        "reduce_scatter": float(ranks * count),
        "linear": 16.0 * count,
        "barrier": 0.0,
    }[kind]


KINDS = ["all_reduce", "shared", "all_gather", "broadcast", "reduce_scatter", "linear", "barrier"]


def simulated(thread: Group, outer: Group, is_used: bool) -> float:
    assert tp.current_group() is thread
    total = float(thread.all_reduce_(torch.ones(1)))
    if is_used and thread.rank == 0:  # a collective of processes from within a thread rank
        total += float(outer.all_reduce_(torch.ones(1))) - outer.size
    thread.barrier()
    return total


def act(step: str, index: int, args: tuple[Any, ...]) -> Any:
    if step == "init":
        group = tp.init_tensor_parallel(init_timeout_s=10.0, timeout_s=10.0)
        is_new = group not in Mine.groups
        if is_new:
            Mine.groups.append(group)
        assert tp.current_group() is group is tp.init_tensor_parallel()
        return is_new
    if step == "hold":
        value = args[0]
        t = Mine.groups[index].empty_shared(3000).fill_(value)
        Mine.held.append((t, value))
        return None
    if step == "look":
        return all(bool((t == value).all()) for t, value in Mine.held)
    if step == "drop":
        del Mine.held[:: args[0]]
        gc.collect()
        return None
    group = Mine.groups[index]
    if step == "close":
        group.close()
        return None
    if step == "abort":
        group.abort(args[0])
        return None
    if step == "stats":
        stats, log = group.stats(), group.op_log()
        shares = stats.pop("late_share")
        assert len(shares) == SIZE and all(0.0 <= share <= 1.0 for share in shares), shares
        assert all(type(v) is int and v >= 0 for v in stats.values()), stats
        assert [entry[0] for entry in log] == list(range(len(log) + 1))[1:], log
        return None
    if step == "copy":
        assert copy.deepcopy(group) is group
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(group)
        return None
    if step == "simulate":
        return tp.simulate(simulated, 2, group, args[0])
    if step == "raise":
        with group:
            raise ValueError("told to")
    if step == "wait":
        group.barrier(timeout_s=args[0])
        return None
    return collective(group, step, *args)


def perform(_: Group, steps: list[tuple[str, int, tuple[Any, ...]]]) -> list[Answer]:
    """``steps``: one for each rank."""
    step, index, args = steps[_.rank]
    if step == "nothing":
        return [("value", None)]
    try:
        return [("value", act(step, index, args))]
    except AssertionError:
        raise
    except Exception as error:
        return [(type(error).__name__, str(error))]


# -- the model


def is_over(answer: Answer) -> bool:
    """Refused because the group was closed; one that had failed may tell its failure again."""
    kind, text = answer
    if "the group is unusable now" in text:
        return True
    return kind == "TensorParallelError" and "closed" in text


class Life(RuleBasedStateMachine):
    """All ranks follow one program; some steps make one rank deviate. ``state``: of the newest
    group, by rank: open, closed, or the text that all its later collectives must raise.
    """

    world: World

    @initialize()
    def begin(self) -> None:
        self.count = 0
        self.state = ["closed"] * SIZE
        left = self.world.run(forget_all, deadline_s=STEP_S)
        for rank, found in enumerate(left):
            known = self.world.__dict__.setdefault("baseline", {})
            assert known.setdefault(rank, found) == found, "descriptors or mappings have leaked"

    def do(self, *steps: tuple[Any, ...]) -> list[Answer]:
        """Perform ``(step, group, *arguments)``, one for all ranks or one for each."""
        if len(steps) == 1:
            steps = steps * SIZE
        sent = [(s[0], s[1] if len(s) > 1 else -1, tuple(s[2:])) for s in steps]
        return [found[0] for found in self.world.run(perform, sent, deadline_s=STEP_S)]

    def expect_failure(self, answer: Answer, rank: int) -> None:
        kind, text = answer
        assert kind != "value", (answer, self.state)
        state = self.state[rank]
        if state == "closed":
            assert is_over(answer), answer
        elif state.startswith("?"):  # it failed elsewhere: this is the first that this rank hears
            assert state[1:] in text, (answer, self.state)
            self.state[rank] = "=" + kind + text
        else:
            assert state == "=" + kind + text, (answer, self.state)

    @property
    def is_open(self) -> bool:
        return self.state == ["open"] * SIZE

    # every rank the same

    @rule()
    @precondition(lambda self: len({s == "closed" for s in self.state}) == 1)
    def init(self) -> None:
        is_new = self.state[0] == "closed"
        assert self.do(("init",)) == [("value", is_new)] * SIZE
        if is_new:
            self.count += 1
            self.state = ["open"] * SIZE

    @rule(kind=st.sampled_from(KINDS), count=st.sampled_from([1, 3, 700, 5000]))
    @precondition(lambda self: self.count > 0)
    def use(self, kind: str, count: int) -> None:
        answers = self.do((kind, -1, count))
        for rank, answer in enumerate(answers):
            if self.is_open:
                assert answer == ("value", expected_of(kind, count))
            else:
                self.expect_failure(answer, rank)

    @rule(kind=st.sampled_from(KINDS))
    @precondition(lambda self: self.count > 1)
    def use_an_old_group(self, kind: str) -> None:
        for answer in self.do((kind, 0, 3)):
            assert is_over(answer), answer

    @rule(times=st.sampled_from([1, 1, 2]))
    @precondition(lambda self: self.count > 0)
    def close(self, times: int) -> None:
        for _ in range(times):
            assert self.do(("close",)) == [("value", None)] * SIZE
        self.state = ["closed"] * SIZE

    @rule(value=st.sampled_from([1.5, 2.5, -3.0]))
    @precondition(lambda self: self.count > 0)
    def hold(self, value: float) -> None:
        for rank, answer in enumerate(self.do(("hold", -1, value))):
            is_closed = self.state[rank] == "closed"
            assert (answer[0] == "TensorParallelError") == is_closed, answer

    @rule(stride=st.integers(1, 3))
    def drop(self, stride: int) -> None:
        assert self.do(("drop", -1, stride)) == [("value", None)] * SIZE

    @rule()
    def look(self) -> None:
        assert self.do(("look",)) == [("value", True)] * SIZE

    @rule(what=st.sampled_from(["stats", "copy"]))
    @precondition(lambda self: self.count > 0)
    def ask(self, what: str) -> None:
        # what a group says after a failure: see test_the_log_has_no_blank_entries
        assume(what != "stats" or self.is_open)
        assert self.do((what,)) == [("value", None)] * SIZE

    @rule(is_used=st.booleans())
    @precondition(lambda self: self.count > 0)
    def simulate(self, is_used: bool) -> None:
        for rank, answer in enumerate(self.do(("simulate", -1, is_used))):
            if self.is_open or not is_used:
                assert answer == ("value", [2.0, 2.0])
            else:
                self.expect_failure(answer, rank)

    # one rank deviates

    @rule(rank=st.integers(0, SIZE - 1), kind=st.sampled_from(KINDS))
    @precondition(lambda self: self.is_open)
    def close_early(self, rank: int, kind: str) -> None:
        steps = [(kind, -1, 3)] * SIZE
        steps[rank] = ("close", -1)  # type: ignore[assignment]
        answers = self.do(*steps)
        for other, answer in enumerate(answers):
            self.state[other] = "closed" if other == rank else "?left the group"
            if other != rank:
                assert answer[0] == "PeerLostError" and f"rank {rank} " in answer[1], answer
                self.expect_failure(answer, other)

    @rule(rank=st.integers(0, SIZE - 1))
    @precondition(lambda self: self.is_open)
    def abort(self, rank: int) -> None:
        steps: list[tuple[Any, ...]] = [("barrier", -1, 0)] * SIZE
        steps[rank] = ("abort", -1, "on purpose")
        answers = self.do(*steps)
        self.state = [f"?rank {rank} aborted the group: on purpose"] * SIZE
        for other, answer in enumerate(answers):
            if other != rank:
                self.expect_failure(answer, other)

    @rule(rank=st.integers(0, SIZE - 1))
    @precondition(lambda self: self.is_open)
    def raise_inside_with(self, rank: int) -> None:
        steps: list[tuple[Any, ...]] = [("all_reduce", -1, 3)] * SIZE
        steps[rank] = ("raise", -1)
        answers = self.do(*steps)
        for other, answer in enumerate(answers):
            if other == rank:
                assert answer == ("ValueError", "told to")
                self.state[other] = "closed"
            else:
                self.state[other] = f"?rank {rank} aborted the group: ValueError: told to"
                self.expect_failure(answer, other)

    @rule(rank=st.integers(0, SIZE - 1))
    @precondition(lambda self: self.is_open)
    def skip(self, rank: int) -> None:
        steps: list[tuple[Any, ...]] = [("wait", -1, 0.05)] * SIZE
        steps[rank] = ("nothing",)
        answers = self.do(*steps)
        self.state = [f"?rank {rank} (pid"] * SIZE
        for other, answer in enumerate(answers):
            if other != rank:
                assert answer[0] == "CollectiveTimeoutError", answer
                self.expect_failure(answer, other)

    @rule(pair=st.lists(st.sampled_from(KINDS), min_size=SIZE, max_size=SIZE, unique=True))
    @precondition(lambda self: self.is_open)
    def mismatch(self, pair: list[str]) -> None:
        assume(sorted(pair) != ["all_reduce", "shared"])  # the same operation
        answers = self.do(*[(kind, -1, 3) for kind in pair])
        self.state = ["?entered different collectives"] * SIZE
        for rank, answer in enumerate(answers):
            assert answer[0] == "CollectiveMismatchError", answer
            self.expect_failure(answer, rank)


def live(sequences: int) -> None:
    world = World(SIZE)
    try:
        world.run(forget_all)
        machine = type("Life", (Life,), {"world": world})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_machine(
                machine,
                settings=settings(
                    max_examples=sequences,
                    stateful_step_count=15,
                    deadline=None,
                    derandomize=sequences < 1000,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
    finally:
        world.kill()


def test_50_random_lives() -> None:
    live(50)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_10000_random_lives() -> None:
    live(10_000)


# -- the most ranks that there may be


def test_16_thread_ranks_run_every_collective() -> None:
    assert tp.simulate(all_collectives, 16) == [380.0] * 16


# -- what the log says of operations that never began


def asks_for_the_log(group: Group) -> list[tuple[int, str]]:
    group.all_reduce_(torch.ones(3))
    group.close()
    with pytest.raises(tp.TensorParallelError, match="is closed"):
        group.barrier()
    return [entry[:2] for entry in group.op_log()]


def test_the_log_has_no_blank_entries() -> None:
    assert tp.simulate(asks_for_the_log, 2) == [[(1, "all_reduce")]] * 2


# -- row 20: forks


CHILD_ENDS = [11, -signal.SIGKILL, 12, 1]
FORKS = """
    import io
    CHILD_ENDS = {ends}
    def in_child(group, how):
        signal.alarm(10)  # a hang ends the child
        refused = 0
        with torch.no_grad():
            for use in (
                lambda: group.all_reduce_(torch.ones(3)),
                lambda: group.all_gather(torch.ones(300)),
                lambda: group.broadcast_(torch.ones(3), 1),
                group.barrier,
            ):
                try:
                    use()
                except tp.TensorParallelError as error:
                    refused += "was made before fork()" in str(error)
        group.abort("from a child")
        if how % 2:
            group.close()
        if refused != 4:
            os._exit(50 + refused)


    def ends_child(how):
        if how == 0:
            os._exit(11)
        if how == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == 2:
            sys.exit(12)
        raise LookupError("on purpose")
    group = tp.init_tensor_parallel(timeout_s=30.0)
    held = group.empty_shared(4000).fill_(2.0)
    rounds = {rounds}
    totals = []
    def stream():
        for i in range(rounds):
            totals.append(float(group.all_reduce_(torch.full((4 + i % 9000,), 1.0))[0]))
            if i % 50 == 0:
                time.sleep(0.002)
    # torch's parsers register their ends at first use, under a lock of the C library's that a fork
    # does not reset: all that runs while others fork must have run before
    with torch.no_grad():
        float(group.all_reduce_(torch.full((3,), 1.0))[0])
        group.broadcast_(group.all_gather(torch.ones(300)), 1)
    thread = threading.Thread(target=stream)
    thread.start()
    before = len(os.listdir("/proc/self/fd"))
    statuses = []
    for i in range({forks}):
        pid = os.fork()
        if pid == 0:
            sys.stderr = io.StringIO()
            in_child(group, i)
            ends_child(i % 4)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    running = thread.is_alive()
    thread.join()
    assert totals == [float(group.size)] * rounds
    assert bool((held == 2.0).all())
    assert statuses == [CHILD_ENDS[i % 4] for i in range({forks})], statuses
    assert len(os.listdir("/proc/self/fd")) == before
    group.barrier()
    group.close()
    print("forked while busy:", running, flush=True)
"""


@pytest.mark.parametrize("forks", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_forks_amid_collectives_harm_nobody(nursery: Nursery, forks: int) -> None:
    text = FORKS.format(ends=CHILD_ENDS, forks=forks, rounds=150 * forks)
    ranks = nursery.job(*[script(text)] * SIZE)
    ends = nursery.ends(ranks, 100)
    assert [end.status for end in ends] == [0] * SIZE, [rank.errors() for rank in ranks]


LOADER = """
    group = tp.init_tensor_parallel(timeout_s=30.0)
    made = group.all_reduce_(group.empty_shared(64, 3).fill_(1.0))  # a data set in shared memory
    counts = []
    for epoch in range({epochs}):
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(made), batch_size=8, num_workers=2,
            multiprocessing_context="fork",
        )
        for (batch,) in loader:
            group.all_reduce_(batch)
            assert bool((batch == group.size ** 2).all())
        del loader, batch
        counts.append(len(os.listdir("/proc/self/fd")))
    # torch's queues go one epoch later, four descriptors each
    assert max(counts) - min(counts) <= 8, counts
    group.barrier()
"""


@pytest.mark.parametrize("epochs", [2, pytest.param(25, marks=pytest.mark.soak)])
def test_a_data_loaders_workers_harm_nobody(nursery: Nursery, epochs: int) -> None:
    ranks = nursery.job(*[script(LOADER.format(epochs=epochs))] * SIZE)
    ends = nursery.ends(ranks, 100)
    assert [end.status for end in ends] == [0] * SIZE, [rank.errors() for rank in ranks]
    assert not ranks[0].errors()


IN_CHILD_ONLY = """
    group = tp.init_tensor_parallel()
    layer = tp.RowParallelLinear(64, 64, bias=False, group=group)
    def busy():
        try:
            group.barrier()  # the other rank comes late: the lock is held at the fork
        except tp.TensorParallelError:
            pass
    if group.rank == 1:
        time.sleep({late})
    thread = threading.Thread(target=busy)
    thread.start()
    if {late} and group.rank == 0:
        time.sleep(0.1)
    elif not {late}:
        thread.join()
    pid = os.fork()
    if pid == 0:
        signal.alarm(1)
        {use}
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    thread.join()
    {check}
    group.close()
    sys.exit(0 if status == 0 else 40)
"""


@pytest.mark.parametrize("use", ["group.stats()", "group.op_log()"])
def test_a_child_may_ask_a_group_whose_lock_was_held(nursery: Nursery, use: str) -> None:
    text = script(IN_CHILD_ONLY.format(late=0.3, use=use, check="pass"))
    ranks = nursery.job(text, text)
    assert nursery.ends(ranks)[0].status == 0, ranks[0].errors()


@pytest.mark.parametrize(
    "use",
    [
        "try: group.empty_shared(4096).fill_(-7.0)\n        except tp.TensorParallelError: pass",
        "try: layer(torch.full((64, 32), -7.0))\n        except tp.TensorParallelError: pass",
        "try: tp.all_reduce_sum(torch.full((4096,), -7.0))\n"
        "        except tp.TensorParallelError: pass",
    ],
    ids=["empty_shared", "linear", "all_reduce"],
)
def test_a_child_writes_nothing_into_its_parents_memory(nursery: Nursery, use: str) -> None:
    # the parent's next block of this size is the one that the child was handed
    check = "late = group.empty_shared(4096)\n    assert not bool((late != 0).any()), late\n"
    text = script(IN_CHILD_ONLY.format(late=0, use=use, check=check.rstrip()))
    ranks = nursery.job(text, text)
    assert nursery.ends(ranks)[0].status == 0, ranks[0].errors()
