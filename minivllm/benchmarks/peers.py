"""Other engines on our workload, if they are installed: each in a process of its own.

Its memory, and whatever it sets globally, ends with the process. The parent writes a job file and
starts ``python -m minivllm.benchmarks.peer_process NAME JOB RESULT``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minivllm.benchmarks.peer_process import BATCH, Job
from minivllm.benchmarks.workload import Workload
from minivllm.models.hub import EMBEDDED_MODEL

MODULE = "minivllm.benchmarks.peer_process"
TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Peer:
    """name: what to call it; module: what must be importable; package: what has the version.

    part: how many requests it runs, None for all; how: what is particular about its run.
    """

    name: str
    module: str
    package: str
    part: int | None
    how: str


PEERS = {
    peer.name: peer
    for peer in (
        Peer("vllm", "vllm", "vllm", None, "all requests at once"),
        Peer("nano-vllm", "nanovllm", "nano-vllm", None, "all requests at once"),
        # A thousand tokens a second on a large GPU: the whole workload would take minutes.
        Peer(
            "transformers", "transformers", "transformers", 64, f"batches of {BATCH}, padded left"
        ),
    )
}


def run_peers(
    workload: Workload, *, folder: Path, dummy: bool, dtype: str, device: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Run every peer on the workload, or on its part; what is not installed says so.

    Returns for each either ``skipped`` or ``failed``, one line, or its rounds (seconds and output
    tokens a second), the seconds until it was ready, its version and how many requests it served.
    """
    results = {}
    for peer in PEERS.values():
        count = min(peer.part or len(workload.prompts), len(workload.prompts))
        part = Workload(workload.prompts[:count], workload.max_tokens[:count])
        results[peer.name] = _run_peer(
            peer, part, folder=folder, dummy=dummy, dtype=dtype, device=device, rounds=rounds
        )
        print(describe(peer.name, results[peer.name]), flush=True)
    return results


def describe(name: str, result: dict[str, Any]) -> str:
    """One line on a peer's result."""
    if "skipped" in result:
        return f"{name}: skipped, {result['skipped']}"
    if "failed" in result:
        return f"{name}: FAILED, {result['failed']}"
    return (
        f"{name} {result['version']}: {result['output_tokens_per_s']:,.0f} output tokens/s on "
        f"{result['requests']} requests ({result['how']})"
    )


def _run_peer(
    peer: Peer,
    part: Workload,
    *,
    folder: Path,
    dummy: bool,
    dtype: str,
    device: str,
    rounds: int,
) -> dict[str, Any]:
    if find_spec(peer.module) is None:
        return {"skipped": f"{peer.package} is not installed"}
    with TemporaryDirectory(prefix="minivllm-peer-") as temporary:
        job = Job(
            folder=str(_with_tokenizer(folder, Path(temporary) / "model")),
            dummy=dummy,
            dtype=dtype,
            device=device,
            prompts=part.prompts,
            max_tokens=part.max_tokens,
            rounds=rounds,
            max_len=max(
                len(prompt) + count
                for prompt, count in zip(part.prompts, part.max_tokens, strict=True)
            ),
        )
        job_file, result_file = Path(temporary) / "job.json", Path(temporary) / "result.json"
        job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "minivllm.benchmarks.peer_process",
            peer.name,
            str(job_file),
            str(result_file),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {TIMEOUT_S:.0f} s"}
        if done.returncode or not result_file.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return {"failed": lines[-1].strip()[:200] if lines else "without a message"}
        found = json.loads(result_file.read_text(encoding="utf-8"))
    tokens = part.num_output_tokens
    rates = [tokens / seconds for seconds in found["seconds"]]
    return {
        "version": _version(peer.package),
        "how": peer.how,
        "requests": len(part.prompts),
        "output_tokens": tokens,
        "ready_seconds": found["ready_seconds"],
        "seconds": found["seconds"],
        "first_output_tokens_per_s": rates[0],
        "output_tokens_per_s": sorted(rates)[len(rates) // 2],
    }


def _with_tokenizer(folder: Path, copy: Path) -> Path:
    """A folder with the model's files and, should there be none, the embedded model's tokenizer.

    Prompts are token ids, so any tokenizer will do; but some peers do not start without one.
    """
    if (folder / "tokenizer.json").exists():
        return folder
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_MODEL / name, copy / name)
    return copy


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(unknown version)"
