"""How the ranks of an engine come together: where each stands, and that all mean the same."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from minivllm.distributed.channel import CONNECT_SECONDS, Link, Listener, read_json
from minivllm.distributed.group import MEETING_TIMEOUT
from minivllm.distributed.ranks import RankFailure
from minivllm.distributed.worker import Job
from minivllm.models.config import ModelConfig


@dataclass(frozen=True)
class Place:
    """Where this process stands. started: by torchrun, as were the others."""

    rank: int = 0
    local_rank: int = 0
    started: bool = False
    local: bool = True

    @classmethod
    def here(cls, size: int) -> Place:
        """From the environment; ValueError if what torchrun says there does not fit ``size``."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        if any(name not in os.environ for name in names):
            return cls()
        rank, local_rank, world, local_world, port = map(_number, names)
        if not 0 < port < 1 << 16:
            raise ValueError(
                f"MASTER_PORT={port} in the environment must be a port, from 1 to 65535; torchrun "
                "sets it"
            )
        if world != size:
            raise ValueError(
                f"tensor_parallel_size={size}, but torchrun has started {world} ranks "
                "(WORLD_SIZE); make them equal"
            )
        return cls(rank, local_rank, started=True, local=local_world == world)


def _number(name: str) -> int:
    """A variable of torchrun's."""
    value = os.environ[name]
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r} in the environment must be a number; torchrun sets it")
    return int(value)


def find_store(place: Place) -> dist.Store:
    """Where the ranks that torchrun has started meet: MASTER_ADDR and MASTER_PORT.

    ValueError on rank 0 if it cannot listen there, RankFailure where nobody answers.
    """
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
    # torchrun keeps a store of its own at that address; other starters leave it to rank 0.
    there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = place.rank == 0 and not there
    found: list[dist.Store | Exception] = []

    def look() -> None:
        try:
            found.append(
                dist.TCPStore(
                    host,
                    port,
                    is_master=listens,
                    wait_for_workers=False,
                    timeout=MEETING_TIMEOUT,
                )
            )
        except Exception as error:
            found.append(error)

    # In a thread that can be left behind: of a program that has the port, and takes connections
    # without a word, the store would wait for an answer forever.
    thread = threading.Thread(target=look, name="minivllm store", daemon=True)
    thread.start()
    thread.join(MEETING_TIMEOUT.total_seconds())
    store = found[0] if found else None
    if isinstance(store, dist.Store):
        return store
    if listens and "failed to listen" in str(store):
        reason = str(store).splitlines()[0].rpartition("message: ")[2]
        raise ValueError(
            f"MASTER_PORT={port}: rank 0 cannot listen on that port ({reason}); give torchrun, or "
            "whatever starts the ranks, another one"
        ) from None
    raise RankFailure(
        f"rank {place.rank} found no store at MASTER_ADDR={host}, MASTER_PORT={port} within "
        f"{MEETING_TIMEOUT.seconds} s; who keeps it (rank 0, or torchrun) may have ended, and has "
        "said why, or another program has that port"
    ) from store


def agree(job: Job, store: dist.Store, rank: int, size: int) -> None:
    """ValueError on every rank if two of them were given different settings."""
    settings = {**job.settings, "dtype": job.dtype, "device": job.device}
    # A model may lie elsewhere on another host, but must be the same.
    settings["model"] = repr(ModelConfig.from_folder(Path(job.folder)))
    del settings["tokenizer"]
    store.set(f"settings/{rank}", json.dumps(settings, default=str, sort_keys=True))
    try:
        every = [read_json(store.get(f"settings/{other}")) for other in range(size)]
    except dist.DistStoreError as error:
        raise RankFailure(
            f"not all of {size} ranks came within {MEETING_TIMEOUT.seconds} s. Every rank's script "
            "must call LLM(...), and can do so once: ranks above 0 end with their first engine"
        ) from error
    first = every[0]
    for other, theirs in enumerate(every):
        for name in sorted(first.keys() | theirs.keys()):
            if first.get(name) != theirs.get(name):
                raise ValueError(
                    f"rank {other} was given {name}={theirs.get(name)!r}, and rank 0 "
                    f"{first.get(name)!r}; start all ranks with the same script and settings"
                )
    # Nobody may go on, and end the store, before everybody has read.
    store.add("settings/read", 1)
    until = time.monotonic() + 5.0
    while rank == 0 and store.add("settings/read", 0) < size and time.monotonic() < until:
        time.sleep(0.01)


def accept_ranks(
    listener: Listener,
    links: dict[int, Link],
    secret: str,
    size: int,
    processes: dict[int, subprocess.Popen[bytes]],
) -> None:
    """Wait until every other rank has come."""
    until = time.monotonic() + 2 * CONNECT_SECONDS
    while len(links) < size - 1:
        for rank, process in processes.items():
            if rank not in links and process.poll() is not None:
                raise RankFailure(
                    f"tensor parallel rank {rank} of {size} died while it started, with exit code "
                    f"{process.returncode}; what it has printed says why"
                )
        if time.monotonic() > until:
            missing = ", ".join(str(rank) for rank in range(1, size) if rank not in links)
            raise RankFailure(
                f"tensor parallel rank {missing} of {size} did not come within "
                f"{2 * CONNECT_SECONDS:.0f} s"
            )
        came = listener.accept(secret, size, 0.2)
        if came is not None:
            links[came[0]] = came[1]
