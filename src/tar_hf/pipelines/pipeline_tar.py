"""TarPipeline: the whole system behind one call. Text and images in, text or images out.

Paper 2506.18898. A language model with a visual vocabulary writes the codes of an image or reads them; TA-Tok makes
codes from pixels and features from codes; a de-tokenizer draws. Parts load when a call first needs them: describing an
image loads no de-tokenizer, and drawing one no vision encoder.
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import CompileConfig, GenerationMixin
from transformers.utils import ModelOutput

from .tar_drawing import check_jacobi, check_static, code_warpers, draw_codes, visual_logits
from .tar_parts import TarParts
from .tar_prompts import IMAGE, as_lists, chat_messages, check_prompts, turns_of_chat, user_turns
from .tar_reflection import Judge, choose
from .tar_sampling import Callback, TextOnly, Watch, make_generators, report, watch_pixels

try:
    from tar_hf.modeling.seeded_decoding import NumbersOnly, draw_uniform, seeded_decoding
    from tar_hf.modeling.visual_vocabulary import IMAGE_START, SCALE
except ImportError:  # in a Hub repository, where the files stand side by side
    from .seeded_decoding import NumbersOnly, draw_uniform, seeded_decoding
    from .visual_vocabulary import IMAGE_START, SCALE

OUTPUT_TYPES = ("pil", "np", "pt")
ENCODED_TOGETHER = 16  # images, where there is an accelerator


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
        chosen (`torch.LongTensor` of shape `(prompts * num_images_per_prompt,)`, *optional*): With `self_reflect`:
            which candidate each image is.
    """

    images: object = None
    codes: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    picture_scores: torch.FloatTensor | None = None
    chosen: torch.LongTensor | None = None


def _output(pixels, output_type):
    """Pixels (images, 3, H, W) in 0..1 in the form that is asked for."""
    if output_type == "pt":
        return pixels
    arrays = pixels.permute(0, 2, 3, 1).numpy()
    # Truncated, not rounded, as in the original.
    return arrays if output_type == "np" else [Image.fromarray((array * 255).astype("uint8")) for array in arrays]


class TarPipeline(TarParts):
    """
    Text and images to images or text.

    ```python
    >>> pipe = TarPipeline.from_pretrained("path/or/repo")
    >>> pipe("A photo of a macaw", generator=torch.Generator().manual_seed(0)).images[0]
    >>> pipe.generate_text("Describe the image shortly.", images=image)
    ```

    Sample i depends on its own generator only; the global random state stays as it is. A callback gets the stage
    ("encode", "codes", "pixels", "text"), the step and the total; when it returns `False` the call ends with
    `Interrupted`. `from_pretrained` makes one, and so do parts that are at hand, as `TarParts` takes them.
    """

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
        codes, device = [], self.encoder.device
        # On a CPU one at a time: a batch is no faster there, and needs its memory.
        for part in pixels.split(1 if device.type == "cpu" else ENCODED_TOGETHER):
            codes.append(self.encoder.encode(part.to(device), scale=scale))
            report(callback, "encode", sum(map(len, codes)), len(pixels))
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
        self._check_detokenizer(guidance_scale, callback, kwargs)
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
        """Image to codes to image; a list, or a batch of 4 dimensions, gives a list. `kwargs` are those of `decode`."""
        codes = self.encode(image, scale=scale, callback=callback)
        images = self.decode(codes, callback=callback, **kwargs)
        several = isinstance(image, list | tuple) or getattr(image, "ndim", 3) == 4
        return images if several else images[0]

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
    def default_self_reflect_likelihood(self) -> float:
        """How much the likelihood of a candidate's picture counts unless a call says otherwise:
        `self_reflect_likelihood` in the language model's `generation_config`, or 0, nothing."""
        return getattr(self.model.generation_config, "self_reflect_likelihood", None) or 0.0

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
        self_reflect_likelihood: float | None = None,
        jacobi_window: int | None = None,
        cache_implementation: str | None = None,
        compile_config: CompileConfig | None = None,
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
            self_reflect_likelihood (`float`, *optional*): Between these pictures decides, beside the judgement, how
                likely the model would have drawn what it reads of them: so much of the log-likelihood of all of a
                picture's codes, in nats, is added to the log-odds of the judgement. How much is right has to be
                measured with the model, and is the less the more codes an image has. 0 turns it off, and by default it
                is as `default_self_reflect_likelihood` says.
            jacobi_window (`int`, *optional*): Draws so many codes, and VQ tokens of AR-DTok, at once, and keeps what
                drawing one by one would have drawn: the same images in fewer steps, see `jacobi_decode`.
            cache_implementation (`str`, *optional*): `"static"` draws codes, and VQ tokens of AR-DTok, in steps of
                fixed shapes, which a GPU runs compiled and as CUDA graphs: the first calls take the time to compile.
            compile_config (`CompileConfig`, *optional*): How these steps are compiled, see the library's `generate`.
                With its `_compile_all_devices` on a CPU, too.
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
        likelihood = self_reflect_likelihood
        if likelihood is None:
            likelihood = self.default_self_reflect_likelihood
        if not 0 <= likelihood < math.inf:
            raise ValueError(f"self_reflect_likelihood must be at least 0, and finite, got {likelihood}")
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
        check_static(self.model, cache_implementation, compile_config, jacobi_window)
        if jacobi_window is not None:
            check_jacobi(self.model, jacobi_window)
        step_options = {
            "jacobi_window": jacobi_window,
            "cache_implementation": cache_implementation,
            "compile_config": compile_config,
        }
        if isinstance(self.detokenizer, GenerationMixin):
            kwargs |= {name: value for name, value in step_options.items() if value is not None}
        self._check_detokenizer(guidance_scale, callback, kwargs)
        if candidates > 1 and pictures > 1:
            _ = self.image_processor  # raises where there is none, before anything is drawn

        given = self._read(images, image_scale, callback)
        rows = self._drawing_rows(prompts, given, scale)
        empty = self._drawing_rows([""], [[]], scale)[0] if prompt_guidance_scale != 1 else None
        uniform = draw_uniform(len(generators), candidates * tokens, generators, "cpu").view(-1, tokens)
        options = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        options |= {"guidance_scale": prompt_guidance_scale, "empty": empty}
        codes = self._draw_codes(rows, uniform, callback=callback, **options, **step_options)

        def draw(codes, generators):
            return self._pixels(codes, guidance_scale, generators, callback, kwargs)

        def read(pixels):
            return self._encode(self._pixel_values(_output(pixels, "pil")), scale, callback).cpu()

        if candidates == 1:
            return TarPipelineOutput(images=_output(draw(codes, generators), output_type), codes=codes)
        judge = Judge(self, list(zip(prompts, given, strict=True)), scale, likelihood, callback)
        codes = codes.unflatten(0, (len(generators), candidates))
        choice = choose(judge, codes, generators, pictures, draw, read)
        return TarPipelineOutput(
            images=_output(choice.pixels, output_type),
            codes=choice.codes,
            scores=choice.scores,
            picture_scores=choice.picture_scores,
            chosen=choice.chosen,
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
        callback=None,
        **step_options,
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
            on_step=lambda known: report(callback, "codes", known, tokens),
            **step_options,
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
        self.vocabulary.scale_id(scale)
        if codes.ndim != 2 or not len(codes) or len(codes) % len(prompts):
            raise ValueError(
                f"codes must have the shape (images, tokens), with as many for each of {len(prompts)} prompts, got "
                f"{tuple(codes.shape)}"
            )
        rows = self._drawing_rows(prompts, self._read(images, image_scale, None), scale)
        return self._code_logits(rows, codes)

    def _code_logits(self, rows, codes):
        """Prompts as token ids, and codes drawn from them (prompts * copies, N) -> logits (prompts * copies, N, K)."""
        ids, mask = (t.repeat_interleave(len(codes) // len(rows), 0) for t in self._pad(rows))
        known = self.vocabulary.codes_to_ids(codes)[:, :-1].to(ids.device)
        ids = torch.cat([ids, known], 1)
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
        turns, given = turns_of_chat(messages)
        callback = kwargs.pop("callback", None)
        row = self._prompt_ids(turns, self._read([given], scale, callback)[0], image_scale=scale)
        options = {"max_new_tokens": 256, "do_sample": False, "generator": None, **kwargs}
        return self._write([row], callback=callback, **options)[0]

    @torch.no_grad()
    def _write(self, rows, max_new_tokens, do_sample, generator, callback, **kwargs):
        ids, mask = self._pad(rows)
        settings = kwargs.get("generation_config")

        def asked(name):
            return kwargs.get(name, getattr(settings, name, None) or 1)

        if (answers := asked("num_return_sequences")) != 1:
            raise ValueError(f"one answer is given for each prompt, num_return_sequences={answers}: repeat the prompt")
        if not do_sample and generator is not None:
            raise ValueError("generator only applies when text is sampled: pass do_sample=True")
        loop = None  # the library's own, with beams too
        if do_sample:
            if (beams := asked("num_beams")) > 1:
                raise ValueError(
                    f"text is sampled token by token, each by its own generator: num_beams={beams} only goes with "
                    "do_sample=False"
                )
            generators = make_generators(generator, len(rows))
            loop = seeded_decoding(
                lambda rows, device: draw_uniform(rows, max_new_tokens, generators, device),
                streamer=kwargs.get("streamer"),
            )

        numbers = NumbersOnly()
        written = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            custom_generate=loop,
            logits_processor=[numbers, TextOnly(self.vocabulary), *(kwargs.pop("logits_processor", None) or [])],
            stopping_criteria=[
                Watch(callback, ids.shape[1], max_new_tokens),
                *(kwargs.pop("stopping_criteria", None) or []),
            ],
            **kwargs,
        )
        numbers.check()
        sequences = written if isinstance(written, torch.Tensor) else written.sequences
        return self.tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)

    # Prompts

    def _read(self, images, scale, callback):
        """The images of each prompt as a list of codes (N,). All are opened before the first is encoded."""
        opened = [self._pixel_values(given) if given else None for given in images]
        for pixels, given in zip(opened, images, strict=True):
            if pixels is not None and len(pixels) != len(given):
                raise ValueError(
                    f"expected one image for each {IMAGE}, got {len(pixels)} for {len(given)}: pass a list"
                )
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
