"""Uploads a folder to the Hub, once it was seen to load for people who do not have tar-hf."""

import os
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from glob import escape
from pathlib import Path, PurePosixPath

from huggingface_hub import (
    constants,
    create_branch,
    create_repo,
    list_repo_files,
    metadata_load,
    repo_info,
    upload_file,
    upload_folder,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from tar_hf._version import __version__
from tar_hf.conversion.model_card import name_repository
from tar_hf.pipelines.tar_repository import PARTS, PARTS_FILE, read_parts

METADATA = ("license", "library_name", "pipeline_tag")
IGNORED = ("__pycache__", ".cache", ".git", "checkpoint-*", "runs")  # folders that are not uploaded
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "model_index.json")
CARD = "README.md"
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
TEMPORARY = {".bak", ".incomplete", ".lock", ".orig", ".part", ".swp", ".temp", ".tmp"}
LARGEST_FILE = 100 * 2**20  # bytes of a file that is not weights: vocabularies have at most some 30 MB

ADVICE = {
    401: "log in with `hf auth login`, or pass a token",
    403: "use a token that may write there, or propose a pull request (--create-pr)",
    404: "check the repository's id, the branch, and that the token may see it",
    429: "wait a while",
}


class PublishError(ValueError):
    """A folder that is not published. The message, one line, says what was expected, what came, and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """
    Makes a model repository on the Hub, where there is none yet, and uploads a folder to it.

    Before any request, `check_folder` loads the folder, which **runs the Python code in it**. A card that this package
    wrote shows how to load the folder by its name; what is uploaded, in a commit of its own, says the repository's id
    there. Files that the repository has already, and the folder has not, stay, unless they would load in the place of
    the folder's: other weights, their index and `model_index.json`, where the folder has weights or such an index too.

    Args:
        folder (`str` or `Path`): What a converter or `tar-hf assemble` made, or another diffusers or Qwen2 folder.
        repo_id (`str`): `"user/name"`, or `"name"` for the token's user. `HF_ENDPOINT` says on which Hub.
        private (`bool`, *optional*): Makes a new repository private or public; one that exists must be so already. By
            default the account's settings decide about a new one.
        revision (`str`, *optional*): Branch to upload to, made from `main` where there is none of that name.
        token (`str`, *optional*): By default the one of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`, *optional*): First line of the commit.
        create_pr (`bool`): Propose the upload as a pull request to `main`; not together with `revision`.

    Returns:
        `str`: The address of the repository, of its branch, or of the pull request, if anything in it would change.

    Raises:
        `PublishError`: a folder as in `check_folder`; an invalid `repo_id`; `private` where the repository is public or
            the other way round; offline mode; what the Hub answers, with its error as the cause.
        `FileNotFoundError`: no such folder.
    """
    if create_pr and revision is not None:
        raise PublishError(f"a pull request goes to main: pass create_pr or revision={revision!r}, not both")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise PublishError(f"{repo_id!r} is not a repository's id, such as 'user/name': {error}") from None
    if constants.is_offline_mode():
        raise PublishError("the Hub cannot be reached in offline mode: unset HF_HUB_OFFLINE")
    check_folder(folder)
    return _upload(folder, repo_id, private, revision, token, commit_message, create_pr)


def is_ignored(name: str) -> bool:
    """Whether a folder of this name is not uploaded."""
    return any(fnmatch(name, pattern) for pattern in IGNORED)


def check_folder(folder: str | Path):
    """
    Loads a folder in a fresh Python process in which tar-hf cannot be imported, offline and with empty caches.

    What is there decides how: `model_index.json` through `DiffusionPipeline`, `config.json` through the Auto classes,
    always with `trust_remote_code=True`. In a Tar repository the folders `ta_tok` and `detokenizer` follow.

    Args:
        folder (`str` or `Path`): The folder to be published.

    Raises:
        `PublishError`: a part that does not load, or with weights that are missing, left over or of another shape; a
            model card without license, library_name or pipeline_tag; pickles, temporary, hidden and other files that
            do not belong into a repository.
        `FileNotFoundError`: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    parts = _parts(folder)
    _check_card(folder / CARD)
    _check_files(folder)
    _check_loading(folder, parts)


def _parts(folder):
    parts = ["."]
    if not (folder / "model_index.json").is_file():  # which names the parts of a diffusers folder
        parts += [name for name in PARTS if (folder / name).is_dir()]
        _check_noted_parts(folder)
    for part in parts:
        if (folder / part / "adapter_config.json").is_file():
            raise PublishError(f"{folder / part} is an adapter: publish what `tar-hf merge` makes of it and its base")
        if not any((folder / part / name).is_file() for name in ("config.json", "model_index.json")):
            raise PublishError(
                f"{folder / part} has neither config.json nor model_index.json: make it with `tar-hf convert` or "
                "`tar-hf assemble`"
            )
    return parts


def _check_noted_parts(folder):
    """Raises for a part that tar.json says is in the folder, and is not, or where nobody else would find it."""
    try:
        noted = read_parts(folder)
    except ValueError as error:
        raise PublishError(str(error)) from None
    for part, where in noted.items():
        if where == part:
            if not (folder / part).is_dir():
                raise PublishError(f"{folder / PARTS_FILE} says that {part} is in {folder / part}, which is no folder")
            continue
        try:
            validate_repo_id(where)
        except ValueError:
            found = False
        else:
            found = "/" in where and not Path(where).exists()
        if not found:
            raise PublishError(
                f"{folder / PARTS_FILE} says that {part} is in {where!r}, where nobody else finds it: expected a "
                "repository's id, such as 'user/name'"
            )


def _check_card(path):
    if not path.is_file():
        raise PublishError(f"{path} is missing: a repository needs a model card with {', '.join(METADATA)}")
    try:
        metadata = metadata_load(path) or {}
    except Exception as error:  # of the YAML parser too
        raise PublishError(f"{path} does not begin with metadata in YAML: {error}") from None
    missing = [name for name in METADATA if not metadata.get(name)]
    if missing:
        raise PublishError(f"{path} lacks {', '.join(missing)}: add it to the metadata between the lines ---")


def _check_files(folder):
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(map(is_ignored, parts if path.is_dir() else parts[:-1])):
            continue
        if path.is_symlink() and not path.is_file():
            raise PublishError(f"{path} is a link that would not be uploaded: put what it points to in its place")
        if path.suffix in PICKLES:
            raise PublishError(f"{path} may be a pickle, which can run code: publish safetensors, and remove it")
        if path.suffix in TEMPORARY or path.name.endswith("~"):
            raise PublishError(f"{path} is a temporary file: remove it")
        if path.name.startswith(".") and path.name != ".gitattributes":
            raise PublishError(f"{path} is hidden and would be published: remove it")
        if path.is_file() and path.suffix != ".safetensors" and path.stat().st_size > LARGEST_FILE:
            size = path.stat().st_size
            raise PublishError(f"{path} must be safetensors or at most {LARGEST_FILE} bytes, got {size}: remove it")


def _check_loading(folder, parts):
    # Neither the user's token nor caches nor switches: what is there may be missing elsewhere.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_"))
    }
    with tempfile.TemporaryDirectory(prefix="tar-hf-push-") as temporary:
        reason = Path(temporary, "reason")
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(Path(temporary, "home")),
            "HF_MODULES_CACHE": str(Path(temporary, "modules")),
        }
        script = Path(__file__).with_name("load_check.py")
        process = subprocess.run(
            [sys.executable, script, reason, folder.resolve(), *parts],
            cwd=temporary,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        text = reason.read_text() if reason.is_file() else f"its process ended with status {process.returncode}"
    if text:
        raise PublishError(f"{folder} does not load without tar-hf: {text}") from RuntimeError(process.stderr)


def _upload(folder, repo_id, private=None, revision=None, token=None, commit_message=None, create_pr=False):
    try:
        url = create_repo(repo_id, private=private, token=token, exist_ok=True)
        repo_id = url.repo_id  # with the user's name
        if private is not None and repo_info(repo_id, token=token).private != private:
            asked, found = ("private", "public") if private else ("public", "private")
            raise PublishError(f"{repo_id} exists and is {found}, {asked} was asked for: change it in its settings")
        if revision is not None and not revision.startswith("refs/"):  # a pull request has its branch already
            create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        where = {"repo_id": repo_id, "token": token}
        where["commit_message"] = commit_message or f"Upload with tar-hf {__version__}"
        ignored = [pattern for name in IGNORED for pattern in (f"{name}/*", f"*/{name}/*")]
        card = Path(folder, CARD).read_text(encoding="utf-8")
        named = name_repository(card, repo_id)
        commit = upload_folder(
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=ignored if named == card else [*ignored, CARD],
            delete_patterns=list(
                map(escape, _outdated(folder, list_repo_files(repo_id, revision=revision, token=token)))
            ),
            **where,
        )
        if named != card:
            proposed = commit.pr_revision if create_pr else None
            upload = upload_file(
                path_or_fileobj=named.encode(),
                path_in_repo=CARD,
                revision=proposed or revision,
                create_pr=create_pr and proposed is None,
                **where,
            )
            commit = commit if proposed else upload
    except PublishError:
        raise
    except Exception as error:  # httpx2's, hf_xet's, or a RuntimeError around one of them
        raise PublishError(f"{repo_id} was not uploaded to {constants.ENDPOINT}: {_explain(error)}") from error
    if create_pr:
        return commit.pr_url or str(url)  # nothing to propose where nothing changed
    return str(url) if revision is None else f"{url}/tree/{revision}"


def _outdated(folder, names):
    """The files of a repository, by their names there, that would load in the place of a folder's."""
    own = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    loaded = {PurePosixPath(name).parent for name in own if _decides(name)}
    return [name for name in names if name not in own and _decides(name) and PurePosixPath(name).parent in loaded]


def _decides(name):
    """Whether a file decides what is loaded from its folder."""
    return any(fnmatch(PurePosixPath(name).name, pattern) for pattern in WEIGHTS)


def _explain(error):
    answer = error
    while answer is not None and not isinstance(answer, HfHubHTTPError):
        answer = answer.__cause__
    if answer is None:
        return f"{type(error).__name__}: {error}; check the network and HF_ENDPOINT"
    status = answer.response.status_code
    advice = f"; {ADVICE[status]}" if status in ADVICE else ""
    return f"status {status}, {answer.server_message or answer}{advice}"
