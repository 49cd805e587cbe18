"""The runner that a GPU gets, with its kernels, in Triton's interpreter, against the plain engine.

Recorded steps are run anew at each replay. Kernels that need a Hopper GPU have simpler stand-ins
here, as on any other GPU.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
if torch.cuda.is_available():
    pytest.skip("a GPU runs the real thing, see test_engine_invariance", allow_module_level=True)

from engine_helpers import drain, make_checkpoint

from minivllm import LLMEngine, SamplingParams
from minivllm.engine import folded_forward, graph_runner, prompt_graphs, step_forms
from minivllm.engine.config import EngineConfig
from minivllm.engine.cuda_graphs import NoRecorder
from minivllm.engine.graph_runner import GraphRunner
from minivllm.engine.prompt_graphs import WORK_OF_DECODES, PromptGraphs
from minivllm.engine.step_forms import choose_forms

PROMPTS = [[5, 6, 7], list(range(20, 41)), [9] * 17, [3]]


def use_kernels(patch: pytest.MonkeyPatch) -> None:
    """What a GPU gets for bfloat16, but without the chain of small batches."""
    gpu = torch.device("cuda")
    patch.setattr(graph_runner, "choose_forms", lambda model, _: choose_forms(model, gpu))
    patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    patch.setattr(folded_forward, "can_fold", lambda _: True)
    patch.setattr(step_forms, "skinny_places", lambda *_: 0)


class InterpretedRunner(GraphRunner):
    """With prompt graphs, and the rehearsal of all kernels, though there is no GPU."""

    def _reserve(self, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> None:
        super()._reserve(config, max_model_len, dtype)
        self.eager = False
        self.used = 0
        self.prompts = PromptGraphs(
            self._prompt,
            NoRecorder(),
            max_tokens=config.max_num_batched_tokens,
            max_seqs=config.max_num_seqs,
            max_blocks=self.rows.block_tables.shape[1],
            context_of_decodes=WORK_OF_DECODES // 64,
            vocab_size=self.vocab_size,
            dtype=dtype,
            device=self.device,
        )

    def _record_graphs(self) -> Any:
        before = [x.clone() for x in (self.rows.flat, self.cache.k, self.cache.v)]
        self._rehearse()
        after = (self.rows.flat, self.cache.k, self.cache.v)
        # The rehearsal sets the first word, a seed, to zero, which it is at the start.
        assert all(map(torch.equal, before, after)), "the rehearsal left traces"
        self.ladder.record()
        self.prompts.ladder.record()

    def _run_batch(self, message: Any) -> Any:
        self.used += self.prompts.fits(message.batch)
        return super()._run_batch(message)


class InterpretedEngine(LLMEngine):
    def make_runner(self, model: Any, dtype: torch.dtype, device: torch.device) -> Any:
        return self._build(InterpretedRunner, model, dtype, device)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("kernels") / "model")


def test_the_kernels_runner_answers_as_the_plain_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch)
    monkeypatch.setattr(prompt_graphs, "TOKENS", (16, 24, 32))
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 32,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 24,
        "num_kv_blocks": 8,
        "block_size": 16,
        "policy": "mixed",
    }
    params = [
        SamplingParams(max_tokens=3 + index % 2, temperature=0.8 * (index % 2), seed=index)
        for index in range(len(PROMPTS))
    ]
    found = []
    for engine_class, backend in ((LLMEngine, "torch"), (InterpretedEngine, "triton")):
        engine = engine_class(**settings, attention_backend=backend)
        for index, (prompt, each) in enumerate(zip(PROMPTS, params, strict=True)):
            engine.add_request(str(index), prompt, each)
        outputs = drain(engine)
        found.append([outputs[str(i)].outputs[0].token_ids for i in range(len(PROMPTS))])
        if engine_class is InterpretedEngine:
            assert engine.runner.used > 2, "steps with prompts ran from graphs"
        engine.shutdown()
    assert found[0] == found[1]
