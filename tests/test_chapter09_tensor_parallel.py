"""Chapter 9: a model shared out to ranks computes what one rank does.

Ranks here are threads of this process, see chapters/chapter09_tensor_parallelism/threads.py.
"""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_prompt, save_checkpoint, tiny_llama, tiny_qwen3

from chapters.chapter09_tensor_parallelism.threads import Meeting, ThreadGroup, on_ranks
from minivllm.distributed.channel import STEP, Link, Listener, connect
from minivllm.distributed.group import Group
from minivllm.distributed.loading import load_share, random_share
from minivllm.distributed.meeting import Place
from minivllm.distributed.parallel_layers import share_of, vocabulary_of
from minivllm.distributed.runner import interrupts_later
from minivllm.distributed.sampling import GatheringSampler, Vocabulary
from minivllm.engine.step_message import StepMessage
from minivllm.layers.sampler import Sampler, SamplingTensors
from minivllm.models.config import ModelConfig
from minivllm.models.generate import borrowed_attention
from minivllm.models.loader import Checkpoint, checkpoint_sources, load_model, random_model

FLOAT = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of every kind that has to be cut in its own way."""
    base = tmp_path_factory.mktemp("models")
    eight = {"num_attention_heads": 8}
    models = {
        "8 KV heads": tiny_qwen3(**eight, num_key_value_heads=8),
        "2 KV heads": tiny_qwen3(**eight, num_key_value_heads=2),
        "untied, biases": tiny_qwen3(
            **eight, tie_word_embeddings=False, attention_bias=True, vocab_size=157
        ),
        "Llama": tiny_llama(**eight, tie_word_embeddings=False),
    }
    # One of them in several files.
    return {
        name: save_checkpoint(model, base / name, sharded=name == "8 KV heads")
        for name, model in models.items()
    }


def whole_logits(
    folder: Path, token_ids: list[int], size: int
) -> tuple[list[torch.Tensor], Meeting]:
    """Every rank's logits [T, V] of one sequence, gathered."""
    config = ModelConfig.from_folder(folder)
    ids = torch.tensor(token_ids)

    def work(group: Group) -> torch.Tensor:
        model = load_share(folder, config, group, **FLOAT)
        attend = borrowed_attention(config.head_size**-0.5)
        local = model.compute_logits(model(ids, torch.arange(len(ids)), attend))
        owned = vocabulary_of(config, group.rank, group.size)
        return Vocabulary(owned, config.vocab_size, group).gather(local)

    return on_ranks(size, work)


# ---------------------------------------------------------------------- layers and loading


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["8 KV heads", "2 KV heads", "untied, biases", "Llama"])
def test_shares_compute_what_the_whole_model_does(
    folders: dict[str, Path], name: str, size: int
) -> None:
    folder = folders[name]
    model = load_model(folder, dtype=torch.float32)
    vocab_size = model.config.vocab_size
    prompt = [0, vocab_size - 1, *random_prompt(10, seed=1, vocab_size=vocab_size)]
    attend = borrowed_attention(model.config.head_size**-0.5)
    with torch.inference_mode():
        hidden = model(torch.tensor(prompt), torch.arange(len(prompt)), attend)
        expected = model.compute_logits(hidden)
    every, meeting = whole_logits(folder, prompt, size)
    for logits in every:
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits, every[0]), "ranks must have the very same logits"
    # Two for each layer, and one for the embedding.
    assert meeting.num_reductions == 2 * model.config.num_layers + 1


def test_each_byte_is_read_once_over_all_ranks(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sharded tensors, that is; norms are read by every rank."""
    read: dict[str, int] = {}
    fill = Checkpoint.fill

    def counting(self: Checkpoint, model: torch.nn.Module) -> None:
        for source in checkpoint_sources(model):
            part = self._files[source.name].get_slice(source.name)[source.index or ...]
            assert part.shape == source.target.shape, "nothing is read to be thrown away"
            read[source.name] = read.get(source.name, 0) + part.numel()
        fill(self, model)

    monkeypatch.setattr(Checkpoint, "fill", counting)
    folder = folders["8 KV heads"]
    config = ModelConfig.from_folder(folder)
    on_ranks(4, lambda group: load_share(folder, config, group, **FLOAT) and None)
    sizes = {s.name: s.target.numel() for s in checkpoint_sources(load_model(folder))}
    norms = {name for name in sizes if name.endswith("norm.weight")}
    for name, numel in sizes.items():
        # The last call to load_model counted too: one whole model.
        assert read[name] - numel == (4 * numel if name in norms else numel), name


def test_random_shares_are_slices_of_the_random_model(folders: dict[str, Path]) -> None:
    for name in ("2 KV heads", "untied, biases"):
        config = ModelConfig.from_folder(folders[name])
        whole = random_model(config, dtype=torch.float32)
        expected = {s.name: s.target for s in checkpoint_sources(whole)}

        def work(group: Group, config: ModelConfig = config) -> Any:
            return random_share(config, group, **FLOAT)

        for share in on_ranks(2, work)[0]:
            assert len(list(checkpoint_sources(share))) == len(expected)
            for source in checkpoint_sources(share):
                assert torch.equal(source.target, expected[source.name][source.index or ...])


def test_a_checkpoint_of_the_wrong_shape_is_refused(folders: dict[str, Path]) -> None:
    config = ModelConfig.from_folder(folders["8 KV heads"])
    wrong = replace(config, intermediate_size=2 * config.intermediate_size)
    with pytest.raises(ValueError, match=r"wrong shape: .*down_proj.weight is \[48, 112\]"):
        on_ranks(2, lambda group: load_share(folders["8 KV heads"], wrong, group, **FLOAT))


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, "tensor_parallel_size=3 does not divide the model's num_heads=8"),
        ({"intermediate_size": 111}, 2, "does not divide the model's intermediate_size=111"),
        ({"num_heads": 12, "num_kv_heads": 6}, 4, "num_kv_heads=6: one must divide the other"),
        ({"vocab_size": 9}, 8, "leaves the last rank nothing of the model's vocab_size=9"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    folders: dict[str, Path], changes: dict[str, int], size: int, message: str
) -> None:
    config = replace(ModelConfig.from_folder(folders["2 KV heads"]), **changes)
    with pytest.raises(ValueError, match=message):
        share_of(config, size)


# ---------------------------------------------------------------------- sampling


def draws(rows: int) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.tensor([0.0, 0.7, 1.3] * rows)[:rows],
        seed=torch.arange(rows) * 977 + (1 << 40),
        step=torch.arange(rows) % 5,
    )


@pytest.mark.parametrize(("vocab_size", "size"), [(160, 2), (157, 4), (9, 3)])
def test_sampling_from_shards_draws_the_same_tokens(vocab_size: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, vocab_size, generator=generator)
    logits[:6] = logits[:6].round()  # ties, over the borders of shares too
    logits[6] = 1.0
    params = draws(len(logits))
    filtered = replace(
        params, top_k=torch.full((60,), vocab_size // 2), top_p=torch.full((60,), 0.8)
    )
    share = -(-vocab_size // size)
    padded = torch.full((60, share * size), float("nan"))
    padded[:, :vocab_size] = logits

    def work(group: Group) -> list[torch.Tensor]:
        first = group.rank * share
        vocabulary = Vocabulary(range(first, min(first + share, vocab_size)), vocab_size, group)
        local = padded[:, first : first + share]
        tokens = torch.empty(60, dtype=torch.int64)
        vocabulary.sample(local, params, tokens, vocabulary.find_best)
        return [tokens, GatheringSampler(vocabulary)(local, filtered)]

    for tokens, after_filters in on_ranks(size, work)[0]:
        assert torch.equal(tokens, Sampler()(logits, params))
        assert torch.equal(after_filters, Sampler()(logits, filtered))


def test_the_kernel_scores_a_part_of_a_row_as_the_whole() -> None:
    pytest.importorskip("triton")
    from minivllm.attention.paged_triton import triton_runs_on

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not triton_runs_on(device):
        pytest.skip("Triton runs neither compiled nor interpreted here")
    from minivllm.engine.sampler_kernels import sample

    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(1)).to(device)
    one = draws(3)
    draw = tuple(x.to(device) for x in (one.temperature, one.seed, one.step))
    expected = sample(logits, *draw)
    scores = torch.empty(2, 3, device=device)
    tokens = [
        sample(logits[:, :300], *draw, score=scores[0]),
        sample(logits[:, 300:], *draw, first_token=300, score=scores[1]),
    ]
    best = torch.where(scores[0] >= scores[1], tokens[0], tokens[1])
    assert best.tolist() == expected.tolist()
    assert min(tokens[1].tolist()) >= 300
    with pytest.raises(ValueError, match=r"score is .*give float32 \[3\]"):
        sample(logits, *draw, score=scores)


# ---------------------------------------------------------------------- messages


def test_a_step_of_256_sequences_is_a_few_kilobytes() -> None:
    updates = [(10_000 + 300 * row, 70_000 + row) for row in range(64)]  # every 4th gets a block
    message = StepMessage(updates=updates, places=list(range(256)))
    data = message.encode()
    assert len(data) < 4096
    assert StepMessage.decode(data) == message
    assert len(StepMessage(places=list(range(256))).encode()) < 2048, "most steps need no block"


def test_links_carry_frames_to_those_who_know_the_secret() -> None:
    listener = Listener(local=True)
    other: list[Link] = []
    try:
        for secret in ("wrong", "right"):
            thread = threading.Thread(
                target=lambda s=secret: other.append(connect("127.0.0.1", listener.port, 1, s))
            )
            thread.start()
            came = listener.accept("right", 2, 5.0)
            thread.join()
            assert (came is not None) == (secret == "right")
        assert came is not None and came[0] == 1
        link = came[1]
        payload = os.urandom(100_000)
        sender = threading.Thread(target=lambda: link.send(STEP, payload))
        sender.start()
        assert other[1].receive() == (STEP, payload)
        sender.join()
        assert other[0].receive() is None, "a stranger is turned away"
        link.close()
        assert other[1].receive() is None
    finally:
        listener.close()
        for each in other:
            each.close()


def test_an_interrupt_waits_for_the_end_of_a_step() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_later():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append(True)
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_torchrun_must_have_started_as_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place.here(4) == Place()
    for name, value in (("RANK", 5), ("LOCAL_RANK", 1), ("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "1")
    assert Place.here(8) == Place(5, 1, started=True, local=False)
    with pytest.raises(ValueError, match="tensor_parallel_size=4, but torchrun has started 8"):
        Place.here(4)


# ---------------------------------------------------------------------- the chain of small batches

SMALL = ModelConfig.from_hf(
    {
        **{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 32, "hidden_size": 32},
        **{"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 64},
        **{"tie_word_embeddings": True},
    }
)


@pytest.mark.parametrize(
    ("rows", "most_bytes", "late"), [(1, 0, False), (2, 1 << 16, False), (1, 1 << 16, True)]
)
def test_the_chain_of_small_batches_lets_the_group_add_up(
    rows: int, most_bytes: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of one that counts: where the chain asks for sums, it also uses them.

    late: norms are divided out by the products, as in bfloat16 for wide models.
    """
    pytest.importorskip("triton")
    from minivllm.attention.paged import PagedKVCache
    from minivllm.attention.paged_triton import triton_runs_on
    from minivllm.distributed import exchange
    from minivllm.distributed.parallel_layers import shard_model
    from minivllm.distributed.sharded_forms import SkinnyShard
    from minivllm.engine.skinny_forward import SkinnyForward

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not triton_runs_on(device):
        pytest.skip("Triton runs neither compiled nor interpreted here")
    monkeypatch.setattr(exchange, "MOST_BYTES_IN_PARTS", most_bytes)
    model = random_model(SMALL, dtype=torch.float32, device=device)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(20)
        layer.mlp.down_proj.weight.mul_(200)
    cache = PagedKVCache(SMALL, 4, 16, dtype=torch.float32, device=device)
    long = {"dtype": torch.int64, "device": device}
    step = (
        torch.tensor([7, 31][:rows], **long),
        torch.zeros(rows, **long),
        torch.tensor([0, 16][:rows], **long),
        torch.tensor([[0], [1]][:rows], dtype=torch.int32, device=device),
        torch.ones(rows, dtype=torch.int32, device=device),
    )
    expected = SkinnyForward(model, cache, rows)(*step).clone()
    meeting = Meeting(1)
    group = ThreadGroup(meeting, 0)
    shard_model(model, SMALL, group)
    forward = SkinnyShard(model, cache, rows, exchange=exchange.Exchange(group))
    forward.divides_late = late
    torch.testing.assert_close(forward(*step), expected, rtol=1e-5, atol=1e-5)
    assert meeting.num_reductions == 2 * SMALL.num_layers + 1
    monkeypatch.setattr(exchange.Exchange, "sum_parts", lambda self, parts: parts.zero_())
    assert not torch.allclose(forward(*step), expected, rtol=0.1)
