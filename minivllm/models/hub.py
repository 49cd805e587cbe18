"""Where a model's files are: the embedded one, a local folder, or the Hugging Face hub."""

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent.parent / "assets" / "tiny_qwen3"

WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def model_folder(model: str | Path | None, *, name: str = "model") -> Path:
    """The folder that holds ``model``.

    model: None for the model that comes with this package, the path of a Hugging Face folder, or a
    name on the hub such as ``Qwen/Qwen3-0.6B``, which is fetched unless it is in the local cache.
    name: what the caller calls it, for the error.
    Raises ValueError, in one line, if there is no such model or no way to fetch it.
    """
    if model is None:
        return EMBEDDED_MODEL
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    where = str(model)
    looks_like_a_path = (
        folder.is_absolute() or where.startswith((".", "~")) or where.count("/") != 1
    )
    if looks_like_a_path:
        raise ValueError(
            f"{name}={where!r}: no such folder; give the path of a Hugging Face model folder, a "
            "hub name such as 'Qwen/Qwen3-0.6B', or no model at all for the embedded one"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(where, allow_patterns=WANTED_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        pass
    try:
        return Path(snapshot_download(where, allow_patterns=WANTED_FILES))
    except Exception as error:
        # Whatever went wrong between here and the hub, the user can do one of two things.
        reason = type(error).__name__
        raise ValueError(
            f"{name}={where!r} is neither in the local cache nor can it be fetched ({reason}); "
            "check the name and the network, or give the path of a local folder"
        ) from None
