"""The transformers task "text-to-image" on the golden system, with the package and without it."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from transformers import pipeline

import tar_hf  # noqa: F401 - makes the task known
from tar_hf.pipelines.pipeline_tar import TarPipeline


@pytest.fixture(scope="module")
def pipe(tar_repo):
    return pipeline("text-to-image", model=str(tar_repo))


def seed(value):
    return torch.Generator().manual_seed(value)


def test_equals_tar_pipeline(pipe, tar_repo):
    item = pipe("a red circle", scale=3, generator=seed(0))
    expected = TarPipeline.from_pretrained(tar_repo)("a red circle", scale=3, generator=seed(0))
    assert item["codes"] == expected.codes[0].tolist()
    assert isinstance(item["image"], Image.Image) and item["image"].tobytes() == expected.images[0].tobytes()
    assert item == pipe("a red circle", generate_kwargs={"scale": 3, "generator": seed(0)})


def test_lists_batches_and_generators_of_inputs(pipe):
    prompts, options = ["a cat", "a longer prompt with a dog", "x"], {"scale": 3, "do_sample": False}

    def codes(items):
        items = list(items)
        assert all(item["image"].size == (64, 64) for item in items)
        return [item["codes"] for item in items]

    one_by_one = codes([pipe(prompt, **options) for prompt in prompts])
    assert codes(pipe(prompts, **options)) == one_by_one
    assert codes(pipe(prompts, batch_size=2, **options)) == one_by_one
    assert codes(pipe((prompt for prompt in prompts), **options)) == one_by_one
    several = pipe(["a cat", "a dog"], num_images_per_prompt=2, scale=3)
    assert [len(items) for items in several] == [2, 2] and several[0][0]["image"].size == (64, 64)


def test_images_in_the_input(pipe):
    picture = Image.new("RGB", (30, 30), "red")
    item = pipe({"prompt": "<image> but blue", "images": picture}, scale=3, image_scale=3)
    assert item["image"].size == (64, 64)
    with pytest.raises(ValueError, match="an input is a prompt"):
        pipe({"text": "a cat"})
    with pytest.raises(ValueError, match=r"a prompt must be text, got \['a cat', 'a dog'\]: pass a list of inputs"):
        pipe({"prompt": ["a cat", "a dog"]})
    with pytest.raises(TypeError, match="temprature"):
        pipe("a cat", temprature=1)


def test_tensors_in_a_batch_of_inputs(pipe, monkeypatch):
    pictures = torch.randint(0, 256, (2, 3, 30, 30), generator=seed(0), dtype=torch.uint8)
    inputs = [{"prompt": "<image> but blue", "images": picture} for picture in pictures]
    options = {"scale": 3, "do_sample": False}
    read, seen = pipe.tar._pixel_values, []
    monkeypatch.setattr(pipe.tar, "_pixel_values", lambda images: seen.append(read(images)) or seen[-1])
    for each in inputs:
        pipe(each, **options)
    pipe(inputs, batch_size=2, **options)
    one, other, *batch = seen
    assert torch.equal(torch.stack(batch), torch.stack([one, other])) and not torch.equal(one, other)


def test_parts_are_fetched_as_the_model_was(tar_repo):
    hub = {"revision": "v1", "token": "hf_x", "local_files_only": True}
    pipe = pipeline("text-to-image", model=str(tar_repo), **hub)
    assert pipe.tar._load_options["hub"] == hub
    own = pipeline("text-to-image", model=str(tar_repo), hub={"token": "hf_y"})
    assert own.tar._load_options["hub"] == {"token": "hf_y"}


def test_other_detokenizer(tar_repo, ar_detok_repo):
    pipe = pipeline("text-to-image", model=str(tar_repo), detokenizer=str(ar_detok_repo("ar_dtok_128px")))
    assert pipe("a cat", scale=3)["image"].size == (128, 128)


def test_saved_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("text-to-image", model=str(tmp_path))
    assert again("a cat", scale=3, do_sample=False)["codes"] == pipe("a cat", scale=3, do_sample=False)["codes"]


@pytest.mark.slow
def test_without_the_package(tar_repo, pipe, tmp_path):
    script = """
    import sys
    sys.modules["tar_hf"] = None
    import json, torch
    from transformers import pipeline

    repo, again = sys.argv[1:]
    try:
        pipeline("text-to-image", model=repo)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise AssertionError("untrusted code ran")
    options = {"scale": 3, "generator": torch.Generator().manual_seed(0)}
    pipe = pipeline("text-to-image", model=repo, trust_remote_code=True)
    codes = [pipe("a red circle", **options)["codes"]]
    pipe.save_pretrained(again)
    options["generator"].manual_seed(0)
    codes.append(pipeline("text-to-image", model=again, trust_remote_code=True)("a red circle", **options)["codes"])
    print(json.dumps(codes))
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", textwrap.dedent(script), tar_repo, tmp_path / "again"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    codes = pipe("a red circle", scale=3, generator=seed(0))["codes"]
    assert output.stdout.splitlines()[-1] == str([codes, codes])
    assert pipeline("text-to-image", model=str(tmp_path / "again"))("a cat", scale=3)["image"].size == (64, 64)
