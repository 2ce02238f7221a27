"""A Tar repository: the language model at the root, `ta_tok/` and `detokenizer/` below, and the code of the pipelines.

This file travels with `pipeline_tar.py` into repositories, so it imports nothing of the package.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

SHIPPED = ("tar-mini", "tar-mini-diffusion")  # names of the system and of another de-tokenizer in the package
PARTS = ("ta_tok", "detokenizer")  # beside the language model at the root
PARTS_FILE = "tar.json"  # beside config.json: where the parts are, by folder or repo id
# What `pipeline("text-to-image", ...)` needs where the package is not installed.
CODE_FILES = (
    *("pipeline_text_to_image.py", "pipeline_tar.py", "tar_drawing.py", "tar_parts.py", "tar_prompts.py"),
    *("tar_reflection.py", "tar_repository.py", "tar_sampling.py", "visual_vocabulary.py"),
    *("jacobi_decoding.py", "packed_linear.py", "reserved_cache.py", "seeded_decoding.py"),
)


@dataclass(frozen=True)
class RepoFolder:
    """A folder of a repository that is fetched when it is needed."""

    repo: str | Path
    name: str
    hub: dict

    def exists(self) -> bool:
        return not Path(self.repo).is_dir() or (Path(self.repo) / self.name).is_dir()

    def fetch(self) -> Path:
        folder = local_folder(self.repo, [f"{self.name}/*"], [], **self.hub) / self.name
        if not folder.is_dir():
            raise ValueError(f"{self.repo} has no folder {self.name}: pass {self.name}= a folder or a model")
        return folder


def named_model(path):
    """The folder that a name in `SHIPPED` means, unless there is a local one so called; all else as it is."""
    if path not in SHIPPED or Path(path).is_dir():
        return path
    try:  # as in the pipelines: this file must load where the package is not
        from tar_hf.mini import shipped_folder
    except ImportError as error:
        raise ImportError(f"{path} comes with the package: pip install tar-hf") from error
    return shipped_folder(path)


def local_folder(path, allow, ignore, **hub) -> Path:
    """A local folder as it is, or the snapshot of a Hub repository."""
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(str(path), allow_patterns=allow, ignore_patterns=ignore, **hub))


def read_parts(path, **hub) -> dict[str, str]:
    """
    Where a repository says that its parts are: each in the folder of its own name, or elsewhere. Empty where it says
    nothing.

    Args:
        path (`str` or `Path`): Folder or Hub id.
        hub (*optional*): For the download.

    Raises:
        `ValueError`: a file that says anything else.
    """
    file = local_folder(path, [PARTS_FILE], [], **hub) / PARTS_FILE
    if not file.is_file():
        return {}
    try:
        parts = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    known = isinstance(parts, dict) and parts.keys() <= set(PARTS)  # names that become paths
    if not (known and all(where and isinstance(where, str) for where in parts.values())):
        raise ValueError(f"{file} must say where {' and '.join(PARTS)} are, as folders or Hub ids, got {parts!r}")
    return parts


def write_pipeline_code(folder: Path):
    """Lets a repository serve `pipeline("text-to-image", model=..., trust_remote_code=True)` without this package: the
    code goes beside config.json, which gets an entry for the task."""
    here = Path(__file__).parent
    for name in CODE_FILES:
        beside = here / name  # in a repository all files stand side by side
        shutil.copyfile(beside if beside.is_file() else here.parent / "modeling" / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    implementation = "pipeline_text_to_image.TextToImagePipeline"
    config["custom_pipelines"] = {
        "text-to-image": {"impl": implementation, "pt": ["AutoModelForCausalLM"], "type": "text"}
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
