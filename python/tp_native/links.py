"""Connections of rank 0 with every other rank of a group on several hosts, for the native core.

Rank 0 listens where the others reach it, on loopback where all are on one machine; a token from the
job's store proves on both ends of a connection who is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import ipaddress
import os
import secrets
import selectors
import socket
import struct
import time

from torch._C._distributed_c10d import PrefixStore, Store

from . import c10d
from .config import TensorParallelConfig
from .errors import TensorParallelError

_PROOF_BYTES = 32
_HELLO_BYTES = 4 + _PROOF_BYTES  # rank, proof
_RETRY_S = 0.1
_STRANGERS = 64  # connections that have not said who they are
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def connect(store: Store, config: TensorParallelConfig) -> list[int]:
    """Descriptors of connected sockets by rank, -1 for none: rank 0 has one for each other rank,
    the others have one for rank 0. Who gets them closes them. Collective; ``store``: a prefix that
    no other call has used.

    Raises: TensorParallelError naming the missing ranks after ``config.init_timeout_s``.
    """
    store = PrefixStore("links", store)
    machines = c10d.call_roll(store, config, c10d.machine_id())
    deadline = time.monotonic() + min(config.init_timeout_s, 1e6)  # poll() counts milliseconds
    if config.rank == 0:
        with _listen(is_local=len(set(machines)) == 1) as held:
            found = _serve(held, store, config, deadline)
    else:
        found = {0: _reach(store, config, deadline)}
    for link in found.values():
        _watch_network(link)
    return [found[r].detach() if r in found else -1 for r in range(config.world_size)]


def _proof(token: str, rank: int) -> bytes:
    return hmac.digest(token.encode(), f"rank {rank}".encode(), "sha256")


def _watch_network(link: socket.socket) -> None:
    """A host that vanishes without a word ends the connection in some 10 s."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)


# -- rank 0


def _listen(is_local: bool) -> socket.socket:
    for address in ["127.0.0.1", "::1"] if is_local else _own_addresses():
        held = c10d.listener(address, 0)
        if held is None:
            continue
        if is_local or not ipaddress.ip_address(held.getsockname()[0].split("%")[0]).is_loopback:
            return held
        held.close()
    raise TensorParallelError(
        "rank 0 finds no address of its own that the other hosts reach: set GLOO_SOCKET_IFNAME to "
        "the network interface between the hosts"
    )


def _own_addresses() -> list[str]:
    """Where the other hosts may reach this one, best first: at the interface that Gloo was told to
    use, at the job's address, on the way there.
    """
    found = []
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    master = os.environ.get("MASTER_ADDR", "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if interface:
            with contextlib.suppress(OSError):  # none of that name, or one without IPv4
                request = struct.pack("256s", interface.encode()[:15])
                told = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                found.append(socket.inet_ntoa(told[20:24]))
        if master:
            found.append(master)
            with contextlib.suppress(OSError):
                probe.connect((master, 9))  # sends nothing: the kernel chooses the interface
                found.append(probe.getsockname()[0])
    return found


def _serve(
    held: socket.socket, store: Store, config: TensorParallelConfig, deadline: float
) -> dict[int, socket.socket]:
    token = secrets.token_hex(_PROOF_BYTES)
    host, port = held.getsockname()[:2]
    store.set("address", f"{host} {port} {token}")
    found: dict[int, socket.socket] = {}
    try:
        _accept(held, token, config.world_size, deadline, found)
        missing = [r for r in range(1, config.world_size) if r not in found]
        if missing:
            store.set("missing", str(missing))
            raise TensorParallelError(
                f"rank 0: no connection from ranks {missing} of {config.world_size} to {host}:"
                f"{port} within {config.init_timeout_s:g} s: are they alive, and does a firewall "
                "let them through?"
            )
        for link in found.values():
            link.sendall(_proof(token, 0))
    except BaseException:
        for link in found.values():
            link.close()
        raise
    return found


def _accept(
    held: socket.socket, token: str, size: int, deadline: float, found: dict[int, socket.socket]
) -> None:
    """Put every rank's connection into ``found``, as far as they come before ``deadline``."""
    held.setblocking(False)
    told: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as strangers:
        selector.register(held, selectors.EVENT_READ)

        def forget(link: socket.socket) -> bytes:
            selector.unregister(link)
            return told.pop(link)

        while len(found) < size - 1 and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                link = key.fileobj
                assert isinstance(link, socket.socket)
                if link is held:
                    with contextlib.suppress(OSError):  # gone already
                        stranger = strangers.enter_context(held.accept()[0])
                        stranger.setblocking(False)
                        selector.register(stranger, selectors.EVENT_READ)
                        told[stranger] = b""
                    if len(told) > _STRANGERS:
                        oldest = next(iter(told))
                        forget(oldest)
                        oldest.close()
                    continue
                if link not in told:  # closed a moment ago
                    continue
                try:
                    data = link.recv(_HELLO_BYTES - len(told[link]))
                except OSError:
                    data = b""
                told[link] += data
                if data and len(told[link]) < _HELLO_BYTES:
                    continue
                rank = _rank_of(forget(link), token, size)
                if rank is None or rank in found:
                    link.close()
                else:
                    found[rank] = link.dup()
                    found[rank].setblocking(True)


def _rank_of(hello: bytes, token: str, size: int) -> int | None:
    """Who says so, if it knows the token."""
    rank = int.from_bytes(hello[:4], "big")
    is_known = hmac.compare_digest(hello[4:], _proof(token, rank))
    return rank if is_known and 0 < rank < size else None


# -- the others


def _reach(store: Store, config: TensorParallelConfig, deadline: float) -> socket.socket:
    who = f"rank {config.rank}"

    def left_s() -> float:
        return max(deadline - time.monotonic(), 1e-3)

    try:
        store.wait(["address"], c10d.timeout(left_s()))
        host, port, token = store.get("address").decode().split()
    except RuntimeError as error:
        raise TensorParallelError(
            f"{who}: ranks missing: [0] of {config.world_size}: it did not say where it listens "
            f"within {config.init_timeout_s:g} s"
        ) from error
    why: object = "no answer"
    while time.monotonic() < deadline:
        try:
            link = socket.create_connection((host, int(port)), timeout=left_s())
        except OSError as error:
            why = error
            time.sleep(min(_RETRY_S, left_s()))
            continue
        try:
            link.sendall(config.rank.to_bytes(4, "big") + _proof(token, config.rank))
            if hmac.compare_digest(_read_proof(link, deadline), _proof(token, 0)):
                link.settimeout(None)
                return link
            why = f"what answers at {host}:{port} is not rank 0"
        except OSError as error:
            why = error
        link.close()
        break
    missing = "[0]"
    with contextlib.suppress(RuntimeError):
        if store.check(["missing"]):
            missing, why = store.get("missing").decode(), "rank 0 waited for them in vain"
    raise TensorParallelError(
        f"{who}: ranks missing: {missing} of {config.world_size} at {host}:{port} within "
        f"{config.init_timeout_s:g} s ({why})"
    )


def _read_proof(link: socket.socket, deadline: float) -> bytes:
    """Rank 0's answer; shorter where it hangs up."""
    told = b""
    while len(told) < _PROOF_BYTES:
        link.settimeout(max(deadline - time.monotonic(), 1e-3) + 1)  # rank 0's clock began later
        data = link.recv(_PROOF_BYTES - len(told))
        if not data:
            raise ConnectionResetError("rank 0 hung up")
        told += data
    return told
