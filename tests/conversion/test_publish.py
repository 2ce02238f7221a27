"""Publishing: a folder that would not load never reaches the Hub, and what reaches it loads from there."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_server import Answer, hub_server
from tar_hf.conversion.publish import PublishError, check_folder, push_folder

CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: any-to-any\n---\n# Tar\n"


# Refused at a look.


@pytest.fixture
def folder(ta_tok_repo, tmp_path):
    return shutil.copytree(ta_tok_repo(), tmp_path / "repo")


@pytest.mark.parametrize(
    "name",
    [
        *("model.bin", "ta_tok.pth", "deep/er/vq.pt", "last.ckpt", "codes.pkl", "training_args.bin"),
        "checkpoint-500.pt",  # a folder of that name would not be uploaded
    ],
)
def test_pickles(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(PublishError, match=f"{name} may be a pickle, .*: publish safetensors, and remove it"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors.tmp", "temporary"),
        ("config.json~", "temporary"),
        ("x.incomplete", "temporary"),
        (".env", "hidden"),
        (".ipynb_checkpoints/x.ipynb", "hidden"),
    ],
)
def test_files_that_do_not_belong(folder, name, said):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(PublishError, match=f"{name.split('/')[0]} is .*{said}.*: remove it"):
        check_folder(folder)


def test_a_large_file_that_is_not_safetensors(folder):
    with (folder / "movie.mp4").open("wb") as file:
        file.truncate(100 * 2**20 + 1)
    with pytest.raises(PublishError, match="movie.mp4 must be safetensors or at most 104857600 bytes, got 104857601"):
        check_folder(folder)


def test_links(folder, tmp_path):
    (folder / "extra").symlink_to(tmp_path)
    with pytest.raises(PublishError, match="extra is a link that would not be uploaded: put what it points to"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["license", "library_name", "pipeline_tag"])
def test_metadata_is_needed(folder, name):
    card = folder / "README.md"
    lines = card.read_text().splitlines(keepends=True)
    card.write_text("".join(line for line in lines if not line.startswith(f"{name}:")))
    with pytest.raises(PublishError, match=f"README.md lacks {name}: add it to the metadata"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "README.md is missing: a repository needs a model card with license, library_name, pipeline_tag"),
        ("# Tar\n", "README.md lacks license, library_name, pipeline_tag"),
        ("---\n- a\n---\n", "README.md does not begin with metadata in YAML"),
        ("---\na: [\n---\n", "README.md does not begin with metadata in YAML"),
    ],
)
def test_the_card_is_needed(folder, text, message):
    (folder / "README.md").unlink()
    if text is not None:
        (folder / "README.md").write_text(text)
    with pytest.raises(PublishError, match=message) as caught:
        check_folder(folder)
    assert "\n" not in str(caught.value)


def test_no_configuration(folder):
    (folder / "ta_tok").mkdir()
    with pytest.raises(PublishError, match="ta_tok has neither config.json nor model_index.json: make it with"):
        check_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(PublishError, match="repo has neither config.json nor model_index.json: make it with"):
        check_folder(folder)
    with pytest.raises(FileNotFoundError, match="none is not a folder"):
        check_folder(folder / "none")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"ta_tok": "ta_tok", "detokenizer": "detokenizer"},
            "says that detokenizer is in .*detokenizer, which is no fo",
        ),
        ({"ta_tok": "ta_tok", "detokenizer": "/home/me/sana"}, "in '/home/me/sana', where nobody else finds it"),
        (
            {"ta_tok": "ta_tok", "detokenizer": "sana"},
            "in 'sana', where nobody else finds it: expected a repository's id",
        ),
        ({"ta_tok": "ta_tok", "../x": "../x"}, "must say where ta_tok and detokenizer are"),
    ],
)
def test_parts_that_others_would_not_find(tar_repo, tmp_path, parts, message):
    folder = shutil.copytree(tar_repo, tmp_path / "repo")
    shutil.rmtree(folder / "detokenizer")
    (folder / "tar.json").write_text(json.dumps(parts))
    with pytest.raises(PublishError, match=message):
        check_folder(folder)


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        ("a/b/c", {}, "'a/b/c' is not a repository's id, such as 'user/name'"),
        ("user/na me", {}, "'user/na me' is not a repository's id"),
        ("user/x", {"create_pr": True, "revision": "dev"}, "pass create_pr or revision='dev', not both"),
        ("user/x", {}, "offline mode: unset HF_HUB_OFFLINE"),  # which the test suite has set
    ],
)
def test_arguments_come_before_loading(folder, repo_id, options, message):
    (folder / "model.safetensors").unlink()
    with pytest.raises(PublishError, match=message):
        push_folder(folder, repo_id, **options)


# Refused since it does not load. Each takes seconds, so all are tried first, two at a time.


def _edit(name, change):
    def edit(folder):
        path = folder / name
        path.write_text(change(path.read_text()))

    return edit


def _edit_weights(name, change):
    def edit(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return edit


def _spoil(tensors):
    first, *_, last = sorted(tensors)
    tensors["renamed"] = tensors.pop(first)
    tensors[last] = tensors[last][:-1].clone()


def _draw_with(detokenizer):
    def edit(folder):
        shutil.rmtree(folder / "detokenizer")
        shutil.copytree(detokenizer, folder / "detokenizer")

    return edit


@pytest.fixture(scope="module")
def loaded(ta_tok_repo, ar_detok_repo, diffusion_detok_repo, tar_repo, tmp_path_factory):
    """Runs `check_folder` on edited copies of repositories; gives the error of each, or None, by name."""
    root = tmp_path_factory.mktemp("loaded")
    ta_tok, sana = ta_tok_repo(), diffusion_detok_repo()
    spoilt = shutil.copytree(sana, root / "spoilt")
    _edit_weights("negative_condition/diffusion_pytorch_model.safetensors", lambda tensors: tensors.clear())(spoilt)
    copies = {
        "needs the package": (ta_tok, _edit("modeling_ta_tok.py", lambda code: f"import tar_hf.modeling\n{code}")),
        "code missing": (tar_repo, lambda folder: (folder / "pipeline_text_to_image.py").unlink()),
        "code that ends": (ta_tok, _edit("modeling_ta_tok.py", lambda code: f"import os\nos._exit(0)\n{code}")),
        "weights": (ar_detok_repo(), _edit_weights("model.safetensors", _spoil)),
        "tokenizer": (tar_repo, lambda folder: [file.unlink() for file in folder.glob("*tok*.json")]),
        "part": (tar_repo, _draw_with(spoilt)),
        "whole": (tar_repo, _draw_with(sana)),
    }

    def check(name):
        source, edit = copies[name]
        folder = shutil.copytree(source, root / name)
        edit(folder)
        before = sorted(folder.rglob("*"))
        try:
            check_folder(folder)
        except PublishError as error:
            return error
        finally:
            assert sorted(folder.rglob("*")) == before, "loading must not change a folder"

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(copies, pool.map(check, copies), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needs the package", r"ModuleNotFoundError: import of tar_hf halted"),
        ("code missing", r"OSError: .*pipeline_text_to_image\.py"),
        ("code that ends", r"its process ended with status 0$"),
        (
            "weights",
            r"ValueError: missing \S+; renamed has no place in the model; \S+ must have the shape \(.*\), got \(",
        ),
        ("tokenizer", r"ValueError: expected at least 916 tokens in the tokenizer, got \d+: is a file missing\?$"),
        ("part", r"detokenizer: ValueError: missing features$"),
    ],
)
def test_a_folder_that_does_not_load(loaded, name, message):
    error = loaded[name]
    assert isinstance(error, PublishError)
    assert re.search(f"{name} does not load without tar-hf: {message}", str(error)) and "\n" not in str(error)
    assert name == "code that ends" or "Traceback" in str(error.__cause__), "for TAR_HF_DEBUG=1"


@pytest.mark.slow
def test_a_whole_system_loads(loaded):
    assert loaded["whole"] is None


# On a Hub.

SYSTEMS = (  # files with weights, and what says which are read
    ("model.safetensors", "detokenizer/model_index.json", "detokenizer/transformer/model.safetensors"),
    ("model-[1].safetensors", "model.safetensors.index.json", "detokenizer/model.safetensors"),
)

PUSH = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from tar_hf.conversion.publish import PublishError, _upload, push_folder

ta_tok, ar_detok, plain = sys.argv[1:4]
results = {}

def run(name, call, *args, **options):
    try:
        results[name] = call(*args, **options)
    except PublishError as error:
        results[name] = f"PublishError: {error}"

with ThreadPoolExecutor(2) as pool:
    pool.submit(run, "ta_tok", push_folder, ta_tok, "user/ta-tok", commit_message="First")
    pool.submit(run, "ar_detok", push_folder, ar_detok, "ar-detok", private=True)

# The Hub's answers; what was loaded above need not load again.
run("again", _upload, ta_tok, "user/ta-tok")
run("branch", _upload, plain, "user/ta-tok", revision="dev/2")
run("pull request", _upload, plain, "user/ta-tok", token="hf_other", create_pr=True)
run("no change", _upload, ta_tok, "user/ta-tok", create_pr=True)
run("401", _upload, plain, "user/new", token="hf_wrong")
run("403", _upload, plain, "user/ta-tok", token="hf_other")
run("403 elsewhere", _upload, plain, "google/new")
run("404", _upload, plain, "user/ta-tok", revision="refs/pr/7")
run("public already", _upload, plain, "user/ta-tok", private=True)
run("private already", _upload, plain, "user/ar-detok", private=False)
run("disk full", _upload, sys.argv[4], "user/full")
for folder in sys.argv[5:]:
    run("one after the other", _upload, folder, "user/system")
print(json.dumps(results))
"""

LOAD = """
import sys
from pathlib import Path

sys.modules["tar_hf"] = None
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM

output = Path(sys.argv[1])
AutoImageProcessor.from_pretrained("user/ta-tok", trust_remote_code=True)
for auto_class, name in (AutoModel, "ta-tok"), (AutoModelForCausalLM, "ar-detok"):
    model = auto_class.from_pretrained(f"user/{name}", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, output / f"{name}.safetensors")
"""


@pytest.fixture(scope="module")
def pushed(ta_tok_repo, ar_detok_repo, tmp_path_factory):
    """Pushes to a stand-in, then loads from there in another process; gives the Hub, the results and the weights."""
    root = tmp_path_factory.mktemp("pushed")
    folders = {"ta_tok": ta_tok_repo(), "ar_detok": ar_detok_repo()}
    plain, full = root / "plain", root / "full"
    for folder in (plain, full):
        folder.mkdir()
        (folder / "README.md").write_text(CARD)
    for name in ("__pycache__/x.pyc", ".cache/huggingface/x", "deep/__pycache__/x.pyc", "deep/notes.md"):
        (plain / name).parent.mkdir(parents=True, exist_ok=True)
        (plain / name).write_text("x")
    save_file({"x": torch.zeros(7)}, full / "model.safetensors")
    systems = [root / "before", root / "after"]
    for system, own in zip(systems, SYSTEMS, strict=True):
        for name in (*own, "README.md", "notes/old.safetensors" if system.name == "before" else "config.json"):
            (system / name).parent.mkdir(parents=True, exist_ok=True)
            (system / name).write_text(CARD)
    with hub_server() as hub:
        oid = hashlib.sha256((full / "model.safetensors").read_bytes()).hexdigest()
        hub.answers[f"/lfs/{oid}"] = Answer(403, {"error": "Private repository storage limit reached"})
        for name, script, arguments in (
            ("push", PUSH, [*folders.values(), plain, full, *systems]),
            ("load", LOAD, [root]),
        ):
            process = subprocess.run(
                [sys.executable, "-c", script, *map(str, arguments)],
                env=hub.environment(root / name),
                cwd=root,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            assert process.returncode == 0, process.stderr
            if name == "push":
                results = json.loads(process.stdout)
        yield hub, results, {path.stem: load_file(path) for path in root.glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ta_tok", "ar_detok"])
def test_what_was_pushed_loads_by_its_id(pushed, name, request):
    hub, results, weights = pushed
    repo_id = name.replace("_", "-")
    folder = request.getfixturevalue(f"{name}_repo")()
    assert results[name] == f"{hub.url}/user/{repo_id}"
    saved = load_file(folder / "model.safetensors")
    assert weights[repo_id].keys() == saved.keys()
    assert all(torch.equal(weights[repo_id][key], saved[key]) for key in saved)


@pytest.mark.slow
def test_the_repository_holds_the_folder(pushed, ta_tok_repo):
    repo = pushed[0].repos["user/ta-tok"]
    files = {path.name: path.read_bytes() for path in Path(ta_tok_repo()).iterdir()}
    loads = b'from_pretrained("%s", trust_remote_code=True)'
    files["README.md"] = files["README.md"].replace(loads % b"repo", loads % b"user/ta-tok")
    assert files["README.md"].count(b'"user/ta-tok"') == 2
    assert {name: data for name, data in repo.files().items() if name != ".gitattributes"} == files
    assert repo.commits[repo.refs["main"]].title == "First" and not repo.private
    assert pushed[1]["again"] == pushed[1]["ta_tok"], "a second time changes nothing"
    assert pushed[0].repos["user/ar-detok"].private
    assert pushed[0].unknown == []


@pytest.mark.slow
def test_branches_and_pull_requests(pushed):
    hub, results, _ = pushed
    repo, url = hub.repos["user/ta-tok"], f"{hub.url}/user/ta-tok"
    assert results["branch"] == f"{url}/tree/dev/2"
    assert results["pull request"] == f"{url}/discussions/1"
    assert results["no change"] == url
    assert repo.refs.keys() == {"main", "dev/2", "refs/pr/1"}
    for ref in ("dev/2", "refs/pr/1"):
        assert repo.files(ref)["README.md"].decode() == CARD
        assert repo.files(ref).keys() - repo.files().keys() == {"deep/notes.md"}, "no caches"
        assert repo.commits[repo.refs[ref]].title.startswith("Upload with tar-hf")


@pytest.mark.slow
def test_what_would_load_instead_does_not_stay(pushed):
    files = pushed[0].repos["user/system"].files().keys()
    assert files >= set(SYSTEMS[1]) and not files & {"model.safetensors", "detokenizer/model_index.json"}
    assert files >= {"notes/old.safetensors", "detokenizer/transformer/model.safetensors"}, "which nothing reads"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("401", "user/new was not uploaded to {url}: status 401, Invalid credentials in Authorization header; log in"),
        (
            "403",
            "user/ta-tok was not uploaded to {url}: status 403, you don't have the right to write to user/ta-tok; use",
        ),
        (
            "403 elsewhere",
            "google/new was not uploaded to {url}: status 403, You don't have the rights to create a model",
        ),
        (
            "404",
            "user/ta-tok was not uploaded to {url}: status 404, Invalid rev id: refs/pr/7; check the repository's id",
        ),
        ("public already", "user/ta-tok exists and is public, private was asked for: change it in its settings"),
        ("private already", "user/ar-detok exists and is private, public was asked for: change it in its settings"),
        ("disk full", "user/full was not uploaded to {url}: status 403, Private repository storage limit reached; use"),
    ],
)
def test_what_the_hub_answers(pushed, name, message):
    hub, results, _ = pushed
    assert results[name].startswith(f"PublishError: {message.format(url=hub.url)}")
    assert "\n" not in results[name]
    assert "user/new" not in hub.repos and hub.repos["user/full"].files().keys() == {".gitattributes"}
