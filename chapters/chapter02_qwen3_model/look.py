"""What lies in a Hugging Face model folder, before any model is built.

    python -m chapters.chapter02_qwen3_model.look                  # the embedded model
    python -m chapters.chapter02_qwen3_model.look --toy            # the chapter's toy
    python -m chapters.chapter02_qwen3_model.look path/to/folder

It needs no code of the package: safetensors reads the headers.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

EMBEDDED_MODEL = Path(__file__).parents[2] / "minivllm" / "assets" / "tiny_qwen3"
WORTH_A_LINE = (
    "architectures",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "dtype",
    "torch_dtype",
)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in the folder's safetensors files; reads headers only."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():
                found[name] = tuple(content.get_slice(name).get_shape())
    return found


def grouped(names: Sequence[str]) -> dict[str, list[str]]:
    """Names that differ only in the number of their layer, under one heading."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.*.", name), []).append(name)
    return groups


def print_folder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in WORTH_A_LINE:
        if config.get(key) is not None:
            print(f"{key:<22} {config[key]}")
    found = shapes(folder)
    print()
    numbers = 0
    for heading, names in sorted(grouped(list(found)).items()):
        shape = found[names[0]]
        times = f"{len(names)} x " if "*" in heading else ""
        print(f"{heading:<50} {times}{list(shape)}")
    for shape in found.values():
        size = 1
        for length in shape:
            size *= length
        numbers += size
    print(f"\n{len(found)} tensors, {numbers:,} numbers")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--toy", action="store_true", help="the chapter's toy instead")
    arguments = parser.parse_args(argv)
    if not arguments.toy and not (arguments.folder / "config.json").is_file():
        print(f"{arguments.folder} has no config.json: is it a model folder?", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.toy:
            from chapters.chapter02_qwen3_model.toy import write_toy

            print_folder(write_toy(Path(scratch)))
        else:
            print_folder(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
