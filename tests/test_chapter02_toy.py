"""Chapter 2 on its toy of 200 numbers: every task alone, whatever else is still blank.

Configs are written down here and weights copied by hand where a task does not need the others.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import oracle_greedy
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from chapters.chapter02_qwen3_model.toy import (
    CONFIG,
    END,
    LETTERS,
    fill_by_hand,
    spell,
    tensors,
    write_toy,
)
from minivllm.layers.checkpoint import CheckpointSource, new_parameter
from minivllm.layers.rotary_embedding import RopeScaling
from minivllm.models.config import ModelConfig
from minivllm.models.generate import borrowed_attention, generate_by_recomputing
from minivllm.models.hub import EMBEDDED_MODEL
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.loader import Checkpoint, checkpoint_sources, load_model
from minivllm.models.qwen3 import Qwen3ForCausalLM

TOY = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=6,
    hidden_size=4,
    intermediate_size=5,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_size=4,
    max_positions=16,
    rms_norm_eps=1e-6,
    rope_base=10000.0,
    rope_scaling=RopeScaling(),
    tie_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    dtype=torch.float32,
    eos_token_ids=(END,),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster without a second thread to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "toy")


@pytest.fixture
def toy() -> nn.Module:
    return fill_by_hand(Qwen3ForCausalLM(TOY), tensors())


# ---------------------------------------------------------------------------- config


def test_toy_config(folder: Path) -> None:
    found = ModelConfig.from_folder(folder)
    wrong = {
        field: (value, getattr(TOY, field))
        for field, value in vars(found).items()
        if value != getattr(TOY, field)
    }
    assert not wrong, f"field: (yours, expected) {wrong}"


def test_yarn_stretches_the_positions() -> None:
    """``max_position_embeddings`` may tell the context before YaRN or the longer one."""
    rope = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    for kind, told, positions in (("yarn", 16, 64), ("yarn", 80, 80), ("linear", 16, 16)):
        changes = {"rope_parameters": {**rope, "rope_type": kind}, "max_position_embeddings": told}
        found = ModelConfig.from_hf({**CONFIG, **changes}).max_positions
        assert found == positions, f"{kind} from 16 times 4, told {told}: max_positions is {found}"


# ---------------------------------------------------------------------------- loader


def test_sources_of_the_toy() -> None:
    model = Qwen3ForCausalLM(TOY)
    sources = {source.name: source for source in checkpoint_sources(model)}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    assert {name: source.shape for name, source in sources.items()} == expected
    # The targets are views of the parameters: q, k and v lie in one weight of 8 + 4 + 4 rows.
    qkv = model.model.layers[0].self_attn.qkv_proj.weight
    layer = "model.layers.0.self_attn"
    for part, row in (("q_proj", 0), ("k_proj", 8), ("v_proj", 12)):
        target = sources[f"{layer}.{part}.weight"].target
        assert target.data_ptr() == qkv[row].data_ptr(), f"{part} must go to row {row} of qkv_proj"


def test_toy_fills_10_parameters_from_13_tensors(folder: Path) -> None:
    model = load_model(folder, TOY)
    by_hand = fill_by_hand(Qwen3ForCausalLM(TOY), tensors())
    parameters = dict(model.named_parameters())
    for name, expected in by_hand.named_parameters():
        assert torch.equal(parameters[name], expected), f"{name} is {parameters[name].tolist()}"
    count = sum(parameter.numel() for parameter in parameters.values())
    assert (len(tensors()), len(parameters), count) == (13, 10, 200)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "the head is the embedding"


def test_check_fit_names_every_tensor_that_is_wrong(folder: Path) -> None:
    weights = tensors()
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(5, 4)
    weights["model.layers.0.mlp.down_proj.weight"] = torch.ones(5, 4)
    # Once more what the embedding is already, and a table that we compute ourselves: no mistake.
    weights["lm_head.weight"] = torch.ones(6, 4)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors")
    with Checkpoint(folder) as checkpoint, pytest.raises(ValueError) as caught:
        checkpoint.check_fit(Qwen3ForCausalLM(TOY, device="meta"))
    message = str(caught.value)
    for problem in (
        "missing: model.norm.weight",
        "left over: model.layers.1.mlp.up_proj.weight",
        "wrong shape: model.layers.0.mlp.down_proj.weight is [5, 4], the config asks for [4, 5]",
    ):
        assert problem in message, f"the error does not say {problem!r}: {message}"
    named = re.findall(r"model\.(?!safetensors)[\w.]+|lm_head[\w.]+", message)
    assert len(named) == 3, f"the error names {named}"


def test_a_qwen3_checkpoint_does_not_fit_llama(folder: Path) -> None:
    """Llama has no norms of q and k: two of the 13 tensors are left over."""
    with Checkpoint(folder) as checkpoint, pytest.raises(ValueError) as caught:
        checkpoint.check_fit(LlamaForCausalLM(TOY, device="meta"))
    layer = "model.layers.0.self_attn"
    expected = f"left over: {layer}.k_norm.weight, {layer}.q_norm.weight"
    assert expected in str(caught.value), f"the error does not say {expected!r}: {caught.value}"


class MiddleRows(nn.Module):
    """A layer that wants rows 2 and 3 of the embedding, as a shard in chapter 9 will."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = new_parameter(2, 4, dtype=torch.float32, device="cpu")

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        index = (slice(2, 4),)
        yield CheckpointSource("model.embed_tokens.weight", (6, 4), self.weight, index)


def test_fill_copies_the_slice_that_is_asked_for(folder: Path) -> None:
    model = nn.Sequential(MiddleRows())
    with Checkpoint(folder) as checkpoint:
        checkpoint.fill(model)
    expected = tensors()["model.embed_tokens.weight"][2:4]
    assert torch.equal(model[0].weight, expected), f"rows 2 and 3 are {expected.tolist()}"


# ---------------------------------------------------------------------------- forward


def what_each_part_adds(model: nn.Module, letters: str) -> dict[str, torch.Tensor]:
    """The embedding, what attention and MLP return, and the last hidden states: [T, E] each."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _module, _args, out: seen.update({name: out}))

    note("embedding", model.model.embed_tokens)
    note("attention", model.model.layers[0].self_attn)
    note("mlp", model.model.layers[0].mlp)
    token_ids = torch.tensor([LETTERS.index(letter) for letter in letters])
    positions = torch.arange(len(token_ids))
    with torch.inference_mode():
        seen["hidden"] = model(token_ids, positions, borrowed_attention(4**-0.5))
    return seen


def assert_close(what: str, found: torch.Tensor, expected: list[float], within: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float32)
    close = torch.allclose(found, wanted, rtol=0, atol=within)
    numbers = [round(number, 3) for number in expected]
    assert close, f"{what} is {[round(x, 3) for x in found.tolist()]}, expected {numbers}"


def test_toy_residual_stream(toy: nn.Module) -> None:
    """The numbers of the chapter's table: token b, the last of ``?ab``."""
    seen = what_each_part_adds(toy, "?ab")
    embedding, attention, mlp = (seen[name][-1] for name in ("embedding", "attention", "mlp"))
    assert_close("the embedding of b", embedding, [0, 2, 0, 0], 1e-6)
    # Half the mean of ?, a and b.
    sixth = 1 / 6
    assert_close("what attention adds", attention, [sixth, sixth, -sixth, -sixth], 1e-5)
    assert_close("what the MLP adds", mlp, [0, -1.95, 1.96, 0], 0.01)
    total = embedding + attention + mlp
    assert_close("their sum", total, [0.17, 0.21, 1.80, -0.16], 0.01)
    hidden = (total / total.square().mean().sqrt()).tolist()
    assert_close("the last hidden state, their sum normed,", seen["hidden"][-1], hidden, 1e-4)


# ---------------------------------------------------------------------------- generation


class Adder(nn.Module):
    """A model whose next token is the sum of all tokens so far, modulo 10: it needs every one."""

    def __init__(self, *end_tokens: int) -> None:
        super().__init__()
        self.config = ModelConfig(**{**vars(TOY), "vocab_size": 10, "eos_token_ids": end_tokens})
        self.lm_head = nn.Linear(1, 10, bias=False)
        self.calls: list[tuple[list[int], list[int]]] = []

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: object) -> object:
        self.calls.append((input_ids.tolist(), positions.tolist()))
        return input_ids.cumsum(0)[:, None].float()

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(hidden[:, 0].long() % 10, 10).float()


def test_every_step_runs_the_whole_sequence_again() -> None:
    model = Adder()
    assert list(generate_by_recomputing(model, [1, 2], 4)) == [3, 6, 2, 4]
    runs = [[1, 2], [1, 2, 3], [1, 2, 3, 6], [1, 2, 3, 6, 2]]
    expected = [(run, list(range(len(run)))) for run in runs]
    assert model.calls == expected, f"the model was called with (tokens, positions) {model.calls}"


def test_an_end_token_is_yielded_and_then_no_more() -> None:
    assert list(generate_by_recomputing(Adder(2, 6), [1, 2], 9)) == [3, 6]
    assert list(generate_by_recomputing(Adder(6), [6, 1], 2)) == [7, 4], (
        "an end token in the prompt ends nothing"
    )
    assert list(generate_by_recomputing(Adder(), [1], 0)) == [], "max_tokens may be 0"


def test_a_request_that_cannot_be_answered_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_token_ids"):
        list(generate_by_recomputing(Adder(), [], 1))
    # 16 positions: the last token is yielded without going through the model.
    assert len(list(generate_by_recomputing(Adder(), [1] * 12, 5))) == 5
    with pytest.raises(ValueError, match=r"12 tokens.* max_tokens=6 need 17 .* model has 16"):
        list(generate_by_recomputing(Adder(), [1] * 12, 6))


def test_a_token_comes_before_the_next_is_computed() -> None:
    model = Adder()
    answer = generate_by_recomputing(model, [1, 2], 4)
    assert next(answer) == 3
    assert len(model.calls) == 1, f"one token asked for, but the model ran {len(model.calls)} times"


def test_toy_says_abcd(toy: nn.Module) -> None:
    question = LETTERS.index("?")
    answer = generate_by_recomputing(toy, [question], 12)
    lengths: list[int] = []
    embedding = toy.model.embed_tokens
    embedding.register_forward_hook(lambda _module, args, _out: lengths.append(len(args[0])))
    assert spell(list(answer)) == "abcd."
    assert lengths == [1, 2, 3, 4, 5], f"step k runs all k tokens again, but they ran {lengths}"


def test_embedded_model_answers_as_in_transformers() -> None:
    """Text on the screen: the greedy answer of the trained model, to the last token."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    chat = [{"role": "user", "content": "what is a block table?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    prompt = prompt["input_ids"]
    model = load_model(EMBEDDED_MODEL, dtype=torch.float32)
    tokens = list(generate_by_recomputing(model, prompt, 80))
    theirs = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    assert tokens == oracle_greedy(theirs, [prompt], 80)[0]
    assert tokens[-1] in model.config.eos_token_ids, "the answer does not come to its end"
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "block" in text, f"the answer is {text!r}"
