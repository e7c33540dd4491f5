"""Ends the ranks that tests share with the last test: what they print or leave shows in the run's
own report, and what they measured is in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness import stop_worlds


@pytest.fixture(scope="session", autouse=True)
def worlds_end_with_the_session() -> Iterator[None]:
    yield
    stop_worlds()
