"""`tar-hf describe`: prints what TarPipeline answers."""

from PIL import Image


def test_answers_are_those_of_the_pipeline(run, pipe, picture):
    options = {"images": Image.open(picture), "scale": 3, "max_new_tokens": 5}
    given = ["--scale", 3, "--max-new-tokens", 5]
    plain = pipe.generate_text("Describe the image shortly.", **options)
    assert run("describe", picture, *given) == (0, f"{plain}\n".splitlines(), [])
    asked = pipe.generate_text("Is <image> red?", **options)
    assert run("describe", picture, "Is <image> red?", *given) == (0, f"{asked}\n".splitlines(), [])


def test_needs_no_detokenizer(run, without_detokenizer, picture):
    assert run("describe", picture, "--scale", 3, "--max-new-tokens", 2, model=without_detokenizer)[0] == 0
