"""Starts the ranks of an engine, or finds those that torchrun has started.

On one host, rank 0 is the process in which ``LLM(tensor_parallel_size=P)`` was called, and starts
the others. Under torchrun, which has started all of them, everybody calls ``LLM(...)``::

    # torchrun --nproc-per-node 2 script.py
    from minivllm import LLM

    if __name__ == "__main__":
        with LLM("folder", tensor_parallel_size=2) as llm:  # other ranks stay in here ...
            print(llm.generate("Hello"))  # ... so only rank 0 comes here

On rank 0 ``LLM(...)`` returns, on the others it serves until rank 0 shuts the engine down, and then
ends the process (``SystemExit``).

Ports are the system's choice and every engine has its own, so engines do not meet.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from minivllm.distributed.channel import Link, Listener, connect, read_json
from minivllm.distributed.group import MEETING_TIMEOUT
from minivllm.distributed.meeting import Place, accept_ranks, agree, find_store
from minivllm.distributed.parallel_layers import share_of
from minivllm.distributed.ranks import Ranks
from minivllm.distributed.worker import Job, serve
from minivllm.models.config import ModelConfig


def assemble(job: Job, size: int) -> Ranks:
    """Bring P = ``size`` ranks together. Returns on rank 0; on the others serves, then exits.

    Raises ValueError, on every rank, if the ranks do not fit the model, the machine or each other.
    """
    share_of(ModelConfig.from_folder(Path(job.folder)), size)
    place = Place.here(size)
    if job.device == "cuda":
        here = int(os.environ["LOCAL_WORLD_SIZE"]) if place.started else size
        count = torch.cuda.device_count()
        if here > count:
            raise ValueError(
                f"tensor_parallel_size={size} needs {here} GPUs on this host, which has {count}; "
                "lower it, or start ranks on several hosts with torchrun"
            )
    return _meet(job, size, place) if place.started else _spawn(job, size)


def _spawn(job: Job, size: int) -> Ranks:
    """Start the other ranks on this host."""
    secret = secrets.token_hex(16)
    listener = Listener(local=True)
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=MEETING_TIMEOUT
    )
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    processes: dict[int, subprocess.Popen[bytes]] = {}
    links: dict[int, Link] = {}
    try:
        for rank in range(1, size):
            orders = {
                "rank": rank,
                "size": size,
                "port": listener.port,
                "secret": secret,
                "store_port": store.port,
                # Ranks on a CPU share its cores.
                "num_threads": max(1, torch.get_num_threads() // size),
                "job": asdict(job),
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "minivllm.distributed.worker"],
                stdin=subprocess.PIPE,
                env=environment,
            )
            processes[rank] = process
            # Not as an argument or a variable, which other users of the host could read.
            assert process.stdin is not None
            process.stdin.write(json.dumps(orders).encode() + b"\n")
            process.stdin.close()
        accept_ranks(listener, links, secret, size, processes)
        ranks = Ranks(job, size, links, processes)
    except BaseException:
        for process in processes.values():
            process.kill()
            process.wait()
        raise
    finally:
        listener.close()
    return _joined(ranks, store, local=True)


def _meet(job: Job, size: int, place: Place) -> Ranks:
    """Find the ranks that torchrun has started; all but rank 0 never return."""
    store = find_store(place)
    # The n-th engine of one rank meets the n-th engine of the others.
    number = store.add(f"minivllm/engines of rank {place.rank}", 1)
    store = dist.PrefixStore(f"minivllm/{number}", store)
    agree(job, store, place.rank, size)
    if place.rank != 0:
        meeting = read_json(store.get("channel"))
        address = "127.0.0.1" if place.local else os.environ.get("MASTER_ADDR", "127.0.0.1")
        link = connect(address, meeting["port"], place.rank, meeting["secret"])
        served = serve(
            job,
            store,
            link,
            rank=place.rank,
            size=size,
            local_rank=place.local_rank,
            local=place.local,
        )
        raise SystemExit(0 if served else 1)
    secret, links = secrets.token_hex(16), {}
    listener = Listener(local=place.local)
    try:
        store.set("channel", json.dumps({"port": listener.port, "secret": secret}))
        accept_ranks(listener, links, secret, size, {})
    finally:
        listener.close()
    return _joined(Ranks(job, size, links, {}), store, local=place.local)


def _joined(ranks: Ranks, store: dist.Store, *, local: bool) -> Ranks:
    try:
        ranks.join(store, local=local)
    except BaseException:
        ranks.close()
        raise
    return ranks
