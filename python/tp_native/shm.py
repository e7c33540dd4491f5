"""Making this process's end of a group over shared memory, with what its environment says."""

from __future__ import annotations

from ._native import _C
from .config import TensorParallelConfig, flight_folder, launcher_pid


def make_shm(
    name: str,
    address: str,
    config: TensorParallelConfig,
    generation: int = 0,
    offer: str = "shm",
) -> _C.Communicator:
    """Meet ``config.world_size`` ranks at ``address``. ":" and the generation that they agree on,
    the highest that one of them proposes, complete ``name``. All ranks are told ``offer``.
    """
    return _C.make_shm(
        name=name,
        address=address,
        rank=config.rank,
        size=config.world_size,
        generation=generation,
        timeout_s=config.timeout_s,
        init_timeout_s=config.init_timeout_s,
        frozen_timeout_s=config.frozen_timeout_s,
        launcher_pid=launcher_pid(),
        flight_folder=flight_folder(),
        offer=offer,
    )
