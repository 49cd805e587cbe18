"""Chapter 3's naive Triton kernel: values against float64, counts from the recorder.

On a machine without a GPU the kernel runs in Triton's interpreter.
"""

import contextlib
import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from helpers import oracle_logits, random_prompt, relative_error, save_checkpoint, tiny_qwen3

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from minivllm.attention import naive_kernels  # noqa: E402
from minivllm.models.loader import load_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "notebooks")) if path not in sys.path]
toy = importlib.import_module("chapters.chapter03_naive_attention.toy")
Recorder = importlib.import_module("recorder").Recorder

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the recorder needs the interpreter")


def boundaries(lengths: list[int]) -> torch.Tensor:
    """Lengths -> cu_seqlens [B + 1] int32."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(DEVICE, torch.int32)


def random_qkv(
    tokens: int, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = num_heads, num_kv_heads, num_kv_heads
    return tuple(
        torch.randn(tokens, count, head_size, generator=generator).to(DEVICE, dtype)
        for count in heads
    )


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float
) -> torch.Tensor:
    """The definition in float64, one sequence and one head after the other."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        start += length
        unseen = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        for head in range(q.shape[1]):
            scores = q[span, head] @ k[span, head // group].T * scale
            weights = scores.masked_fill(unseen, float("-inf")).softmax(dim=-1)
            out[span, head] = weights @ v[span, head // group]
    return out


def by_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float
) -> torch.Tensor:
    # A mask that is missing lets a kernel write where it must not: the recorder stops it first.
    with Recorder(register_arguments=True) if INTERPRETED else contextlib.nullcontext():
        out = naive_kernels.naive_attention_triton(
            q, k, v, boundaries(lengths), scale=scale, max_seqlen=max(lengths, default=0)
        )
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    return out


def assert_close(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    missing = int(ours.isnan().sum())
    assert not missing, f"{what}: {missing} of {ours.numel()} numbers are NaN"
    error = (ours.double() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(ours.dtype).eps, f"{what}: the relative error is {error:.2g}"


def test_naive_kernel_on_the_toy() -> None:
    """4 tokens and 2 tokens end to end; every result is a whole number."""
    q, k, v, expected = (tensor[toy.BATCH].to(DEVICE) for tensor in (toy.Q, toy.K, toy.V, toy.OUT))
    out = by_kernel(q, k, v, [4, 2], toy.SCALE)
    for head in range(4):
        ours, right = out[:, head].round(decimals=3), expected[:, head]
        assert torch.equal(ours, right), (
            f"the output of query head {head}\nis        {ours.tolist()},\n"
            f"should be {right.tolist()}"
        )


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_naive_kernel(length: int) -> None:
    """Lengths around the 16 rows of a program."""
    q, k, v = random_qkv(length, 2, 2, 16, torch.float32, seed=length)
    expected = exact_attention(q, k, v, [length], 0.25)
    assert_close(by_kernel(q, k, v, [length], 0.25), expected, f"a sequence of {length} tokens")


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (3, 1)])
def test_naive_kernel_grouped_query(num_heads: int, num_kv_heads: int) -> None:
    q, k, v = random_qkv(9, num_heads, num_kv_heads, 16, torch.float32, seed=1)
    out, expected = by_kernel(q, k, v, [9], 0.3), exact_attention(q, k, v, [9], 0.3)
    for head in range(num_heads):
        assert_close(
            out[:, head],
            expected[:, head],
            f"query head {head}, which reads KV head {head * num_kv_heads // num_heads}",
        )


@pytest.mark.parametrize("head_size", [2, 24, 64, 80])
def test_naive_kernel_of_any_head_size(head_size: int) -> None:
    q, k, v = random_qkv(5, 1, 1, head_size, torch.float32, seed=2)
    expected = exact_attention(q, k, v, [5], 0.3)
    assert_close(by_kernel(q, k, v, [5], 0.3), expected, f"head size {head_size}")


def test_naive_kernel_of_many_sequences() -> None:
    lengths = [4, 20, 0, 1, 7]
    q, k, v = random_qkv(32, 2, 1, 16, torch.float32, seed=3)
    out, expected = by_kernel(q, k, v, lengths, 0.25), exact_attention(q, k, v, lengths, 0.25)
    start = 0
    for length in lengths:
        if length:
            rows = slice(start, start + length)
            what = f"the sequence of {length} tokens that begins at token {start}"
            assert_close(out[rows], expected[rows], what)
        start += length


def test_naive_kernel_in_half_precision() -> None:
    q, k, v = random_qkv(20, 2, 1, 16, torch.float16, seed=4)
    expected = exact_attention(q, k, v, [20], 0.25)
    assert_close(by_kernel(q, k, v, [20], 0.25), expected, "float16")


def test_naive_kernel_survives_large_scores() -> None:
    """A softmax that does not subtract the maximum overflows here."""
    q, k, v = random_qkv(6, 1, 1, 16, torch.float32, seed=5)
    out = by_kernel(30 * q, 30 * k, v, [6], 1.0)
    assert out.isfinite().all(), "exp of a large score overflows: subtract the row's maximum first"
    assert relative_error(out, exact_attention(30 * q, 30 * k, v, [6], 1.0)) < 1e-4


def test_naive_kernel_of_views() -> None:
    """q, k and v as the fused projection leaves them: side by side in one tensor."""
    qkv = torch.randn(10, 4 + 2 + 2, 16, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    q, k, v = qkv.split((4, 2, 2), dim=1)
    assert not q.is_contiguous()
    expected = exact_attention(q, k, v, [3, 7], 0.25)
    assert_close(by_kernel(q, k, v, [3, 7], 0.25), expected, "views with gaps")


@pytest.mark.filterwarnings("ignore:invalid value")
def test_naive_kernel_lets_no_neighbour_in() -> None:
    """NaN in every token of the other sequences, and in other tensors' share of the memory."""
    memory = torch.full((14, 2, 16), float("nan"), device=DEVICE)
    q, k, v = random_qkv(5, 1, 1, 16, torch.float32, seed=7)
    memory[4:9, :1] = v
    values = memory[:, :1]
    queries, keys = torch.full_like(values, float("nan")), torch.full_like(values, float("nan"))
    queries[4:9], keys[4:9] = q, k
    out = by_kernel(queries, keys, values, [4, 5, 5], 0.25)[4:9]
    assert_close(out, exact_attention(q, k, v, [5], 0.25), "the sequence between two others")


@torch.inference_mode()
def test_model_on_the_naive_kernel_equals_transformers(tmp_path: Path) -> None:
    theirs = tiny_qwen3(seed=1)
    ours = load_model(save_checkpoint(theirs, tmp_path), device=DEVICE)
    prompts = [random_prompt(length, seed=length) for length in (5, 18)]
    cu_seqlens = boundaries([5, 18])

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return naive_kernels.naive_attention_triton(
            q, k, v, cu_seqlens, scale=ours.config.head_size**-0.5, max_seqlen=18
        )

    input_ids = torch.tensor([token for prompt in prompts for token in prompt], device=DEVICE)
    positions = torch.cat([torch.arange(5), torch.arange(18)]).to(DEVICE)
    logits = ours.compute_logits(ours(input_ids, positions, attend)).cpu()
    for prompt, mine in zip(prompts, logits.split((5, 18)), strict=True):
        error = relative_error(mine, oracle_logits(theirs, prompt))
        assert error < 1e-5, f"the sequence of {len(prompt)} tokens is off by {error:.2g}"


# ---------------------------------------------------------------------------- counts


LENGTHS = [40, 10]


@functools.cache
def recording() -> "Recorder":
    """40 and 10 tokens, 4 query heads on 2 KV heads: 3 and 1 blocks of 16 rows."""
    q, k, v = random_qkv(50, 4, 2, 16, torch.float32, seed=8)
    cu_seqlens = boundaries(LENGTHS)
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}
    with Recorder(tensors, register_arguments=True) as rec:
        naive_kernels.naive_attention_triton(q, k, v, cu_seqlens, scale=0.25, max_seqlen=40)
    return rec


@interpreted
def test_naive_kernel_reads_keys_once_for_each_row_block_and_query_head() -> None:
    """Every element of k and v: 3 row blocks times 2 query heads in the long sequence."""
    for name in ("k", "v"):
        times = recording().times_read(name)
        assert (times[:40] == 3 * 2).all() and (times[40:] == 1 * 2).all(), (
            f"an element of {name} should be read row blocks * H / G = 6 times in the sequence of "
            f"40 tokens and 2 times in that of 10, not {set(times.flatten().tolist())}"
        )
    assert (recording().times_read("q") == 1).all(), "every query should be read once"


@interpreted
def test_naive_kernel_stores_no_scores() -> None:
    assert {event.tensor for event in recording().select(kind="store")} == {"out_ptr"}
    assert (recording().times_written("out_ptr") == 1).all(), "every output should be written once"
    assert not recording().select("out_ptr", "load"), "an output is written, never read"


@interpreted
def test_naive_kernel_gives_each_program_its_rows() -> None:
    """Program (block, head, sequence) writes rows 16 * block to 16 * block + 15 of its head."""
    assert len(recording().programs) == 3 * 4 * 2
    for (block, head, seq), events in recording().stores_by_program("out_ptr").items():
        length, begin = LENGTHS[seq], sum(LENGTHS[:seq])
        rows = range(16 * block, min(16 * (block + 1), length))
        expected = {(begin + row, head) for row in rows}
        found = {
            (int(token), int(number))
            for event in events
            for token, number in zip(*event.index[:2], strict=True)
        }
        assert found == expected, f"program {(block, head, seq)} wrote {sorted(found)}"


# ---------------------------------------------------------------------------- what does not fit


def test_longest_sequence() -> None:
    """64 KB of keys: 256 of 128 numbers in bfloat16, 512 of 64, 128 in float32."""
    assert naive_kernels.longest_sequence(128, torch.bfloat16) == 256
    assert naive_kernels.longest_sequence(64, torch.float16) == 512
    assert naive_kernels.longest_sequence(128, torch.float32) == 128
    assert naive_kernels.longest_sequence(80, torch.float32) == 128, "80 is padded to 128"


def test_naive_kernel_refuses_long_sequences() -> None:
    q, k, v = (torch.zeros(129, 1, 128, device=DEVICE) for _ in range(3))
    with pytest.raises(ValueError, match=r"max_seqlen=129 is too long.*128.*flash attention"):
        by_kernel(q, k, v, [129], 1.0)


def test_naive_kernel_of_nothing() -> None:
    q, k, v = random_qkv(0, 2, 1, 16, torch.float32, seed=0)
    assert by_kernel(q, k, v, [], 1.0).shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 2)}, r"q has shape \(3, 2\)"),
        ({"q": torch.zeros(3, 3, 16)}, r"q has 3 heads.* 2 of k"),
        ({"q": torch.zeros(4, 4, 16)}, r"q has 4 tokens.* k and v have 3"),
        ({"q": torch.zeros(3, 4, 8)}, r"head size 8 but k and v have 3 of 16"),
        ({"v": torch.zeros(3, 2, 8)}, r"k has shape .* but v \(3, 2, 8\)"),
        ({"v": torch.zeros(3, 2, 16, dtype=torch.float16)}, r"v is torch.float16 but q is"),
        ({"q": torch.zeros(3, 4, 16, dtype=torch.float64)}, r"q is torch.float64; use"),
        ({"k": torch.zeros(3, 2, 32)[..., ::2]}, r"k has gaps"),
        ({"k": torch.zeros(3, 2, 16, device="meta")}, r"k is on meta"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens is torch.int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens is .* shape \(0,\)"),
        ({"cu_seqlens": torch.zeros(4, dtype=torch.int32)[::2]}, r"cu_seqlens has gaps"),
        ({"max_seqlen": 4}, r"max_seqlen=4 is outside 0 to the 3"),
    ],
)
def test_naive_kernel_refuses_what_does_not_fit(
    changes: dict[str, torch.Tensor], message: str
) -> None:
    arguments = {
        "q": torch.zeros(3, 4, 16),
        "k": torch.zeros(3, 2, 16),
        "v": torch.zeros(3, 2, 16),
        "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32),
        "max_seqlen": 3,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        naive_kernels.naive_attention_triton(**arguments, scale=1.0)


# ---------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
def test_naive_kernel_at_its_longest_on_a_gpu(head_size: int, dtype: torch.dtype) -> None:
    longest = naive_kernels.longest_sequence(head_size, dtype)
    lengths = [longest, 1, longest - 5, 17]
    q, k, v = random_qkv(sum(lengths), 8, 4, head_size, dtype, seed=9)
    expected = exact_attention(q, k, v, lengths, head_size**-0.5)
    assert_close(by_kernel(q, k, v, lengths, head_size**-0.5), expected, f"{head_size}, {dtype}")
