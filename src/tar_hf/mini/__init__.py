"""tar-mini: a whole Tar system small enough to train on a laptop, in a procedurally drawn world."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def tar_mini_folder() -> Path:
    """
    The folder of tar-mini in the package: a Tar repository, for whatever takes the path of one.

    ```python
    >>> pipeline("text-to-image", model=str(tar_mini_folder()))
    ```

    Raises `FileNotFoundError` in a copy of the package without the weights.
    """
    folder = WEIGHTS / "tar-mini"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"this copy of tar-hf lacks the weights of tar-mini: expected a Tar repository in {folder}, got no "
            "config.json there. Install a release of tar-hf, or name another model, a folder or a Hub id"
        )
    return folder
