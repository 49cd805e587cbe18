"""A rank that is not 0: it loads its share, then executes what rank 0 sends, until told to go.

Three things end it: the word of rank 0, an error of its own, of which it tells rank 0 first, and
the end of the connection, at which it leaves whatever it is doing.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minivllm.distributed.channel import (
    FAILED,
    PING,
    PONG,
    QUIT,
    READY,
    STEP,
    Link,
    connect,
    write_json,
)
from minivllm.distributed.group import MEETING_TIMEOUT, CollectiveError, Group, TorchGroup
from minivllm.distributed.host_memory import peak_host_bytes
from minivllm.distributed.loading import load_share, random_share
from minivllm.distributed.parallel_layers import share_of, vocabulary_of
from minivllm.distributed.runner import Crew, TensorParallelRunner
from minivllm.distributed.sampling import Vocabulary
from minivllm.engine.config import EngineConfig
from minivllm.engine.outputs import RankStats
from minivllm.engine.step_message import StepMessage
from minivllm.models.config import DTYPES, ModelConfig


@dataclass(frozen=True)
class Job:
    """What every rank of an engine has to know; plain values, which JSON can hold.

    settings: those of :class:`EngineConfig`, with the block size of the device. folder: of the
    model. max_model_len: the engine's. dtype: a key of ``DTYPES``. device: "cpu" or "cuda".
    """

    settings: dict[str, Any]
    folder: str
    max_model_len: int
    dtype: str
    device: str

    def device_of(self, local_rank: int) -> torch.device:
        """The device of the rank that is the ``local_rank``-th on its host."""
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", local_rank)

    def load(self, group: Group, device: torch.device) -> torch.nn.Module:
        """This rank's share of the model."""
        dtype, folder = DTYPES[self.dtype], Path(self.folder)
        whole = ModelConfig.from_folder(folder)
        if self.settings["load_format"] == "dummy":
            return random_share(whole, group, dtype=dtype, device=device)
        return load_share(folder, whole, group, dtype=dtype, device=device)

    def make_runner(
        self,
        model: torch.nn.Module,
        group: Group,
        device: torch.device,
        crew: Crew | None = None,
    ) -> TensorParallelRunner:
        """This rank's runner; all ranks make theirs at the same time."""
        whole = ModelConfig.from_folder(Path(self.folder))
        owned = vocabulary_of(whole, group.rank, group.size)
        return TensorParallelRunner(
            model,
            EngineConfig(**self.settings),
            share_of(whole, group.size),
            vocabulary=Vocabulary(owned, whole.vocab_size, group),
            crew=crew,
            max_model_len=self.max_model_len,
            dtype=DTYPES[self.dtype],
            device=device,
        )


def stats_of(runner: TensorParallelRunner, load_seconds: float) -> RankStats:
    """What this rank has taken so far."""
    weights = {parameter.data_ptr(): parameter for parameter in runner.model.parameters()}
    exchange = runner.exchange
    return RankStats(
        rank=runner.vocabulary.group.rank,
        load_seconds=load_seconds,
        peak_host_bytes=peak_host_bytes(),
        weight_bytes=sum(parameter.nbytes for parameter in weights.values()),
        sums_by="collectives" if exchange is None else exchange.name,
    )


class Orders:
    """What rank 0 says, read by a thread of its own.

    So a rank that computes, or waits for others, still answers, and still sees rank 0 go.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.queue: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()
        self.leaving = False
        threading.Thread(target=self._read, name="minivllm orders", daemon=True).start()

    def _read(self) -> None:
        while (frame := self.link.receive()) is not None:
            if frame[0] == PING:
                self.link.send(PONG)
                continue
            self.leaving = self.leaving or frame[0] == QUIT
            self.queue.put(frame)
        if not self.leaving:
            # Rank 0 is gone, and the main thread may be waiting for it in a place that knows no
            # exceptions. Memory and devices are given back by the system.
            os._exit(1)


def serve(
    job: Job,
    store: dist.Store,
    link: Link,
    *,
    rank: int,
    size: int,
    local_rank: int,
    local: bool,
) -> bool:
    """Be a rank until rank 0 says otherwise; False if it ended in an error, which rank 0 knows."""
    orders = Orders(link)
    group: TorchGroup | None = None
    runner: TensorParallelRunner | None = None
    try:
        device = job.device_of(local_rank)
        if device.type == "cuda":
            # This process has no other business: what asks for "the" device means this one.
            torch.cuda.set_device(device)
        group = TorchGroup(store, rank, size, device, local=local)
        began = time.perf_counter()
        model = job.load(group, device)
        seconds = time.perf_counter() - began
        link.send(READY, write_json({"stage": "loaded"}))
        runner = job.make_runner(model, group, device)
        stats = asdict(stats_of(runner, seconds))
        link.send(READY, write_json({"stage": "built", "stats": stats}))
        while True:
            kind, payload = orders.queue.get()
            if kind == QUIT:
                return True
            assert kind == STEP
            runner.execute(StepMessage.decode(payload))
    except BaseException as error:
        orders.leaving = True
        report = {
            "kind": type(error).__name__,
            "text": traceback.format_exception_only(error)[-1].strip(),
            "user": isinstance(error, ValueError),
            "echo": isinstance(error, CollectiveError),
        }
        try:
            link.send(FAILED, write_json(report))
        except OSError:
            pass  # nobody is left to be told
        if not report["echo"]:
            traceback.print_exc()
        return False
    finally:
        if runner is not None:
            runner.close()
        if group is not None:
            group.abort()
        link.close()


def main() -> None:
    """A process that rank 0 has started; its standard input says where to report, in one line."""
    # Ctrl-C reaches all processes of a terminal. Rank 0 decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders = json.loads(sys.stdin.readline())
    rank, size = orders["rank"], orders["size"]
    torch.set_num_threads(orders["num_threads"])
    link = connect("127.0.0.1", orders["port"], rank, orders["secret"])
    store = dist.TCPStore("127.0.0.1", orders["store_port"], timeout=MEETING_TIMEOUT)
    served = serve(
        Job(**orders["job"]), store, link, rank=rank, size=size, local_rank=rank, local=True
    )
    sys.stderr.flush()
    # Threads of libraries that wait for other ranks must not keep a process.
    os._exit(0 if served else 1)


if __name__ == "__main__":
    main()
