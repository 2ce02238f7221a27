"""tar-mini: a whole Tar system small enough to train on a laptop, in a procedurally drawn world."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
INDEX = {"tar-mini": "config.json", "tar-mini-diffusion": "model_index.json"}  # a file that each has


def tar_mini_folder() -> Path:
    """
    The folder of tar-mini in the package: a Tar repository, for whatever takes the path of one.

    ```python
    >>> pipeline("text-to-image", model=str(tar_mini_folder()))
    ```

    Raises `FileNotFoundError` in a copy of the package without the weights.
    """
    return shipped_folder("tar-mini")


def shipped_folder(name: str) -> Path:
    """
    The folder of a model in the package: "tar-mini", or "tar-mini-diffusion", a diffusion de-tokenizer for its codes.

    Raises `FileNotFoundError` in a copy of the package without its weights.
    """
    folder, index = WEIGHTS / name, INDEX[name]
    if not (folder / index).is_file():
        raise FileNotFoundError(
            f"this copy of tar-hf lacks the weights of {name}: expected them in {folder}, got no {index} there. "
            "Install a release of tar-hf, or name another model, a folder or a Hub id"
        )
    return folder
