"""Sockets between rank 0 and the others: who is let in, and who is missing."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

import pytest
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import HashStore, Store

import tp_native as tp
from tp_native import c10d, links
from tp_native.config import TensorParallelConfig


def config_of(rank: int, size: int, init_timeout_s: float) -> TensorParallelConfig:
    return TensorParallelConfig(rank, size, rank, size, init_timeout_s=init_timeout_s)


def outcomes(
    store: Store, size: int, ranks: list[int], init_timeout_s: float = 10.0
) -> list[list[int] | Exception]:
    """What ``links.connect`` gives or raises on each of ``ranks``, which are threads."""
    found: dict[int, list[int] | Exception] = {}

    def connect(rank: int) -> None:
        try:
            found[rank] = links.connect(store, config_of(rank, size, init_timeout_s))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in ranks]


def check_linked(found: list[list[int] | Exception]) -> None:
    """Every rank's socket leads to rank 0's for it; closes them."""
    size = len(found)
    held: dict[tuple[int, int], socket.socket] = {}
    for rank, fds in enumerate(found):
        assert isinstance(fds, list), fds
        assert [fd >= 0 for fd in fds] == [(rank == 0) != (r == 0) for r in range(size)]
        held.update({(rank, r): socket.socket(fileno=fd) for r, fd in enumerate(fds) if fd >= 0})
    for rank in range(1, size):
        held[0, rank].sendall(b"to %d" % rank)
        assert held[rank, 0].recv(16) == b"to %d" % rank
        held[rank, 0].sendall(b"from %d" % rank)
        assert held[0, rank].recv(16) == b"from %d" % rank
        assert held[0, rank].getsockname()[0] == "127.0.0.1"  # all on this machine
    for link in held.values():
        link.close()


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_is_linked_to_rank_0_over_loopback(size: int) -> None:
    check_linked(outcomes(HashStore(), size, list(range(size))))


def test_no_timeout_is_too_long() -> None:
    check_linked(outcomes(HashStore(), 2, [0, 1], float("inf")))


def address_of(store: Store) -> tuple[str, int, str]:
    inside = PrefixStore("links", store)
    inside.wait(["address"])
    host, port, token = inside.get("address").decode().split()
    return host, int(port), token


def silent(link: socket.socket, token: str) -> None:
    """Says nothing, and does not hang up either."""


def wrong_token(link: socket.socket, token: str) -> None:
    link.sendall((1).to_bytes(4, "big") + links._proof("0" * len(token), 1))


def another_rank(link: socket.socket, token: str) -> None:
    link.sendall((2).to_bytes(4, "big") + links._proof(token, 1))


def rank_beyond(link: socket.socket, token: str) -> None:
    link.sendall((7).to_bytes(4, "big") + links._proof(token, 7))


def half_a_hello(link: socket.socket, token: str) -> None:
    link.sendall(b"\0\0")
    link.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("stranger", [silent, wrong_token, another_rank, rank_beyond, half_a_hello])
def test_who_does_not_know_the_token_is_not_let_in(
    stranger: Callable[[socket.socket, str], None],
) -> None:
    store = HashStore()
    inside = PrefixStore("links", store)
    inside.set("host/1", c10d.machine_id())  # so that rank 0 listens before the true ranks come
    inside.set("host/2", c10d.machine_id())
    first: list[list[int] | Exception] = []
    rank_0 = threading.Thread(target=lambda: first.extend(outcomes(store, 3, [0])))
    rank_0.start()
    host, port, token = address_of(store)
    with socket.create_connection((host, port)) as intruder:
        stranger(intruder, token)
        if stranger is not silent:
            assert intruder.recv(64) == b""  # sent away without a word
        others = outcomes(store, 3, [1, 2])
        rank_0.join()
        check_linked([*first, *others])
        assert intruder.recv(64) == b""


def test_a_second_connection_of_a_rank_is_refused() -> None:
    store = HashStore()
    PrefixStore("links", store).set("host/1", c10d.machine_id())
    PrefixStore("links", store).set("host/2", c10d.machine_id())
    first: list[list[int] | Exception] = []
    rank_0 = threading.Thread(target=lambda: first.extend(outcomes(store, 3, [0])))
    rank_0.start()
    host, port, token = address_of(store)
    hello = (1).to_bytes(4, "big") + links._proof(token, 1)
    with (
        socket.create_connection((host, port)) as one,
        socket.create_connection((host, port)) as two,
    ):
        one.sendall(hello)
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.recv(1)  # it counts, and waits for the others
        two.sendall(hello)
        one.settimeout(5)
        two.settimeout(5)
        refused = two.recv(64)
        third = outcomes(store, 3, [2])
        rank_0.join()
        assert refused == b"" and one.recv(64) == links._proof(token, 0)
    for fds in [*first, *third]:
        assert isinstance(fds, list)
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def test_a_rank_that_met_and_does_not_connect_is_named_on_all_ranks() -> None:
    store = HashStore()
    PrefixStore("links", store).set("host/2", c10d.machine_id())
    for rank, error in enumerate(outcomes(store, 3, [0, 1], 1.0)):
        assert isinstance(error, tp.TensorParallelError)
        assert "[2] of 3" in str(error) and f"rank {rank}" in str(error), error


def test_a_rank_that_never_came_is_named() -> None:
    for error in outcomes(HashStore(), 3, [0, 2], 0.5):
        assert isinstance(error, tp.TensorParallelError)
        assert "ranks missing: [1] of 3" in str(error)


@pytest.mark.parametrize("has_listened", [False, True])
def test_a_rank_0_that_died_is_named(has_listened: bool) -> None:
    store = HashStore()
    inside = PrefixStore("links", store)
    inside.set("host/0", c10d.machine_id())
    if has_listened:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            inside.set("address", f"127.0.0.1 {gone.getsockname()[1]} {'0' * 64}")
    [error] = outcomes(store, 2, [1], 0.5)
    assert isinstance(error, tp.TensorParallelError)
    assert "rank 1: ranks missing: [0] of 2" in str(error)


def test_who_answers_in_place_of_rank_0_is_not_taken_for_it() -> None:
    store = HashStore()
    inside = PrefixStore("links", store)
    inside.set("host/0", c10d.machine_id())
    with socket.create_server(("127.0.0.1", 0)) as server:
        inside.set("address", f"127.0.0.1 {server.getsockname()[1]} {'0' * 64}")

        def answer() -> None:
            with server.accept()[0] as link:
                link.sendall(bytes(32))
                link.recv(64)

        impostor = threading.Thread(target=answer)
        impostor.start()
        [error] = outcomes(store, 2, [1], 5.0)
        impostor.join()
    assert isinstance(error, tp.TensorParallelError) and "is not rank 0" in str(error)


def test_between_hosts_it_listens_where_gloo_and_the_job_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")  # TEST-NET-1: nobody's
    assert links._own_addresses()[:2] == ["127.0.0.1", "192.0.2.1"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-card")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(tp.TensorParallelError, match="set GLOO_SOCKET_IFNAME to the network"):
        links._listen(is_local=False)
