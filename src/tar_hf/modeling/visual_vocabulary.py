"""The visual part of a language model's vocabulary: codes as token ids, by offset.

Paper 2506.18898, section 3.1; original `initialize_vision_tokenizer` in `llava/model/llava_arch.py`. The tokens stand
in one block, in this order: `<im_start>`, `<im_end>` (special), `<S0>`.. (one a scale), `<I0>`.. (one a code). They are
not to be confused with the chat tags `<|im_start|>` and `<|im_end|>`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

IMAGE_START, IMAGE_END, SCALE, CODE = "<im_start>", "<im_end>", "<S{}>", "<I{}>"
# What the original's llava_qwen configurations call our fields.
ORIGINAL_NAMES = {
    "image_start_id": "image_start_tag_id",
    "image_end_id": "image_end_tag_id",
    "first_scale_id": "scale_start_token_id",
    "num_scales": "num_scale_tokens",
    "first_code_id": "image_start_token_id",
    "codebook_size": "num_image_tokens",
}


@dataclass(frozen=True)
class VisualVocabulary:
    """
    Where the visual tokens stand in a vocabulary.

    Args:
        image_start_id (`int`): Id of `<im_start>`.
        image_end_id (`int`): Id of `<im_end>`.
        first_scale_id (`int`): Id of `<S0>`; scale s has the id `first_scale_id + s - 1`.
        num_scales (`int`): Number of scale tokens.
        first_code_id (`int`): Id of `<I0>`; code c has the id `first_code_id + c`.
        codebook_size (`int`): K, the number of codes.
    """

    image_start_id: int
    image_end_id: int
    first_scale_id: int
    num_scales: int
    first_code_id: int
    codebook_size: int

    @property
    def vocab_size(self) -> int:
        """Rows of an embedding that ends with the last code."""
        return self.first_code_id + self.codebook_size

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> VisualVocabulary:
        """Finds the visual tokens of a tokenizer. `ValueError` when there are none or their ids are not in one run."""
        ids = tokenizer.get_vocab()
        missing = [t for t in (IMAGE_START, IMAGE_END, SCALE.format(0), CODE.format(0)) if t not in ids]
        if missing:
            raise ValueError(
                f"this tokenizer of {len(ids)} tokens has no visual tokens ({', '.join(missing)} not found): add them "
                "with VisualVocabulary.expand"
            )
        first_scale_id, num_scales = _run(ids, SCALE)
        first_code_id, codebook_size = _run(ids, CODE)
        return cls(ids[IMAGE_START], ids[IMAGE_END], first_scale_id, num_scales, first_code_id, codebook_size)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> VisualVocabulary:
        """Reads the ids that `expand` or the original training code wrote into a model's configuration."""
        if getattr(config, "visual_vocabulary", None) is not None:
            return cls(**config.visual_vocabulary)
        missing = [name for name in ORIGINAL_NAMES.values() if getattr(config, name, None) is None]
        if missing:
            raise ValueError(
                f"this {config.model_type} configuration names no visual tokens: expected visual_vocabulary or the "
                f"original's fields, of which {', '.join(missing)} are missing"
            )
        return cls(**{field: getattr(config, name) for field, name in ORIGINAL_NAMES.items()})

    @classmethod
    def expand(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        codebook: torch.Tensor | None = None,
        init: str = "codebook",
        codebook_size: int | None = None,
        num_scales: int = 3,
    ) -> VisualVocabulary:
        """
        Appends the visual tokens to a tokenizer and their rows to a causal language model, in place.

        The model then has exactly as many rows as the tokenizer has tokens, as in the original: padding rows that a
        published model has beyond its tokenizer give way.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): Gets the tokens. Whatever can `add_tokens`.
            model (`PreTrainedModel`): Any causal language model. Its input and, if untied, output embedding grow.
            codebook (`torch.Tensor` of shape `(K, D)`, *optional*): A TA-Tok's projected codebook, `ta_tok.codebook`.
            init (`str`, *optional*, defaults to `"codebook"`): What the code rows start as: `"codebook"`, the
                codebook's rows, which needs D to be the model's width; `"mean"`, the mean of the old rows; `"random"`,
                normal with the model's initializer range. The tags and scales always start as the mean.
            codebook_size (`int`, *optional*): K, where no codebook is given.
            num_scales (`int`, *optional*, defaults to `3`): Number of scale tokens.

        Raises:
            `ValueError`: visual tokens that are there already, a codebook of another width, or contradicting arguments;
            tokenizer and model are then as they were.
        """
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        width, base = inputs.weight.shape[1], len(tokenizer)
        if init not in ("codebook", "mean", "random"):
            raise ValueError(f'init must be "codebook", "mean" or "random", got {init!r}')
        if codebook is None and (init == "codebook" or codebook_size is None):
            raise ValueError(
                'init="codebook" needs codebook= (a TATokModel\'s .codebook)'
                if init == "codebook"
                else f'init="{init}" without a codebook needs codebook_size='
            )
        if codebook is not None and codebook_size not in (None, len(codebook)):
            raise ValueError(f"codebook has {len(codebook)} codes, which contradicts codebook_size={codebook_size}")
        if init == "codebook" and codebook.shape[1] != width:
            raise ValueError(
                f"the codebook's codes are {codebook.shape[1]} wide but the model's embeddings {width}: they cannot be "
                'copied; pass init="mean" to start from the mean of the old rows'
            )
        if len(inputs.weight) < base:
            raise ValueError(f"the tokenizer has {base} tokens but the model only {len(inputs.weight)} embedding rows")
        codebook_size = len(codebook) if codebook is not None else codebook_size
        scales = [SCALE.format(i) for i in range(num_scales)]
        codes = [CODE.format(i) for i in range(codebook_size)]
        old = tokenizer.get_vocab().keys() & {IMAGE_START, IMAGE_END, *scales, *codes}
        if old:
            raise ValueError(f"the tokenizer has visual tokens already, {min(old)} among them")

        tokenizer.add_tokens([IMAGE_START, IMAGE_END], special_tokens=True)
        tokenizer.add_tokens(scales)
        tokenizer.add_tokens(codes)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        vocabulary = cls.from_tokenizer(tokenizer)
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        tied = outputs is None or outputs.weight is inputs.weight
        for weight in [inputs.weight] if tied else [inputs.weight, outputs.weight]:
            with torch.no_grad():
                weight[base:] = weight[:base].float().mean(0).to(weight)
                if init == "codebook":
                    weight[vocabulary.first_code_id :] = codebook.to(weight)
                elif init == "random":
                    weight[vocabulary.first_code_id :].normal_(0.0, getattr(model.config, "initializer_range", 0.02))
        bias = getattr(outputs, "bias", None)
        if bias is not None:
            with torch.no_grad():
                bias[base:] = bias[:base].mean()
        model.config.visual_vocabulary = asdict(vocabulary)
        return vocabulary

    def scale_id(self, scale: int) -> int:
        """Token id of a scale 1, 2, 3. `ValueError` for another."""
        if not 1 <= scale <= self.num_scales:
            raise ValueError(f"scale must be in 1..{self.num_scales}, got {scale}")
        return self.first_scale_id + scale - 1

    def codes_to_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes 0..K-1 of any shape -> token ids of the same shape. `ValueError` for a code outside that range."""
        return self._shift(codes, "codes", 0, self.first_code_id)

    def ids_to_codes(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids of codes -> codes 0..K-1 of the same shape. `ValueError` for an id that is not one of a code."""
        return self._shift(ids, "ids", self.first_code_id, -self.first_code_id)

    def _shift(self, values, name, first, offset):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {values.dtype}")
        values = values.long()  # a narrow integer type may not hold the shifted value
        outside = (values < first) | (values >= first + self.codebook_size)
        if outside.any():
            raise ValueError(
                f"{name} must be in {first}..{first + self.codebook_size - 1}, got {values[outside][0].item()} "
                f"({int(outside.sum())} of {values.numel()} outside)"
            )
        return values + offset


def _run(ids: dict[str, int], pattern: str) -> tuple[int, int]:
    """First id and length of the run of tokens `pattern` 0, 1, 2, ...; `ValueError` where the ids do not follow on."""
    first, length = ids[pattern.format(0)], 0
    while (token := pattern.format(length)) in ids:
        if ids[token] != first + length:
            raise ValueError(f"{token} must have the id {first + length}, right after the one before, got {ids[token]}")
        length += 1
    return first, length
