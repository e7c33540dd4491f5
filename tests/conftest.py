"""Ends the ranks that tests share with the last test: what they print or leave shows in the run's
own report, and what they measured is in it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from harness import stop_worlds
from nursery import Nursery


def pytest_configure() -> None:
    """What started the tests (nohup, a shell's &) may ignore signals: commands under test would."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    for number, handler in usual.items():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def worlds_end_with_the_session() -> Iterator[None]:
    yield
    stop_worlds()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    started = Nursery(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()
