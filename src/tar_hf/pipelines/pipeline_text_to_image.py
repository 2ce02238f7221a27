"""The transformers task "text-to-image" on Tar repositories: `pipeline("text-to-image", model=...)`.

Serves the installed package through the registry below, and repositories without it through the copy of this file, of
`pipeline_tar.py` and of what that needs, which `TarPipeline.save_pretrained` and `assemble` put beside `config.json`.
"""

from dataclasses import dataclass

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

try:
    from tar_hf._registration import FETCHED_WITH
    from tar_hf.modeling.packed_linear import pack_linears
    from tar_hf.pipelines.pipeline_tar import TarPipeline
except ImportError:  # in a Hub repository, where the files stand side by side
    from .packed_linear import pack_linears
    from .pipeline_tar import TarPipeline

    FETCHED_WITH = {}

TASK = "text-to-image"


@dataclass(frozen=True)
class GivenImages:
    """Of one input. The library would pad, and so spoil, tensors that it finds in a batch of inputs."""

    images: object


class TextToImagePipeline(Pipeline):
    """
    Draws images from prompts.

    ```python
    >>> pipe = pipeline("text-to-image", model="path/or/repo")
    >>> pipe("A photo of a macaw", generate_kwargs={"scale": 2})["image"]
    ```

    Inputs are prompts, `{"prompt": str, "images": ...}` with images for the prompt, lists of either, or generators and
    datasets of them. Each result is `{"image": PIL.Image.Image, "codes": list[int]}`, or a list of those with
    `num_images_per_prompt`.

    Args:
        generate_kwargs (`dict`, *optional*): Options of [`TarPipeline.__call__`], also accepted one by one: `scale`,
            `temperature`, `num_images_per_prompt`, `guidance_scale`, `generator`, ...
        ta_tok, detokenizer (*optional*, when the pipeline is made): Replace the repository's own.
        pack (`bool`, *optional*, when the pipeline is made, defaults to `False`): Pack the weights for drawing on a
            CPU, the model's in place, see `pack_linears`.
        hub (`dict`, *optional*, when the pipeline is made): `revision`, `token` and `local_files_only` of the other
            parts' download. By default as `pipeline` got them, where the package is installed: the library does not
            tell a repository's own code.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    _pipeline_calls_generate = False

    def __init__(self, *args, ta_tok=None, detokenizer=None, pack=False, hub=None, **kwargs):
        super().__init__(*args, **kwargs)
        path = self.model.config.name_or_path
        fetched_with = FETCHED_WITH.pop(str(path), {})
        # Whoever runs the copy of this file in a repository has trusted the repository, and so its parts.
        trust = None if __name__.startswith("tar_hf.") else True
        options = {"dtype": self.model.dtype, "trust_remote_code": trust, "hub": fetched_with if hub is None else hub}
        model = pack_linears(self.model) if pack else self.model
        self.tar = TarPipeline.around(model, self.tokenizer, path, ta_tok, detokenizer, options, pack=pack)

    def _sanitize_parameters(self, generate_kwargs=None, **kwargs):
        return {}, {**kwargs, **(generate_kwargs or {})}, {}

    def preprocess(self, inputs):
        if isinstance(inputs, str):
            inputs = {"prompt": inputs}
        if not isinstance(inputs, dict) or not {"prompt"} <= inputs.keys() <= {"prompt", "images"}:
            raise ValueError(f'an input is a prompt or {{"prompt", "images"}}, got {inputs!r}')
        if not isinstance(inputs["prompt"], str):
            raise ValueError(f"a prompt must be text, got {inputs['prompt']!r}: pass a list of inputs for several")
        return {"prompt": inputs["prompt"], "images": GivenImages(inputs.get("images"))}

    def _forward(self, inputs, **generate_kwargs):
        prompts, given = inputs["prompt"], inputs["images"]
        if isinstance(prompts, str):
            prompts, given = [prompts], [given]
        output = self.tar(prompts, images=[each.images for each in given], **generate_kwargs)
        each = len(output.images) // len(prompts)
        items = [
            {"image": image, "codes": codes.tolist()} for image, codes in zip(output.images, output.codes, strict=True)
        ]
        return {"items": [items[i : i + each] for i in range(0, len(items), each)]}

    def postprocess(self, outputs):
        items = outputs["items"]
        items = items[0] if isinstance(items[0], list) else items  # a batch has been divided into its prompts already
        return items[0] if len(items) == 1 else items

    def save_pretrained(self, save_directory, **kwargs):
        """Saves a Tar repository, as `TarPipeline.save_pretrained` does."""
        if kwargs:
            raise TypeError(f"save_pretrained takes a folder only, got {', '.join(kwargs)}")
        self.tar.save_pretrained(save_directory)


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=TextToImagePipeline, pt_model=AutoModelForCausalLM, type="text"
)
