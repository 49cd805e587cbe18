"""What ``bench throughput --profile`` makes of the kernels that a GPU ran."""

import pytest

from minivllm.benchmarks.profile import part_of, summarise


def test_a_kernel_that_waits_inside_counts_from_the_end_of_the_one_before() -> None:
    step = [
        (0.0, 100.0, "split_decode_kernel"),
        (10.0, 103.0, "merge_kernel"),  # launched early, it waited until 100
        (105.0, 112.0, "nvjet_gemm"),
    ]
    spans = [
        (start + base, stop + base, name) for base in (0.0, 120.0) for start, stop, name in step
    ]
    found = summarise(spans, steps=2)
    assert found["kernels_a_step"] == 3
    assert found["step_ms"] == pytest.approx(0.116)  # from 0 to 232
    assert found["busy_ms"] == pytest.approx(0.110)
    assert found["idle_share"] == pytest.approx(12 / 232)
    assert found["parts_ms"] == pytest.approx({"attention": 0.103, "matrix products": 0.007})
    each = {kernel["name"]: kernel["us_each"] for kernel in found["kernels"]}
    assert each == pytest.approx(
        {"split_decode_kernel": 100.0, "merge_kernel": 3.0, "nvjet_gemm": 7.0}
    )
    widest = found["gaps"][0]
    assert widest["between"] == "nvjet_gemm -> split_decode_kernel"
    assert widest["us_each"] == pytest.approx(8.0)


def test_a_kernel_within_another_is_no_idle_time() -> None:
    found = summarise([(0.0, 50.0, "nvjet_gemm"), (10.0, 20.0, "norm_kernel")], steps=1)
    assert found["busy_ms"] == pytest.approx(0.05) and found["idle_share"] == pytest.approx(0)


def test_nothing_ran() -> None:
    assert summarise([], steps=3) == {}


@pytest.mark.parametrize(
    "name, part",
    [
        ("skinny_attention_kernel", "attention"),
        ("void cublasLt::splitKreduce_kernel", "matrix products"),
        ("qk_norm_rope_store_kernel", "norm, RoPE, activation"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("best_of_share_kernel", "sampling"),
        ("mystery", "other"),
    ],
)
def test_parts(name: str, part: str) -> None:
    assert part_of(name) == part
