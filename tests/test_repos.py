"""Converted repositories stand on their own: with the package and without it, loaded, saved and loaded again.

Each process below is one way to come to them; it writes what the models compute, which must be the original's results.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

COMMON = """
import json, os, sys
from pathlib import Path

FOLDERS = {name: Path(folder) for name, folder in json.loads(sys.argv[1]).items()}
OUTPUT = Path(sys.argv[2])
results = {}  # name -> tensor
facts = {}

def compute(name, processor, ta_tok, detokenizer):
    import torch

    with torch.no_grad():
        pixels = processor(results_in["pixels"], return_tensors="pt").pixel_values
        output = ta_tok.eval()(pixels, scale=3)
        ids = detokenizer.eval().generate(results_in["condition"], do_sample=False, guidance_scale=4.0)
    results.update({f"{name}.codes": output.codes, f"{name}.features": output.features, f"{name}.ids": ids})

def load(name, **options):
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM

    ta_tok, ar_detok = FOLDERS[name] / "ta_tok", FOLDERS[name] / "ar_detok"
    assert AutoConfig.from_pretrained(ta_tok, **options).model_type == "ta_tok"
    parts = (
        AutoImageProcessor.from_pretrained(ta_tok, **options),
        AutoModel.from_pretrained(ta_tok, **options),
        AutoModelForCausalLM.from_pretrained(ar_detok, **options),
    )
    compute(name, *parts)
    return parts

def save(parts, name):
    processor, ta_tok, detokenizer = parts
    processor.save_pretrained(FOLDERS[name] / "ta_tok")
    ta_tok.save_pretrained(FOLDERS[name] / "ta_tok")
    detokenizer.save_pretrained(FOLDERS[name] / "ar_detok")

def finish():
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in results.items()}, OUTPUT)
    OUTPUT.with_suffix(".json").write_text(json.dumps(facts))

def inputs():
    from safetensors.torch import load_file

    return load_file(sys.argv[3])
"""

# tar_hf, then transformers, whose AutoImageProcessor is the first thing that is used.
PACKAGE_FIRST = """
import tar_hf
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoImageProcessor

first = AutoImageProcessor.from_pretrained(FOLDERS["converted"] / "ta_tok")
facts["processor"] = type(first).__module__
results_in = inputs()
parts = load("converted")
facts["modules"] = sorted({type(part).__module__ for part in parts})
save(parts, "from_package")
load("from_package")
# The local class goes before the repository's code, whatever the flag says.
from transformers import AutoModel
trusted = AutoModel.from_pretrained(FOLDERS["converted"] / "ta_tok", trust_remote_code=True)
facts["trusted"] = type(trusted).__module__
finish()
"""

# No tar_hf at all: refused without the flag, the repository's own code with it.
WITHOUT_PACKAGE = """
sys.modules["tar_hf"] = None
results_in = inputs()
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM

facts["refused"] = []
for auto, folder in (
    (AutoConfig, "ta_tok"),
    (AutoModel, "ta_tok"),
    (AutoImageProcessor, "ta_tok"),
    (AutoConfig, "ar_detok"),
    (AutoModelForCausalLM, "ar_detok"),
):
    try:
        auto.from_pretrained(FOLDERS["converted"] / folder)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
        facts["refused"].append(f"{auto.__name__} {folder}")
assert not any(name.startswith("transformers_modules.") for name in sys.modules), "nothing of it may have run"

parts = load("converted", trust_remote_code=True)
facts["modules"] = sorted({type(part).__module__.split(".")[0] for part in parts})
save(parts, "from_remote")
load("from_remote", trust_remote_code=True)
load("from_package", trust_remote_code=True)

# The examples of the model cards, as someone would paste them beside the folder.
import re

for name in ("ta_tok", "ar_detok"):
    os.chdir(FOLDERS["examples"] / name)
    (code,) = re.findall("```python\\n(.*?)```", Path("repo/README.md").read_text(), re.DOTALL)
    names = {"features": results["converted.features"]}
    exec(code, names)
    facts[f"example {name}"] = list(names["features" if name == "ta_tok" else "pixels"].shape)
assert not any(name.startswith("tar_hf.") for name in sys.modules)
finish()
"""

# transformers and its Auto classes, then tar_hf; the first use makes a model from a configuration alone.
TRANSFORMERS_FIRST = """
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM
import tar_hf
assert "tar_hf.modeling" not in sys.modules

tower = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
config = AutoConfig.for_model("ta_tok", encoder_config=tower, codebook_size=8, codebook_dim=4)
facts["made"] = [type(config).__module__, type(AutoModel.from_config(config)).__module__]
config = AutoConfig.from_pretrained(FOLDERS["converted"] / "ar_detok")
facts["made"].append(type(AutoModelForCausalLM.from_config(config)).__module__)
results_in = inputs()
parts = load("from_remote")
facts["modules"] = sorted({type(part).__module__ for part in parts})
finish()
"""


@pytest.fixture(scope="module")
def ran(ta_tok_repo, ar_detok_repo, expected, tmp_path_factory):
    """Runs the three processes in order; gives what each computed and noted, and the folders."""
    root = tmp_path_factory.mktemp("repos")
    folders = {name: root / name for name in ("converted", "from_package", "from_remote", "examples")}
    repos = {"ta_tok": ta_tok_repo(), "ar_detok": ar_detok_repo()}
    folders["converted"].mkdir()
    for name, repo in repos.items():
        (folders["converted"] / name).symlink_to(repo)
        (folders["examples"] / name).mkdir(parents=True)
        (folders["examples"] / name / "repo").symlink_to(repo)
    Image.new("RGB", (40, 30), "teal").save(folders["examples"] / "ta_tok" / "photo.jpg")
    reference = expected("published/ta_tok")
    given = {"pixels": reference["pixels_uint8"], "condition": reference["features_scale3"]}
    save_file(given, root / "inputs.safetensors")
    before = {name: contents(repo) for name, repo in repos.items()}

    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    results = {}
    for name, script in (
        ("package", PACKAGE_FIRST),
        ("remote", WITHOUT_PACKAGE),
        ("transformers", TRANSFORMERS_FIRST),
    ):
        caches = {"HF_HOME": str(root / name / "home"), "HF_MODULES_CACHE": str(root / name / "modules")}
        output = root / f"{name}.safetensors"
        arguments = [
            json.dumps({key: str(folder) for key, folder in folders.items()}),
            output,
            root / "inputs.safetensors",
        ]
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(COMMON + script), *arguments],
            stdin=subprocess.DEVNULL,  # nobody there to answer whether the code may run
            capture_output=True,
            text=True,
            cwd=root,
            env=environment | caches,
        )
        assert process.returncode == 0, process.stderr
        results[name] = load_file(output), json.loads(output.with_suffix(".json").read_text())
    assert before == {name: contents(repo) for name, repo in repos.items()}, "loading must not change a repository"
    return results, folders


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("process", "folder"),
    [
        ("package", "converted"),
        ("package", "from_package"),
        ("remote", "converted"),
        ("remote", "from_remote"),
        ("remote", "from_package"),
        ("transformers", "from_remote"),
    ],
)
def test_golden_results_whichever_way(ran, expected, process, folder):
    outputs, _ = ran[0][process]
    ta_tok, ar_detok = expected("published/ta_tok"), expected("published/ar_dtok_64px")
    assert torch.equal(outputs[f"{folder}.codes"], ta_tok["codes_scale3"])
    torch.testing.assert_close(outputs[f"{folder}.features"], ta_tok["features_scale3"], rtol=0, atol=1e-4)
    assert torch.equal(outputs[f"{folder}.ids"], ar_detok["greedy_ids_scale3_cfg4"])


def test_the_package_s_classes_serve_without_the_flag(ran):
    modeling = "tar_hf.modeling."
    names = ["image_processing_ta_tok", "modeling_ar_detok", "modeling_ta_tok"]
    facts = ran[0]["package"][1]
    assert facts["processor"] == modeling + "image_processing_ta_tok"
    assert facts["modules"] == [modeling + name for name in names]
    assert facts["trusted"] == modeling + "modeling_ta_tok"
    facts = ran[0]["transformers"][1]
    assert facts["made"] == [modeling + "modeling_ta_tok"] * 2 + [modeling + "modeling_ar_detok"]
    assert facts["modules"] == [modeling + name for name in names]


def test_without_the_package_the_flag_decides(ran):
    facts = ran[0]["remote"][1]
    assert facts["refused"] == [
        *("AutoConfig ta_tok", "AutoModel ta_tok", "AutoImageProcessor ta_tok"),
        *("AutoConfig ar_detok", "AutoModelForCausalLM ar_detok"),
    ]
    assert facts["modules"] == ["transformers_modules"]


def test_the_examples_of_the_model_cards_run(ran):
    facts = ran[0]["remote"][1]
    assert facts["example ta_tok"] == [1, 729, 48] and facts["example ar_detok"] == [2, 3, 64, 64]


@pytest.mark.parametrize("saved", ["from_package", "from_remote"])
@pytest.mark.parametrize("name", ["ta_tok", "ar_detok"])
def test_saving_again_keeps_every_file_but_the_card(ran, saved, name):
    converted, again = (contents(ran[1][folder] / name) for folder in ("converted", saved))
    del converted["README.md"]
    assert again.keys() == converted.keys()
    for file in converted:
        if file.endswith(".json"):
            assert fields(again[file]) == fields(converted[file]), file
        else:
            assert again[file] == converted[file], file


def fields(content):
    """Without dtypes: the library writes them into a configuration's parts too, but only when it saves again."""
    return json.loads(content, object_hook=lambda part: {name: part[name] for name in part if name != "dtype"})
