"""TarPipeline: the whole system behind one call. Text and images in, text or images out.

Paper 2506.18898. A language model with a visual vocabulary writes the codes of an image or reads them; TA-Tok makes
codes from pixels and features from codes; a de-tokenizer draws. Parts load when a call first needs them: describing an
image loads no de-tokenizer, and drawing one no vision encoder.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
)
from transformers.utils import ModelOutput

from .tar_drawing import check_jacobi, code_warpers, draw_codes, visual_logits
from .tar_prompts import IMAGE, SYSTEM, as_lists, check_prompts, check_text, user_turns
from .tar_reflection import Judge
from .tar_repository import PARTS_FILE, RepoFolder, local_folder, named_model, write_pipeline_code
from .tar_sampling import Callback, TextOnly, Watch, known_options, make_generators, report, watch_pixels

try:
    from tar_hf.modeling.packed_linear import pack_linears
    from tar_hf.modeling.seeded_decoding import draw_uniform, seeded_decoding
    from tar_hf.modeling.visual_vocabulary import CODE, IMAGE_END, IMAGE_START, SCALE, VisualVocabulary
except ImportError:  # in a Hub repository, where the files stand side by side
    from .packed_linear import pack_linears
    from .seeded_decoding import draw_uniform, seeded_decoding
    from .visual_vocabulary import CODE, IMAGE_END, IMAGE_START, SCALE, VisualVocabulary

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class TarPipelineOutput(ModelOutput):
    """
    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): One for each prompt and repetition, in order.
        codes (`torch.LongTensor` of shape `(images, N)`): Their codes, 0..K-1.
        scores (`torch.FloatTensor` of shape `(prompts * num_images_per_prompt, candidates)`, *optional*): With
            `self_reflect`: how likely the language model calls each candidate a match.
        picture_scores (`torch.FloatTensor` of the same shape, *optional*): With `self_reflect_pictures`: how likely it
            calls what is read from the candidate's picture a match; NaN for candidates without a picture.
    """

    images: object = None
    codes: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    picture_scores: torch.FloatTensor | None = None


def chat_messages(turns, image_scale=1):
    """Turns `[(role, text)]` -> messages for a chat template, where `<I0>` stands in for all codes of an image.

    Images of the user come without tags, those of the assistant with them.
    """
    messages = []
    for role, text in turns:
        stand_in = CODE.format(0)
        if role == "assistant":
            stand_in = f"{IMAGE_START}{SCALE.format(image_scale - 1)}{stand_in}{IMAGE_END}"
        messages.append({"role": role, "content": text.replace(IMAGE, stand_in)})
    return messages


def _output(pixels, output_type):
    """Pixels (images, 3, H, W) in 0..1 in the form that is asked for."""
    if output_type == "pt":
        return pixels
    arrays = pixels.permute(0, 2, 3, 1).numpy()
    # Truncated, not rounded, as in the original.
    return arrays if output_type == "np" else [Image.fromarray((array * 255).astype("uint8")) for array in arrays]


class TarPipeline:
    """
    Text and images to images or text.

    ```python
    >>> pipe = TarPipeline.from_pretrained("path/or/repo")
    >>> pipe("A photo of a macaw", generator=torch.Generator().manual_seed(0)).images[0]
    >>> pipe.generate_text("Describe the image shortly.", images=image)
    ```

    Sample i depends on its own generator only; the global random state stays as it is. A callback gets the stage
    ("encode", "codes", "pixels", "text"), the step and the total; when it returns `False` the call ends with
    `Interrupted`.

    Args:
        model (`PreTrainedModel` or a function): A causal language model with visual tokens, or what loads it.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        ta_tok (`TATokModel`, `str` or `Path`, *optional*): The image tokenizer, or where it is.
        image_processor (`TATokImageProcessor`, *optional*): By default the one that stands with `ta_tok`.
        detokenizer (*optional*): Anything with `detokenize(features, generator=...)`, or where it is.
        load_options (`dict`, *optional*): What `from_pretrained` of the parts gets.
        pack (`bool`, *optional*, defaults to `False`): See `from_pretrained`. A model that is passed in stays as it is.
    """

    def __init__(
        self, model, tokenizer, ta_tok=None, image_processor=None, detokenizer=None, load_options=None, pack=False
    ):
        self.tokenizer = tokenizer
        self.vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
        self._sources = {"model": model, "ta_tok": ta_tok, "detokenizer": detokenizer}
        self._loaded = {"image_processor": image_processor} if image_processor is not None else {}
        self._load_options = load_options or {}
        self._pack = pack
        self._device = torch.device("cpu")
        if isinstance(model, nn.Module):
            self._loaded["model"] = self._check_rows(model)

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        ta_tok=None,
        detokenizer=None,
        image_processor=None,
        dtype=None,
        device_map=None,
        quantization_config=None,
        attn_implementation: str | None = None,
        pack: bool = False,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool | None = None,
    ) -> "TarPipeline":
        """
        Loads the tokenizer and notes where the parts are.

        Args:
            path (`str` or `Path`): Folder or Hub id. Its root is the language model. "tar-mini" is the small model in
                the package, unless there is a folder of that name.
            ta_tok, detokenizer (*optional*): Replace the repo's own: paths, Hub ids or objects. As the de-tokenizer
                "tar-mini-diffusion" is the diffusion one of the small model, in the package too.
            image_processor (`TATokImageProcessor`, *optional*): For a `ta_tok` that is a model. By default the one that
                stands with its files.
            dtype, device_map, attn_implementation (*optional*): For every part.
            quantization_config (*optional*): For the language model.
            pack (`bool`, *optional*, defaults to `False`): Pack the weights of the language model and of AR-DTok for
                drawing on a CPU, see `pack_linears`. Parts that are passed in as objects stay as they are.
            revision, token, local_files_only, trust_remote_code (*optional*): For every download from `path`.
        """
        path, detokenizer = named_model(path), named_model(detokenizer)
        hub = {"revision": revision, "token": token, "local_files_only": local_files_only}
        options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        options = {name: value for name, value in options.items() if value is not None}
        root = local_folder(path, ["*.json", "*.txt", "*.jinja", "*.py"], ["ta_tok/*", "detokenizer/*"], **hub)
        tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=trust_remote_code)
        quantization = {} if quantization_config is None else {"quantization_config": quantization_config}

        def load():
            root = local_folder(path, ["*"], ["ta_tok/*", "detokenizer/*"], **hub)
            return AutoModelForCausalLM.from_pretrained(
                root, trust_remote_code=trust_remote_code, **options, **quantization
            )

        part_options = {**options, "trust_remote_code": trust_remote_code, "hub": hub}
        return cls.around(load, tokenizer, path, ta_tok, detokenizer, part_options, image_processor, pack)

    @classmethod
    def around(
        cls, model, tokenizer, path, ta_tok=None, detokenizer=None, load_options=None, image_processor=None, pack=False
    ) -> "TarPipeline":
        """A pipeline of a language model, or what loads it, with the parts that its repository `path` names."""
        hub = (load_options or {}).get("hub", {})
        notes = local_folder(path, [PARTS_FILE], [], **hub) / PARTS_FILE
        parts = json.loads(notes.read_text()) if notes.is_file() else {}
        sources = {}
        for name, given in (("ta_tok", ta_tok), ("detokenizer", detokenizer)):
            noted = parts.get(name, name)
            if given is None and noted == name:  # a folder of this repository, fetched when it is needed
                inside = RepoFolder(path, name, hub)
                sources[name] = inside if inside.exists() else None
            else:
                sources[name] = noted if given is None else given
        return cls(model, tokenizer, **sources, image_processor=image_processor, load_options=load_options, pack=pack)

    def save_pretrained(self, folder: str | Path):
        """Writes the language model at the root, and the parts that were given as objects or local folders below it."""
        folder = Path(folder)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        parts = {}
        for name, source in self._sources.items():
            if source is None or name == "model":
                continue
            if isinstance(source, str) and not Path(source).is_dir():
                parts[name] = source  # a Hub id stays a reference
                continue
            parts[name] = name
            if name == "ta_tok":
                model = source if isinstance(source, nn.Module) else self._load_ta_tok()
                model.save_pretrained(folder / name)
                self.image_processor.save_pretrained(folder / name)
            else:
                self.detokenizer.save_pretrained(folder / name)
        (folder / PARTS_FILE).write_text(json.dumps(parts, indent=2) + "\n")
        write_pipeline_code(folder)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Saves, checks that the folder loads without this package, uploads. `kwargs` are those of `push_folder`."""
        try:  # as above: what is imported outside of a `try` must be there for the repository's code to load
            from tar_hf.conversion.assemble import write_tar_card
            from tar_hf.conversion.publish import push_folder
        except ImportError as error:
            raise ImportError("pushing needs the package: pip install tar-hf") from error

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder)
            write_tar_card(folder, repo_id)
            return push_folder(folder, repo_id, **kwargs)

    # Parts

    @property
    def device(self) -> torch.device:
        """Where the language model is, or, before it is loaded, another part, or where they will be."""
        loaded = [self._loaded[name] for name in ("model", "decoder", "encoder") if name in self._loaded]
        return loaded[0].device if loaded else self._device

    def to(self, device: str | torch.device) -> "TarPipeline":
        """Moves the parts that are loaded; the others will load there."""
        self._device = torch.device(device)
        for part in self._loaded.values():
            if hasattr(part, "to"):
                part.to(device)
        return self

    @property
    def model(self):
        """The language model."""
        if "model" not in self._loaded:
            model = self._check_rows(self._sources["model"]().eval())
            placed = "device_map" in self._load_options or getattr(model, "is_quantized", False)
            self._loaded["model"] = self._packed(model if placed else model.to(self._device))
        return self._loaded["model"]

    def _packed(self, model):
        return pack_linears(model) if self._pack else model

    def _check_rows(self, model):
        rows = model.get_input_embeddings().weight.shape[0]
        if rows < self.vocabulary.vocab_size:
            raise ValueError(
                f"the tokenizer's codes end at id {self.vocabulary.vocab_size - 1}, but the model has {rows} rows"
            )
        return model

    def free(self, *names: str):
        """Forgets loaded parts, all or those named: "model", "encoder", "decoder", "detokenizer". They load again on
        demand; a part that was passed in as an object stays the caller's."""
        known = ("model", "encoder", "decoder", "detokenizer")
        for name in names or known:
            if name not in known:
                raise ValueError(f"parts are {', '.join(known)}, got {name!r}")
            source = self._sources["ta_tok" if name in ("encoder", "decoder") else name]
            if isinstance(source, str | Path | RepoFolder) or (name == "model" and not isinstance(source, nn.Module)):
                self._loaded.pop(name, None)

    @property
    def encoder(self):
        """The half of TA-Tok that makes codes from pixels."""
        return self._ta_tok_half("encoder", "decoder")

    @property
    def decoder(self):
        """The half of TA-Tok that makes features from codes."""
        return self._ta_tok_half("decoder", "encoder")

    @property
    def image_processor(self):
        if "image_processor" not in self._loaded:
            source = self._source("ta_tok", "reading images")
            if isinstance(source, nn.Module):
                raise ValueError("ta_tok was passed as a model: pass image_processor= too")
            options = {"trust_remote_code": self._load_options.get("trust_remote_code")}
            self._loaded["image_processor"] = AutoImageProcessor.from_pretrained(self._fetch(source), **options)
        return self._loaded["image_processor"]

    @property
    def detokenizer(self):
        """What draws pixels from features."""
        if "detokenizer" not in self._loaded:
            source = self._source("detokenizer", "drawing images")
            if isinstance(source, str | Path | RepoFolder):
                self._loaded["detokenizer"] = self._load_detokenizer(self._fetch(source))
            elif hasattr(source, "detokenize"):
                self._loaded["detokenizer"] = source
            else:
                raise TypeError(f"a de-tokenizer needs a method detokenize(features), got {type(source).__name__}")
        return self._loaded["detokenizer"]

    def _source(self, name, purpose):
        source = self._sources[name]
        if source is None:
            raise ValueError(f"{purpose} needs {name}, which this repository has not: pass {name}= a folder or a model")
        return source

    def _fetch(self, source) -> Path:
        if isinstance(source, RepoFolder):
            return source.fetch()
        # Another repository: the revision is one of this.
        return local_folder(source, ["*"], [], **{**self._load_options.get("hub", {}), "revision": None})

    def _ta_tok_half(self, half, other):
        if half not in self._loaded:
            source = self._source("ta_tok", {"encoder": "reading images", "decoder": "drawing images"}[half])
            if isinstance(source, nn.Module):
                self._loaded[half] = source
            else:
                self._loaded[half] = self._load_ta_tok(**{f"has_{other}": False})
                if other in self._loaded:  # the codebook is the largest part of either half
                    self._loaded[half].quantizer = self._loaded[other].quantizer
        return self._loaded[half]

    def _load_ta_tok(self, **kwargs):
        options = {name: value for name, value in self._load_options.items() if name != "hub"}
        model = AutoModel.from_pretrained(self._fetch(self._sources["ta_tok"]), **options, **kwargs).eval()
        return model if "device_map" in options else model.to(self.device)

    def _load_detokenizer(self, folder):
        options = {name: value for name, value in self._load_options.items() if name != "hub"}
        if (folder / "model_index.json").is_file():
            from diffusers import DiffusionPipeline

            dtype = {"torch_dtype": options["dtype"]} if "dtype" in options else {}
            trust = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
            return DiffusionPipeline.from_pretrained(folder, ta_tok=None, **dtype, **trust).to(self.device)
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        if not hasattr(model, "detokenize"):
            raise ValueError(f"{folder} holds no de-tokenizer but a {type(model).__name__}")
        return self._packed(model if "device_map" in options else model.to(self.device))

    def _check_detokenizer(self, options):
        """Refuses a de-tokenizer of another width, and options that it does not know, before anything is drawn."""
        detokenizer = self.detokenizer
        width = getattr(detokenizer, "condition_size", None) or getattr(
            getattr(detokenizer, "config", None), "condition_size", None
        )
        if width not in (None, self.decoder.config.hidden_size):
            raise ValueError(
                f"the de-tokenizer draws from features of width {width}, but this TA-Tok makes "
                f"{self.decoder.config.hidden_size}"
            )
        if unknown := options.keys() - known_options(detokenizer):
            raise TypeError(f"{type(detokenizer).__name__} has no option {min(unknown)}")

    # Images

    @torch.no_grad()
    def encode(self, images, scale: int = 1, callback: Callback | None = None) -> torch.LongTensor:
        """
        Images to codes.

        Args:
            images: One image, or a list: whatever `TATokImageProcessor` takes.
            scale (`int`, *optional*, defaults to `1`): 729, 169 or 81 codes an image for 1, 2, 3.
            callback (*optional*): See the class.

        Returns:
            `torch.LongTensor` of shape `(images, N)`.
        """
        return self._encode(self._pixel_values(images), scale, callback)

    def _pixel_values(self, images):
        return self.image_processor(images, return_tensors="pt").pixel_values

    @torch.no_grad()
    def _encode(self, pixels, scale, callback):
        codes = []
        for i, image in enumerate(pixels.split(1), 1):  # one at a time: a batch is no faster and needs its memory
            codes.append(self.encoder.encode(image.to(self.encoder.device), scale=scale))
            report(callback, "encode", i, len(pixels))
        return torch.cat(codes)

    @torch.no_grad()
    def decode(
        self,
        codes: torch.LongTensor,
        guidance_scale: float | None = None,
        generator=None,
        output_type: str = "pil",
        callback: Callback | None = None,
        **kwargs,
    ):
        """
        Codes to images.

        Args:
            codes (`torch.LongTensor` of shape `(images, N)`): Codes 0..K-1 of one scale.
            guidance_scale (`float`, *optional*): Of the de-tokenizer, see `default_guidance_scale`; 1 turns it off.
            generator (`torch.Generator` or one for each image, *optional*): Source of the draws.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` (images, H, W, 3) or `"pt"`
                (images, 3, H, W), the last two in 0..1.
            callback (*optional*): See the class.
            kwargs: Further options of the de-tokenizer.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        generators = make_generators(generator, len(codes))
        self._check_detokenizer(kwargs)
        return _output(self._pixels(codes, guidance_scale, generators, callback, kwargs), output_type)

    @torch.no_grad()
    def _pixels(self, codes, guidance_scale, generators, callback, options):
        """Codes (images, N) -> pixels (images, 3, H, W) in 0..1, in float32 on the CPU."""
        detokenizer = self.detokenizer
        features = self.decoder.decode(codes.to(self.decoder.device))
        pixels = detokenizer.detokenize(
            features,
            generator=generators,
            guidance_scale=self.default_guidance_scale if guidance_scale is None else guidance_scale,
            **watch_pixels(detokenizer, callback),
            **options,
        )
        return pixels.float().cpu()

    def reconstruct(self, image, scale: int = 1, callback: Callback | None = None, **kwargs):
        """Image to codes to image; a list gives a list. `kwargs` are those of `decode`."""
        codes = self.encode(image, scale=scale, callback=callback)
        images = self.decode(codes, callback=callback, **kwargs)
        return images if isinstance(image, list | tuple) else images[0]

    # Drawing

    @property
    def default_guidance_scale(self) -> float:
        """What guides unless a call says otherwise: the one of the de-tokenizer's `generation_config`, or its
        `default_guidance_scale` in `model_index.json`, or 4."""
        detokenizer = self.detokenizer
        settings = getattr(detokenizer, "generation_config", None)
        index = getattr(detokenizer, "config", None)
        return getattr(settings, "guidance_scale", None) or getattr(index, "default_guidance_scale", None) or 4.0

    @property
    def default_self_reflect(self) -> int | None:
        """How many candidates a call draws unless it says otherwise: `self_reflect` in the language model's
        `generation_config`."""
        return getattr(self.model.generation_config, "self_reflect", None)

    @property
    def default_self_reflect_pictures(self) -> int | None:
        """Up to how many candidates a call turns into pixels unless it says otherwise: `self_reflect_pictures` in the
        language model's `generation_config`."""
        return getattr(self.model.generation_config, "self_reflect_pictures", None)

    @property
    def default_prompt_guidance_scale(self) -> float:
        """How much a prompt guides unless a call says otherwise: `prompt_guidance_scale` in the language model's
        `generation_config`, or 1, not at all, as the original draws."""
        return getattr(self.model.generation_config, "prompt_guidance_scale", None) or 1.0

    def __call__(
        self,
        prompt: str | list[str],
        images=None,
        scale: int = 1,
        image_scale: int = 1,
        num_images_per_prompt: int = 1,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_p: float = 0.95,
        top_k: int = 1200,
        guidance_scale: float | None = None,
        prompt_guidance_scale: float | None = None,
        self_reflect: int | None = None,
        self_reflect_pictures: int | None = None,
        jacobi_window: int | None = None,
        generator=None,
        output_type: str = "pil",
        callback: Callback | None = None,
        **kwargs,
    ) -> TarPipelineOutput:
        """
        Draws images from text, or from text and images.

        Args:
            prompt (`str` or `list[str]`): What to draw. `<image>` marks where an image goes.
            images (*optional*): For one prompt an image or a list; for a list of prompts a list with an image, a list
                or `None` for each. Without marks they come first.
            scale (`int`, *optional*, defaults to `1`): Of the drawn images: 729, 169 or 81 codes for 1, 2, 3.
            image_scale (`int`, *optional*, defaults to `1`): Of the images in the prompt.
            num_images_per_prompt (`int`, *optional*, defaults to `1`): Images for each prompt.
            do_sample, temperature, top_p, top_k: How the language model draws codes. `top_k=0` is no limit.
            guidance_scale (`float`, *optional*): Of the de-tokenizer, see `default_guidance_scale`; 1 turns it off.
            prompt_guidance_scale (`float`, *optional*): Of the language model: how far it is led away from the codes
                that it would draw on an empty request, which it has to have learnt (`prompt_dropout` in training); 1
                turns it off, and by default it is as `default_prompt_guidance_scale` says. Twice the rows a step.
            self_reflect (`int`, *optional*): Draws so many candidates for each image, lets the language model judge
                them by their codes, and only turns the best into pixels: the paper's self-reflection. A variation
                ("Generate an image similar to <image>") is judged by whether the model would describe it as it does
                the given image. 1 turns it off, and by default it is as `default_self_reflect` says.
            self_reflect_pictures (`int`, *optional*): Turns up to so many candidates, the best by their codes, into
                pixels, reads them again and judges what it reads too: codes that are meant for one shape may come out
                as another. Takes TA-Tok's encoder. 1 turns it off, and by default it is as
                `default_self_reflect_pictures` says.
            jacobi_window (`int`, *optional*): Draws so many codes, and VQ tokens of AR-DTok, at once, and keeps what
                drawing one by one would have drawn: the same images in fewer steps, see `jacobi_decode`.
            generator (`torch.Generator` or a list with one for each image, *optional*): Source of all draws.
            output_type, callback, kwargs: As in `decode`.

        Returns:
            `TarPipelineOutput`.
        """
        prompts, images, _ = as_lists(prompt, images)
        check_prompts(prompts, images)
        candidates = (self.default_self_reflect or 1) if self_reflect is None else self_reflect
        pictures = (self.default_self_reflect_pictures or 1) if self_reflect_pictures is None else self_reflect_pictures
        counts = {"num_images_per_prompt": num_images_per_prompt, "self_reflect": candidates}
        for name, value in {**counts, "self_reflect_pictures": pictures}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if prompt_guidance_scale is None:
            prompt_guidance_scale = self.default_prompt_guidance_scale
        if not prompt_guidance_scale >= 1:
            raise ValueError(f"prompt_guidance_scale must be at least 1, got {prompt_guidance_scale}")
        self.vocabulary.scale_id(scale)
        generators = make_generators(generator, len(prompts) * num_images_per_prompt)
        self._source("detokenizer", "drawing images")
        self._source("ta_tok", "drawing images")
        tokens = self.decoder.config.num_tokens(scale)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if jacobi_window is not None:
            check_jacobi(self.model, jacobi_window)
            if isinstance(self.detokenizer, GenerationMixin):
                kwargs["jacobi_window"] = jacobi_window
        self._check_detokenizer(kwargs)

        given = self._read(images, image_scale, callback)
        rows = self._drawing_rows(prompts, given, scale)
        empty = self._drawing_rows([""], [[]], scale)[0] if prompt_guidance_scale != 1 else None
        uniform = draw_uniform(len(generators), candidates * tokens, generators, "cpu").view(-1, tokens)
        options = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        options |= {"guidance_scale": prompt_guidance_scale, "empty": empty, "jacobi_window": jacobi_window}
        codes = self._draw_codes(rows, uniform, callback=callback, **options)
        if candidates == 1:
            pixels = self._pixels(codes, guidance_scale, generators, callback, kwargs)
            return TarPipelineOutput(images=_output(pixels, output_type), codes=codes)

        codes = codes.unflatten(0, (len(generators), candidates))
        judge = Judge(self, list(zip(prompts, given, strict=True)), callback)
        logits = judge(codes)
        best = logits.argsort(dim=-1, descending=True, stable=True)[:, :pictures]
        codes = codes.gather(1, best[..., None].expand(-1, -1, tokens))
        generators = [own for generator in generators for own in make_generators(generator, codes.shape[1])]
        pixels = self._pixels(codes.flatten(0, 1), guidance_scale, generators, callback, kwargs)
        picture_scores = None
        if codes.shape[1] > 1:
            read = self._encode(self._pixel_values(_output(pixels, "pil")), scale, callback)
            picture_logits = judge(read.view_as(codes).cpu())
            picture_scores = torch.full_like(logits, torch.nan).scatter(1, best, picture_logits.sigmoid())
            chosen = (logits.gather(1, best) + picture_logits).argmax(-1)
            rows = torch.arange(len(codes))
            codes, pixels = codes[rows, chosen, None], pixels.unflatten(0, codes.shape[:2])[rows, chosen]
        return TarPipelineOutput(
            images=_output(pixels, output_type),
            codes=codes.flatten(0, 1),
            scores=logits.sigmoid(),
            picture_scores=picture_scores,
        )

    def _drawing_rows(self, prompts, given, scale):
        """Prompts, and the codes of each one's images, as the token ids that an image is drawn behind."""
        return [
            self._prompt_ids(user_turns(text), codes, drawing=scale) for text, codes in zip(prompts, given, strict=True)
        ]

    def _draw_codes(
        self,
        rows,
        uniform,
        do_sample,
        temperature,
        top_p,
        top_k,
        guidance_scale=1.0,
        empty=None,
        jacobi_window=None,
        callback=None,
    ):
        """Prompts as token ids, and one uniform number a code (images, N) -> codes (images, N).

        Each prompt gets as many images. With `empty`, the row of an empty request, guidance leads away from it.
        """
        images, tokens = uniform.shape
        sources = torch.arange(len(rows)).repeat_interleave(images // len(rows))  # of each row that is drawn
        if empty is not None:
            sources = torch.cat([sources, torch.full_like(sources, len(rows))])
            rows = [*rows, empty]
        return draw_codes(
            self.model,
            self.vocabulary,
            *self._pad(rows),
            sources,
            uniform,
            warpers=code_warpers(temperature, top_p, top_k) if do_sample else None,
            guidance_scale=None if empty is None else guidance_scale,
            jacobi_window=jacobi_window,
            on_step=lambda known: report(callback, "codes", known, tokens),
        )

    def code_logits(
        self, prompt: str | list[str], codes: torch.LongTensor, images=None, scale: int = 1, image_scale: int = 1
    ) -> torch.FloatTensor:
        """
        What the language model expects of codes that are drawn from prompts. Gradients flow.

        Args:
            prompt, images, image_scale: As for a call.
            codes (`torch.LongTensor` of shape `(prompts * copies, N)`): What was drawn, the copies of a prompt side by
                side.
            scale (`int`, *optional*, defaults to `1`): Of the codes.

        Returns:
            `torch.FloatTensor` of shape `(prompts * copies, N, K)`: logits over all codes for each, in float32.
        """
        prompts, images, _ = as_lists(prompt, images)
        check_prompts(prompts, images)
        if codes.ndim != 2 or not len(codes) or len(codes) % len(prompts):
            raise ValueError(
                f"codes must have the shape (images, tokens), with as many for each of {len(prompts)} prompts, got "
                f"{tuple(codes.shape)}"
            )
        rows = self._drawing_rows(prompts, self._read(images, image_scale, None), scale)
        ids, mask = (t.repeat_interleave(len(codes) // len(prompts), 0) for t in self._pad(rows))
        known = codes[:, :-1].to(ids.device)
        ids = torch.cat([ids, known + self.vocabulary.first_code_id], 1)
        mask = torch.cat([mask, torch.ones_like(known)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return visual_logits(self.model, self.vocabulary, ids, mask, positions, None, last=codes.shape[1])

    # Understanding

    def generate_text(
        self,
        prompt: str | list[str],
        images=None,
        scale: int = 1,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        generator=None,
        callback: Callback | None = None,
        **kwargs,
    ) -> str | list[str]:
        """
        Text from text, or from images and text.

        Args:
            prompt (`str` or `list[str]`): A question or instruction. `<image>` marks where an image goes.
            images (*optional*): As in `__call__`.
            scale (`int`, *optional*, defaults to `1`): Of the images in the prompt.
            max_new_tokens (`int`, *optional*, defaults to `256`): Longest answer in tokens.
            do_sample (`bool`, *optional*, defaults to `False`): Sampling instead of the likeliest token.
            generator (`torch.Generator` or a list with one for each prompt, *optional*): Source of the draws.
            callback (*optional*): See the class.
            kwargs: Further options of the language model's `generate`. Beam search goes with `do_sample=False`.

        Returns:
            `str`, or `list[str]` for a list.
        """
        prompts, images, single = as_lists(prompt, images)
        check_prompts(prompts, images)
        rows = [
            self._prompt_ids(user_turns(text), codes)
            for text, codes in zip(prompts, self._read(images, scale, callback), strict=True)
        ]
        texts = self._write(rows, max_new_tokens, do_sample, generator, callback, **kwargs)
        return texts[0] if single else texts

    def chat(self, messages: list[dict], scale: int = 1, **kwargs) -> str:
        """
        The next answer of a conversation.

        Args:
            messages (`list[dict]`): `{"role", "content"}`, where the content is text or a list of parts
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`. Images may stand in user turns
                and, drawn earlier, in assistant turns.
            scale (`int`, *optional*, defaults to `1`): Of the images in the conversation.
            kwargs: As in `generate_text`.
        """
        turns, given = [], []
        for message in messages:
            content, role = message["content"], message["role"]
            if isinstance(content, str):
                if IMAGE in content:
                    raise ValueError('in chat an image is a part {"type": "image", "image": ...}, not the mark <image>')
                turns.append((role, content))
                continue
            text = ""
            for part in content:
                if part["type"] == "image":
                    given.append(part["image"])
                    text += IMAGE if role == "assistant" else f"{IMAGE}\n"
                elif part["type"] == "text":
                    text += part["text"]
                else:
                    raise ValueError(f"a part of a message is text or image, got {part['type']!r}")
            turns.append((role, text))
        for _, text in turns:
            check_text(text)
        if not turns or turns[-1][0] == "assistant":
            raise ValueError("the last message must be the user's")
        if turns[0][0] != "system":
            turns.insert(0, ("system", SYSTEM))
        callback = kwargs.pop("callback", None)
        row = self._prompt_ids(turns, self._read([given], scale, callback)[0], image_scale=scale)
        options = {"max_new_tokens": 256, "do_sample": False, "generator": None, **kwargs}
        return self._write([row], callback=callback, **options)[0]

    @torch.no_grad()
    def _write(self, rows, max_new_tokens, do_sample, generator, callback, **kwargs):
        ids, mask = self._pad(rows)
        if not do_sample and generator is not None:
            raise ValueError("generator only applies when text is sampled: pass do_sample=True")
        loop = None  # the library's own, with beams too
        if do_sample:
            if kwargs.get("num_beams", 1) > 1:
                raise ValueError(
                    f"text is sampled token by token, each by its own generator: num_beams={kwargs['num_beams']} only "
                    "goes with do_sample=False"
                )
            generators = make_generators(generator, len(rows))
            loop = seeded_decoding(
                lambda rows, device: draw_uniform(rows, max_new_tokens, generators, device),
                streamer=kwargs.get("streamer"),
            )

        sequences = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            custom_generate=loop,
            logits_processor=[TextOnly(self.vocabulary), *(kwargs.pop("logits_processor", None) or [])],
            stopping_criteria=[
                Watch(callback, ids.shape[1], max_new_tokens),
                *(kwargs.pop("stopping_criteria", None) or []),
            ],
            **kwargs,
        )
        return self.tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)

    # Prompts

    def _read(self, images, scale, callback):
        """The images of each prompt as a list of codes (N,). All are opened before the first is encoded."""
        opened = [self._pixel_values(given) if given else None for given in images]
        return [[] if pixels is None else list(self._encode(pixels, scale, callback)) for pixels in opened]

    def _prompt_ids(self, turns, codes, drawing=None, image_scale=1):
        """Token ids of a conversation `[(role, text)]` whose k-th `<image>` is `codes[k]`.

        With `drawing=s` the assistant's turn is opened as far as `<im_start><S{s-1}>`.
        """
        messages = chat_messages(turns, image_scale)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if drawing is not None:
            text += IMAGE_START + SCALE.format(drawing - 1)
        ids = []
        remaining = iter(codes)
        for token in self.tokenizer(text).input_ids:
            if token == self.vocabulary.first_code_id:  # one code stands in for all of an image's
                ids += self.vocabulary.codes_to_ids(next(remaining)).tolist()
            else:
                ids.append(token)
        return ids

    def _pad(self, rows):
        """Rows of token ids, padded on the left, and their mask."""
        length = max(map(len, rows))
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        return ids, mask
