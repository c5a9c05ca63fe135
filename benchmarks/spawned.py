"""Work in fresh processes: several ranks with a gloo group, each on a core of its own, or one alone."""

import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

Work = Callable[..., Any]
"""A function of a module, called with the rank and the arguments; what it returns goes through JSON."""


def alone(work: Work, *arguments: Any) -> Any:
    """What `work(*arguments)` returns in a fresh process, with all cores."""
    return _started("spawn", _enter_alone, 1, work, arguments)[0]


def ranks(world: int, work: Work, *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` returns on each rank: one thread a rank, pinned to one core, a gloo group round all."""
    multiprocessing.set_forkserver_preload(["benchmarks.preloaded"])
    return _started("forkserver", _enter_rank, world, work, arguments)


def _started(method: str, enter: Callable[..., None], world: int, work: Work, arguments: tuple[Any, ...]) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        start_processes(enter, (world, free_port(), work, arguments, folder), nprocs=world, start_method=method)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _enter_alone(rank: int, world: int, port: int, work: Work, arguments: tuple[Any, ...], out: str) -> None:
    (Path(out) / f"{rank}.json").write_text(json.dumps(work(*arguments)))


def _enter_rank(rank: int, world: int, port: int, work: Work, arguments: tuple[Any, ...], out: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    (Path(out) / f"{rank}.json").write_text(json.dumps(work(rank, *arguments)))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
