"""From a Hugging Face folder to a model that is ready to run.

The loader reads the headers of the safetensors files first and compares all names, shapes and
dtypes with what the layers ask for. Only a checkpoint that fits costs memory; then every tensor is
read straight from the file into its place.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minivllm.layers.checkpoint import CheckpointSource, LoadsItself
from minivllm.models.config import ModelConfig, read_json

ARCHITECTURES = {
    "Qwen3ForCausalLM": "minivllm.models.qwen3",
    "LlamaForCausalLM": "minivllm.models.llama",
}

# What a checkpoint may hold although no layer wants it: tables that we compute ourselves, and the
# head of a tied model, which is the embedding once more.
IGNORED = (".rotary_emb.inv_freq", "lm_head.weight")

# As headers write them. Quantised weights mean nothing without their scales.
FLOATING = ("F64", "F32", "F16", "BF16")


def model_class(architecture: str) -> type[nn.Module]:
    """The class that runs ``architecture``; ValueError names the ones that exist."""
    module = ARCHITECTURES.get(architecture)
    if module is None:
        raise ValueError(
            f"architecture {architecture!r} is not supported; this package runs "
            f"{', '.join(ARCHITECTURES)}"
        )
    return getattr(importlib.import_module(module), architecture)


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, whole or sharded; ValueError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map") or {}
        if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
            raise ValueError(f"{index}: weight_map must give each tensor's file; fetch it again")
        names = sorted(set(places.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing or not names:
            raise ValueError(f"{index} names files that are not there: {', '.join(missing) or '-'}")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    others = sorted(file.name for file in folder.glob("*.bin"))
    found = f"; it has {', '.join(others)}, which must be converted first" if others else ""
    raise ValueError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json{found}"
    )


def checkpoint_sources(model: nn.Module) -> Iterator[CheckpointSource]:
    """Everything that the layers of ``model`` want from a checkpoint."""
    for path, module in model.named_modules():
        if isinstance(module, LoadsItself):
            yield from module.checkpoint_sources(path)


class Checkpoint:
    """The open safetensors files of a folder: names and shapes at once, contents on demand.

    Use it as a context manager. Raises ValueError naming a file that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        # Tensor name -> the open file that holds it, and that file's name.
        self._files: dict[str, Any] = {}
        self._places: dict[str, Path] = {}

    def __enter__(self) -> "Checkpoint":
        with ExitStack() as opening:
            for file in checkpoint_files(self.folder):
                handle = opening.enter_context(_open(file))
                self._files.update({name: handle for name in handle.keys()})
                self._places.update({name: file for name in handle.keys()})
            self._stack = opening.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def check_dtypes(self, model: nn.Module) -> None:
        """ValueError if a tensor that a layer of ``model`` wants holds no floating-point numbers.

        They would be copied all the same: as numbers that mean something else.
        """
        wrong = []
        for source in checkpoint_sources(model):
            if source.name in self._files:
                part = self._files[source.name].get_slice(source.name)
                if part.get_dtype() not in FLOATING:
                    wrong.append((source.name, part.get_dtype()))
        if wrong:
            name, dtype = wrong[0]
            others = f" ({len(wrong) - 1} more tensors are like that)" if len(wrong) > 1 else ""
            raise ValueError(
                f"{name} in {self._places[name]} has dtype {dtype}{others}, which cannot be read "
                "as weights; use a checkpoint in bfloat16, float16 or float32"
            )

    def check_fit(self, model: nn.Module) -> None:
        """Compare what the layers of ``model`` want with the headers of the files.

        Raises one ValueError that names every tensor that does not fit, sorted by name, in this
        form, without the kinds that do not occur: "missing: a, b; left over: c; wrong shape: d is
        [5, 4], the config asks for [4, 5]". What :data:`IGNORED` ends is never left over.
        """
        wanted = {source.name: source.shape for source in checkpoint_sources(model)}
        missing = [name for name in wanted if name not in self._files]
        left_over = [
            name for name in self._files if name not in wanted and not name.endswith(IGNORED)
        ]
        wrong = []
        for name in wanted.keys() & self._files.keys():
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != wanted[name]:
                wrong.append(f"{name} is {list(found)}, the config asks for {list(wanted[name])}")
        problems = [
            f"{what}: {', '.join(sorted(names))}"
            for what, names in (
                ("missing", missing),
                ("left over", left_over),
                ("wrong shape", wrong),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"the checkpoint in {self.folder} does not fit its config.json "
                f"({'; '.join(problems)}); fetch the whole model again, or correct the config"
            )

    def fill(self, model: nn.Module) -> None:
        """Copy every tensor, or the slice that is asked for, straight into its place."""
        for source in checkpoint_sources(model):
            part = self._files[source.name].get_slice(source.name)
            source.target.copy_(part[source.index or ...])

    def check_finite(self, model: nn.Module) -> None:
        """ValueError naming every tensor in ``model``, once it is filled, with NaN or infinity."""
        sources = list(checkpoint_sources(model))
        if not sources:
            return
        # A sum with NaN or infinity in it is never finite, and no tensor is waited for by itself.
        # That of large numbers may overflow: only those suspects are worth a closer look.
        sums = torch.stack([source.target.sum() for source in sources]).isfinite().tolist()
        suspects = [source for source, finite in zip(sources, sums, strict=True) if not finite]
        bad = [source for source in suspects if not source.target.isfinite().all()]
        if not bad:
            return
        names = ", ".join(f"{source.name} ({self._places[source.name].name})" for source in bad)
        narrow = bad[0].target.dtype == torch.float16
        remedy = ", or choose dtype bfloat16, which holds larger numbers" if narrow else ""
        raise ValueError(
            f"NaN or infinity in the weights of {self.folder}: {names}; fetch the model "
            f"again{remedy}"
        )


def load_model(
    folder: Path,
    config: ModelConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> nn.Module:
    """Build the model that ``folder`` describes and fill it.

    config: what to build, read from the folder by default. dtype: of the weights and the
    computation, the checkpoint's own by default. change: is given the finished model before it is
    filled, to replace layers in it, and returns it.
    Raises ValueError for a config or a checkpoint that cannot be used, before any memory is taken,
    and in the end for weights that are NaN or infinite.
    """
    config = config or ModelConfig.from_folder(folder)
    cls = model_class(config.architecture)
    with Checkpoint(folder) as checkpoint:
        # A model on "meta" has shapes but no memory, which is all that the check needs.
        empty = change(cls(config, device="meta"))
        checkpoint.check_dtypes(empty)
        checkpoint.check_fit(empty)
        model = change(cls(config, dtype=dtype or config.dtype, device=device))
        checkpoint.fill(model)
        checkpoint.check_finite(model)
    return model.eval()


@torch.no_grad()
def random_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> nn.Module:
    """The model of ``config`` with random weights: matrices normal with deviation 0.02, norms 1."""
    model = model_class(config.architecture)(config, dtype=dtype or config.dtype, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(1)
    return model.eval()


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({error}); it may be truncated: "
            "fetch it again"
        ) from None
