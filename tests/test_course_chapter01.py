"""Chapter 1's text, figures and scripts say what the code does."""

import json
import re
from pathlib import Path

import pytest
import torch
from course_helpers import chapter_folder, check_figures

from chapters.chapter01_layers import compare_forms, results, toy, traffic
from minivllm.layers.activation import silu_and_mul
from minivllm.layers.layernorm import add_rms_norm

FOLDER = chapter_folder(1)
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_toy_is_exact() -> None:
    normed, total = add_rms_norm(toy.X, toy.RESIDUAL, toy.WEIGHT, toy.EPS)
    assert torch.equal(total, toy.TOTAL) and torch.equal(normed, toy.NORMED)
    assert toy.TOTAL.square().mean(dim=-1).sqrt().tolist() == [1, 2, 3]


def test_count_of_a_function_that_is_easy_to_count() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        half = x.view(2, 6)[:1]  # views move nothing
        half.add_(1)
        return half.exp()

    operations = traffic.count_traffic(function, torch.ones(12))
    assert [(op.name, op.bytes_read, op.bytes_written) for op in operations] == [
        ("add", 24, 24),
        ("exp", 24, 24),
    ]
    assert operations[0].bytes == 48


@pytest.mark.parametrize(
    ("function", "arguments", "operations", "bytes_moved"),
    [
        (add_rms_norm, lambda x: (x, x.clone(), x[0].clone(), 1e-6), 9, 42),
        (silu_and_mul, lambda x: (torch.cat((x, x), dim=-1),), 2, 10),
    ],
)
def test_eager_forms_move_what_the_text_says(function, arguments, operations, bytes_moved) -> None:
    x = torch.ones(64, 1024, dtype=torch.bfloat16)
    counted = traffic.count_traffic(function, *arguments(x))
    assert len(counted) == operations
    assert round(sum(op.bytes for op in counted) / x.numel()) == bytes_moved


def test_count_prints_what_the_text_shows(capsys: pytest.CaptureFixture[str]) -> None:
    compare_forms.main(["--count"])
    printed = capsys.readouterr().out
    assert printed.split("\n\n")[0] in TEXT


def test_comparison_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    file = tmp_path / "forms.json"
    settings = ["--device", "cpu", "--forms", "eager", "triton", "--tokens", "2", "--size", "6"]
    rows = compare_forms.main([*settings, "--json", str(file)])
    torch.set_num_threads(threads)
    assert [(row.function, row.form) for row in rows] == [
        ("add_rms_norm", "eager"),
        ("silu_and_mul", "eager"),
    ], "the interpreter is not to be timed"
    assert all(row.call_us > 0 and row.error < 0.02 for row in rows)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert {"device", "torch", "triton", "date", "commit", "rows"} <= set(content)
    capsys.readouterr()
    compare_forms.main(["--table", str(file)])
    assert "| add_rms_norm | 2 |" in capsys.readouterr().out


def test_comparison_notices_a_wrong_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_forms, "make_form", lambda function, form: lambda x: x[..., :6])
    with pytest.raises(SystemExit, match="its time means nothing"):
        compare_forms.measure("silu_and_mul", "eager", 2, 6, "float32", "cpu")


def test_tables_of_the_text_are_those_of_the_files() -> None:
    tables = re.findall(r"<!-- times (\S+) -->\n(.*?)\n<!-- end of times -->", TEXT, re.DOTALL)
    assert tables, "the text has no table of times"
    for name, shown in tables:
        content = json.loads((FOLDER / name).read_text(encoding="utf-8"))
        assert shown == results.table(content), f"the text's table is not that of {name}"


def test_bugs_show_what_their_symptoms_say() -> None:
    """The factor of 1.a; and the property that 1.b leaves alone."""
    assert round((8192 / 5120) ** 0.5, 3) == 1.265
    positions = torch.arange(40)[:, None, None] * torch.tensor([1.0, 0.1, 0.01])
    angles = positions + 11 * torch.tensor([1.0, 0.1, 0.01])
    q, k = toy.X[0], toy.RESIDUAL[0]

    def turn_neighbours(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        first, second = x[0::2], x[1::2]
        cos, sin = by.cos(), by.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    scores = (turn_neighbours(q, angles) * turn_neighbours(k, positions)).sum(dim=-1)
    assert torch.allclose(scores, scores[:1].expand_as(scores), atol=1e-5)


def test_figures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    check_figures(1, tmp_path, recorded=True)
