"""TA-Tok: an image becomes 729, 169 or 81 codes of a codebook that is projected from language-model embeddings.

Paper 2506.18898, section 3.1; original file `tok/ta_tok.py`. A SigLIP vision tower gives one feature per patch, average
pooling picks the scale, a linear bottleneck and a nearest-code search quantise, and a three-layer decoder turns the
codes back into features that a de-tokenizer can draw from.

Shapes: B images, N tokens (a square grid), C hidden size of the tower, D width of a code, K codes.

This file travels with converted checkpoints, and as a part of a diffusion pipeline diffusers fetches it from the Hub
without the files beside it, so it imports nothing else of the package.
"""

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

ENCODED_TOGETHER = 4  # images on a CPU: more are no faster, and each takes 70 MB of its own at full size
LARGEST_PIXEL = 10.0  # -1..1 by the published mean and deviation; some others take it to 3, and 0..255 is far beyond


def _without_head(config: dict | PreTrainedConfig, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A vision model's configuration without the pooling head."""
    if isinstance(config, PreTrainedConfig):
        if not getattr(config, "vision_use_head", False):
            return config
        config = config.to_diff_dict()
    return kind(**{**config, "vision_use_head": False})


@strict
class TATokConfig(PreTrainedConfig):
    r"""
    Configuration of [`TATokModel`]. The defaults are the published TA-Tok.

    Args:
        encoder_config (`SiglipVisionConfig` or `dict`, *optional*):
            The vision tower, with only the layers that reach the output: `num_hidden_layers` counts up to the layer
            whose output is quantised. Defaults to SigLIP2 so400m (patch 14, 384 px) without its last layer.
        decoder_config (`Siglip2VisionConfig` or `dict`, *optional*):
            The decoder over code vectors: patch size 1, `num_channels` = D, `hidden_size` = C.
        codebook_size (`int`, *optional*, defaults to `65536`): K, the number of codes.
        codebook_dim (`int`, *optional*, defaults to `1536`): D, the width of a code vector.
        l2_normalized (`bool`, *optional*, defaults to `True`):
            Whether codes are compared by cosine (both sides normalised) rather than by Euclidean distance.
        stochastic_temperature (`float`, *optional*, defaults to `0.03`):
            Temperature of the softmax over cosines when codes are sampled. `None` where the checkpoint has none.
        learned_temperature (`bool`, *optional*, defaults to `False`):
            Whether the inverse temperature is a weight of the model; `stochastic_temperature` is then not used.
        codebook_loss_weight (`float`, *optional*, defaults to `1.0`): Of the codes' pull towards the encoder's
            vectors in the training loss, where the feature loss has the weight 1.
        commitment_loss_weight (`float`, *optional*, defaults to `0.25`): Of the encoder's pull towards its codes.
        entropy_loss_weight (`float`, *optional*, defaults to `0.0`): Of a term that spreads the tokens of a batch over
            the codes. It keeps a small codebook from collapsing, and costs as much as a few more searches.
        entropy_loss_temperature (`float`, *optional*, defaults to `0.01`): Of the softmax that this term looks at.
        frequency_weighting (`float`, *optional*, defaults to `0.0`): A token counts in all parts of the loss by how
            often the batch has its code, to the power of minus this: at 1 all codes of a batch count alike. Where most
            of every picture is background, the codes otherwise go to its finest differences.
        rarity_weighting (`float`, *optional*, defaults to `0.0`): Likewise by how often the batch has what the token
            shows. Counting codes, plain ground gets as many of them as it can spread over; counting looks, as few as it
            needs.
        alike_loss_weight (`float`, *optional*, defaults to `0.0`): Of the encoder's vectors' squared distance from the
            mean of those that show the same. Where a piece is and what else the picture shows is otherwise reason
            enough for another code.
        scales (`list[int]`, *optional*, defaults to `[1, 2, 3]`): Pooling factors that `encode` accepts.
        has_encoder, has_decoder (`bool`, *optional*, default to `True`):
            Half a model: `from_pretrained(path, has_encoder=False)` loads what `decode` needs and no vision tower.
        initializer_range (`float`, *optional*, defaults to `0.02`): Standard deviation of freshly made linear weights.
    """

    model_type = "ta_tok"
    sub_configs_defaults = {"encoder_config": SiglipVisionConfig, "decoder_config": Siglip2VisionConfig}

    encoder_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    codebook_size: int = 65536
    codebook_dim: int = 1536
    l2_normalized: bool = True
    stochastic_temperature: float | int | None = 0.03
    learned_temperature: bool = False
    codebook_loss_weight: float | int = 1.0
    commitment_loss_weight: float | int = 0.25
    entropy_loss_weight: float | int = 0.0
    entropy_loss_temperature: float | int = 0.01
    frequency_weighting: float | int = 0.0
    rarity_weighting: float | int = 0.0
    alike_loss_weight: float | int = 0.0
    scales: list[int] | None = None
    has_encoder: bool = True
    has_decoder: bool = True
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        if self.encoder_config is None:
            self.encoder_config = {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
            }
        # The final norm and the pooling head never reach the output, so the models have neither.
        self.encoder_config = _without_head(self.encoder_config, SiglipVisionConfig)
        if self.decoder_config is None:
            self.decoder_config = {
                "hidden_size": self.encoder_config.hidden_size,
                "num_channels": self.codebook_dim,
                "num_hidden_layers": 3,
                "patch_size": 1,
            }
        self.decoder_config = _without_head(self.decoder_config, Siglip2VisionConfig)
        self.scales = [1, 2, 3] if self.scales is None else list(self.scales)
        super().__post_init__(**kwargs)
        if self.decoder_config.hidden_size != self.encoder_config.hidden_size:
            raise ValueError(
                f"encoder and decoder must have one hidden size, got {self.encoder_config.hidden_size} and "
                f"{self.decoder_config.hidden_size}"
            )
        if self.decoder_config.num_channels != self.codebook_dim or self.decoder_config.patch_size != 1:
            raise ValueError(
                f"the decoder reads single code vectors: expected patch_size 1 and num_channels {self.codebook_dim} "
                f"(codebook_dim), got {self.decoder_config.patch_size} and {self.decoder_config.num_channels}"
            )

    @property
    def hidden_size(self) -> int:
        """C, the width of the features that a de-tokenizer consumes."""
        return self.encoder_config.hidden_size

    @property
    def image_size(self) -> int:
        """Side of the square input image in pixels."""
        return self.encoder_config.image_size

    def num_tokens(self, scale: int = 1) -> int:
        """N, the number of codes of one image at `scale`; a `ValueError` names the supported scales."""
        if scale not in self.scales:
            raise ValueError(f"scale must be one of {self.scales}, got {scale!r}")
        return (self.image_size // self.encoder_config.patch_size // scale) ** 2


@dataclass
class TATokOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*): The training loss, a scalar as its parts below. With
            `teacher_features=`.
        codes (`torch.LongTensor` of shape `(B, N)`): The image's codes, 0..K-1.
        pre_quantized (`torch.FloatTensor` of shape `(B, N, C)`): Features after pooling and the encode head.
        features (`torch.FloatTensor` of shape `(B, N, C)`): What `decode(codes)` gives: the input of a de-tokenizer.
        feature_loss (`torch.FloatTensor`, *optional*): 1 - cosine(features, teacher's features), mean over tokens,
            which the configuration may have weighted, as in the other parts.
        codebook_loss (`torch.FloatTensor`, *optional*): Mean squared distance, a code's coordinate from the encoder's,
            which moves the codebook's projection alone.
        commitment_loss (`torch.FloatTensor`, *optional*): The same number, which moves the encoder alone.
        alike_loss (`torch.FloatTensor`, *optional*): Mean squared distance, an encoder's coordinate from the mean of
            those of its kind. Where its weight is not 0.
        entropy_loss (`torch.FloatTensor`, *optional*): Entropy of a token's distribution over the codes, less that of
            the batch's, -log K..0. Where its weight is not 0.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): Vision tower states, with `output_hidden_states=True`.
        attentions (`tuple[torch.FloatTensor]`, *optional*): Its attention weights, with `output_attentions=True`.
    """

    loss: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    pre_quantized: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    feature_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    alike_loss: torch.FloatTensor | None = None
    entropy_loss: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """
    Whether the CPU multiplies matrices in bfloat16 faster than in float32.

    With AMX it does. With the bfloat16 products of AVX-512 alone some do and others take twice as long, so there it is
    timed, once, which takes some milliseconds.
    """
    able = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.12
    if able.get("amx_bf16") or not able.get("avx512_bf16"):
        return bool(able.get("amx_bf16"))
    return _product_seconds(torch.bfloat16) < 0.8 * _product_seconds(torch.float32)


@torch.inference_mode()
def _product_seconds(dtype, side=512, times=5):
    """Of one product of two square matrices, the fastest of several."""
    matrix = torch.ones(side, side, dtype=dtype)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class TATokCodebook(NamedTuple):
    """The projected codebook in the two precisions that a search needs."""

    exact: torch.Tensor  # (K, D) float32
    reduced: torch.Tensor  # (K, D) in half precision; the same tensor where the search needs none
    squared_norms: torch.Tensor  # (K,) float32
    rounding: torch.Tensor  # largest norm that rounding to half precision takes off a code


class TATokQuantizer(nn.Module):
    """Vector quantiser whose codebook is a trained projection of frozen language-model embeddings.

    Original: `SimVectorQuantizer` in `tok/ar_dtok/bottleneck.py`. There the (K, D) codebook is projected anew in every
    call; here it is projected once and kept until a weight, its dtype or its device changes.
    """

    # A block of scores is at most 512 x 8192: what bounds the memory of a search, whatever the batch and K are.
    token_chunk = 512
    code_chunk = 8192
    # How many candidates a token's search in half precision hands to float32.
    shortlist = 8
    # Float32 codebooks of so many numbers are searched like that too, where the CPU has products of bfloat16.
    large = 2**24

    def __init__(self, config: TATokConfig):
        super().__init__()
        self.l2_normalized = config.l2_normalized
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.embedding_proj = nn.Linear(config.codebook_dim, config.codebook_dim)
        if config.learned_temperature:
            self.stochastic_temperature_inv = nn.Parameter(torch.tensor(10.0))
        self._codebook = None  # (state of the weights, TATokCodebook)

    def _apply(self, fn, recurse=True):
        self._codebook = None  # moved or cast: free the old device's memory now, not at the next call
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True):
        self._codebook = None
        return super().train(mode)

    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embedding rows (..., D) -> code vectors (..., D), in float32 whatever the weights are, with gradient."""
        with torch.autocast(embeddings.device.type, enabled=False):
            weight, bias = self.embedding_proj.weight.float(), self.embedding_proj.bias.float()
            vectors = F.linear(embeddings.float(), weight, bias)
            return F.normalize(vectors, dim=-1) if self.l2_normalized else vectors

    @torch.compiler.disable
    @torch.inference_mode(False)  # what is kept outlives the caller's mode, and may have to serve a backward pass
    @torch.no_grad()
    def codebook(self) -> "TATokCodebook":
        """The projected codebook: computed anew in training, kept while the weights stay as they are otherwise."""
        weights = (self.embedding.weight, self.embedding_proj.weight, self.embedding_proj.bias)
        state = tuple((w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype, w.device) for w in weights)
        if self._codebook is not None and self._codebook[0] == state:
            return self._codebook[1]
        embeddings = self.embedding.weight
        if embeddings.is_meta:
            raise RuntimeError("the quantizer's weights are offloaded or were never loaded: keep them on a device")
        exact = torch.empty(embeddings.shape, dtype=torch.float32, device=embeddings.device)
        dtype = self._search_dtype()
        reduced = exact if dtype == torch.float32 else torch.empty_like(embeddings, dtype=dtype)
        rounding = torch.zeros((), device=embeddings.device)
        for start in range(0, len(embeddings), self.code_chunk):
            chunk = slice(start, start + self.code_chunk)
            exact[chunk] = self.project(embeddings[chunk])
            if reduced is not exact:
                reduced[chunk] = exact[chunk]
                rounding = torch.maximum(rounding, (exact[chunk] - reduced[chunk].float()).norm(dim=-1).max())
        codebook = TATokCodebook(exact, reduced, exact.square().sum(-1), rounding)
        if not self.training:
            self._codebook = (state, codebook)
        return codebook

    def _search_dtype(self):
        weights = self.embedding.weight
        if weights.dtype != torch.float32 or self.training or weights.numel() < self.large:
            return weights.dtype
        return torch.bfloat16 if weights.device.type == "cpu" and multiplies_bfloat16() else torch.float32

    def vectors(self) -> torch.Tensor:
        """(K, D) code vectors in the weights' dtype."""
        codebook = self.codebook()
        return codebook.exact if self.embedding.weight.dtype == torch.float32 else codebook.reduced

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (...) -> code vectors (..., D) in the weights' dtype; with gradient to the projection in training."""
        if self.training:
            return self.project(self.embedding(codes)).to(self.embedding.weight.dtype)
        return F.embedding(codes, self.vectors())

    @torch.no_grad()
    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Vectors (T, D) in float32 -> nearest codes (T,): what a full float32 search finds, in any weights' dtype."""
        codebook = self.codebook()
        search = self._search if codebook.reduced is codebook.exact else self._search_reduced
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([search(rows, codebook) for rows in z.split(self.token_chunk)])

    def _scores(self, z, vectors, squared_norms):
        """Similarities whose maximum is the nearest code: the cosine, or z.c - |c|^2 / 2 where distance counts."""
        scores = z @ vectors.mT
        return scores if self.l2_normalized else scores.float() - squared_norms / 2

    def _score_chunks(self, z, vectors, squared_norms):
        for start in range(0, len(vectors), self.code_chunk):
            chunk = slice(start, start + self.code_chunk)
            yield start, self._scores(z, vectors[chunk], squared_norms[chunk])

    def _search(self, z, codebook):
        best = torch.full(z.shape[:1], -torch.inf, device=z.device)
        codes = torch.zeros(z.shape[:1], dtype=torch.long, device=z.device)
        for start, scores in self._score_chunks(z, codebook.exact, codebook.squared_norms):
            score, code = scores.max(-1)
            closer = score > best  # strict: the first of equals wins, as in one argmax over all codes
            best, codes = torch.where(closer, score, best), torch.where(closer, code + start, codes)
        return codes

    def _search_reduced(self, z, codebook):
        """Shortlist in half precision, decide in float32, and search anew where the shortlist may miss the best."""
        reduced_z = z.to(codebook.reduced.dtype)
        length = min(self.shortlist, len(codebook.exact))
        best, codes = z.new_empty(len(z), 0), torch.empty(len(z), 0, dtype=torch.long, device=z.device)
        for start, scores in self._score_chunks(reduced_z, codebook.reduced, codebook.squared_norms):
            score, code = scores.topk(min(length, scores.shape[-1]))
            best, codes = torch.cat([best, score.float()], -1), torch.cat([codes, code + start], -1)
            best, order = best.topk(min(length, best.shape[-1]))
            codes = codes.gather(-1, order)

        scores = self._scores(z[:, None], codebook.exact[codes], codebook.squared_norms[codes][:, None])[:, 0]
        top = scores.amax(-1, keepdim=True)
        nearest = codes.masked_fill(scores < top, len(codebook.exact)).amin(-1)

        # No code outside the shortlist scored above `worst` in reduced precision. `error` bounds what rounding both
        # factors and their product takes off a score, so a float32 score above worst + error is the maximum.
        worst = best[:, -1]
        error = (z - reduced_z.float()).norm(dim=-1) * codebook.squared_norms.max().sqrt()
        error = error + reduced_z.float().norm(dim=-1) * codebook.rounding
        error = error + torch.finfo(reduced_z.dtype).eps * (
            worst.abs() if self.l2_normalized else worst.abs() + codebook.squared_norms.max()
        )
        uncertain = ~(top[:, 0] > worst + error)
        if length < len(codebook.exact) and uncertain.any():
            nearest[uncertain] = self._search(z[uncertain], codebook)
        return nearest

    @torch.no_grad()
    def sample(self, z: torch.Tensor, temperature: torch.Tensor | float, uniform: torch.Tensor) -> torch.Tensor:
        """Vectors (T, D) and one uniform number each (T,) -> codes (T,) drawn from softmax(cosine / temperature).

        Inverse transform in two passes over the codes: the mass of every chunk first, then the one chunk that each
        token's number falls into, so that no (T, K) matrix is held.
        """
        codebook = self.codebook()
        with torch.autocast(z.device.type, enabled=False):
            pairs = zip(z.split(self.token_chunk), uniform.split(self.token_chunk), strict=True)
            return torch.cat([self._sample(rows, codebook, temperature, u) for rows, u in pairs])

    def _sample(self, z, codebook, temperature, uniform):
        chunks = self._score_chunks(z, codebook.exact, codebook.squared_norms)
        masses = torch.stack([(scores / temperature).logsumexp(-1) for _, scores in chunks], -1)
        total = masses.logsumexp(-1, keepdim=True)
        ends = (masses - total).exp().cumsum(-1)
        # Rounding may leave the last end just below 1: a number beyond it belongs to the last chunk.
        chunk = torch.searchsorted(ends, uniform[:, None], right=True).clamp(max=ends.shape[-1] - 1)
        rest = uniform[:, None] - F.pad(ends, (1, 0)).gather(-1, chunk)
        codes = torch.empty_like(chunk)
        for number in range(ends.shape[-1]):
            rows = (chunk[:, 0] == number).nonzero()[:, 0]
            start = number * self.code_chunk
            vectors = codebook.exact[start : start + self.code_chunk]
            inner = (z[rows] @ vectors.mT / temperature - total[rows]).exp().cumsum(-1)
            codes[rows] = torch.searchsorted(inner, rest[rows], right=True).clamp(max=len(vectors) - 1) + start
        return codes[:, 0]

    @torch.compiler.disable
    def entropy_loss(self, z: torch.Tensor, temperature: float, weights: torch.Tensor | None = None) -> torch.Tensor:
        """
        Mean entropy of the tokens' distributions over the codes, less the entropy of their mean: least when every token
        is sure of its code and the tokens together use all of them (the penalty of MAGVIT-v2, paper 2310.05737).

        Args:
            z (`torch.FloatTensor` of shape `(T, D)`): The encoder's vectors.
            temperature (`float`): Of the softmax over scores.
            weights (`torch.FloatTensor` of shape `(T,)`, *optional*): Of the tokens, of mean 1.

        Returns:
            A scalar in -log K..0, in nats, with gradient to `z` and to the codebook's projection.
        """
        with torch.autocast(z.device.type, enabled=False):
            codebook = self.project(self.embedding.weight)
            squared_norms = codebook.square().sum(-1)

            def distribution(rows, weights):
                log_probabilities = (self._scores(rows, codebook, squared_norms) / temperature).log_softmax(-1)
                probabilities = weights[:, None] * log_probabilities.exp()
                return probabilities.sum(0), -(probabilities * log_probabilities).sum()

            weights = torch.ones_like(z[:, 0], dtype=torch.float32) if weights is None else weights
            parts = zip(z.float().split(self.token_chunk), weights.split(self.token_chunk), strict=True)
            # Checkpointed: the backward pass too holds the scores of one chunk of tokens at a time.
            chunks = [checkpoint(distribution, *part, use_reentrant=False) for part in parts]
            mean, entropy = (sum(parts) / len(z) for parts in zip(*chunks, strict=True))
            # A probability may underflow to 0, where the logarithm has no gradient.
            return entropy + (mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


class _LibraryInitialization:
    """Has SigLIP's layers initialised as in transformers, which spares modules without weights of their own in the
    classes of others, and with them SigLIP's attention and MLP."""

    @classmethod
    def is_custom_code(cls) -> bool:
        return False


class TATokDecoder(_LibraryInitialization, Siglip2VisionModel):
    """The SigLIP2 vision model over code vectors: always complete square grids, so no padding and no mask."""

    _supports_flash_attn = True  # ruled out in the library for the padding masks alone

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Code vectors (B, N, D) after the output projection -> hidden states (B, N, C) after the final norm."""
        side = math.isqrt(vectors.shape[1])
        table = self.embeddings.position_embedding.weight.unflatten(0, (self.embeddings.position_embedding_size, -1))
        positions = self.embeddings.resize_positional_embeddings(table, torch.tensor([[side, side]]), side * side)
        hidden_states = self.embeddings.patch_embedding(vectors) + positions
        return self.post_layernorm(self.encoder(inputs_embeds=hidden_states).last_hidden_state)


def mean_of_kind(z: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Vectors (B, N, D) and numbers (B, N) from 0 of their kinds -> for each the mean of its kind (B, N, D)."""
    flat, numbers = z.flatten(0, 1), kinds.flatten()
    counts = numbers.bincount()
    means = flat.new_zeros(len(counts), flat.shape[1]).index_add(0, numbers, flat) / counts[:, None]
    return means[kinds]


class TATokPreTrainedModel(_LibraryInitialization, PreTrainedModel):
    config: TATokConfig
    base_model_prefix = "ta_tok"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipEncoderLayer", "Siglip2EncoderLayer", "TATokQuantizer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = False  # Siglip2VisionModel has none
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, TATokQuantizer) and self.config.learned_temperature:
            init.constant_(module.stochastic_temperature_inv, 10.0)


class TATokModel(TATokPreTrainedModel):
    """
    The text-aligned tokenizer: `encode` images to codes, `decode` codes to features.

    ```python
    >>> model = TATokModel.from_pretrained(path).eval()
    >>> codes = model.encode(processor(image, return_tensors="pt").pixel_values, scale=2)  # (1, 169)
    >>> features = model.decode(codes)  # (1, 169, 1152)
    ```
    """

    def __init__(self, config: TATokConfig):
        super().__init__(config)
        hidden_size, dim = config.hidden_size, config.codebook_dim
        if config.has_encoder:
            self.encoder = SiglipVisionModel._from_config(config.encoder_config)
            self.encoder.post_layernorm = nn.Identity()  # the quantised layer's output is read before the final norm
            self.encode_head = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Tanh())
            self.in_proj = nn.Linear(hidden_size, dim)
        self.quantizer = TATokQuantizer(config)
        if config.has_decoder:
            self.out_proj = nn.Linear(dim, dim)
            self.decoder = TATokDecoder._from_config(config.decoder_config)
            self.decode_head = nn.Sequential(
                nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, hidden_size)
            )
        # What a whole repository holds beyond the half that was asked for.
        halves = {r"^(encoder|encode_head|in_proj)\.": config.has_encoder}
        halves |= {r"^(decoder|decode_head|out_proj)\.": config.has_decoder}
        self._keys_to_ignore_on_load_unexpected = [pattern for pattern, present in halves.items() if not present]
        self.post_init()
        self._freeze()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)  # makes every weight trainable
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    def _freeze(self):
        """Of the codebook only the projection is trained: the embeddings are the language model's, and through a
        drawn code no gradient passes to the temperature."""
        self.quantizer.embedding.requires_grad_(False)
        if self.config.learned_temperature:
            self.quantizer.stochastic_temperature_inv.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module):
        self.encoder.embeddings.patch_embedding = value

    @property
    def codebook(self) -> torch.Tensor:
        """(K, D) projected codes, l2-normalised where the configuration says so, in the model's dtype.

        Computed once and kept in evaluation mode; follows `.to()`, dtype changes and newly loaded weights. Weights that
        are written through `.data` are not noticed: call `.train()` and `.eval()` behind that."""
        return self.quantizer.vectors()

    @torch.no_grad()
    def encode(
        self,
        pixel_values: torch.FloatTensor,
        scale: int = 1,
        do_sample: bool = False,
        temperature: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.LongTensor:
        """
        Turns images into codes. The decoder does not run.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, image_size, image_size)`): Pixels in -1..1, as
                [`TATokImageProcessor`] gives them.
            scale (`int`, *optional*, defaults to `1`): Pooling factor: 729, 169 or 81 codes for 1, 2, 3.
            do_sample (`bool`, *optional*, defaults to `False`): Draw codes from softmax(cosine / temperature), as the
                original does unless told otherwise, instead of taking the nearest.
            temperature (`float`, *optional*): Replaces the checkpoint's temperature; only with `do_sample=True`.
            generator (`torch.Generator` or a list of B, *optional*): Source of the draws; the global one is never used.

        Returns:
            `torch.LongTensor` of shape `(B, N)`: codes 0..K-1.

        Raises:
            `TypeError`: pixels of an integer type. `ValueError`: an unsupported scale, pixels of another shape or
            range, sampling options that cannot apply, or vectors that come out as NaN or infinite.
        """
        self._check_pixels(pixel_values, scale)
        low, high = (0, 0) if not len(pixel_values) else torch.stack([*pixel_values.aminmax()]).tolist()
        if not (low >= -LARGEST_PIXEL and high <= LARGEST_PIXEL):  # written so that NaN fails too
            raise ValueError(
                f"pixel_values must be about -1..1, as TATokImageProcessor gives them, got {low:.4g}..{high:.4g}"
            )
        on_cpu = pixel_values.device.type == "cpu"
        parts = pixel_values.split(ENCODED_TOGETHER if on_cpu else max(1, len(pixel_values)))
        pre_quantized = torch.cat([self._pre_quantize(part, scale)[0] for part in parts])
        return self._quantize(pre_quantized, do_sample, temperature, generator)[0]

    def decode(self, codes: torch.LongTensor) -> torch.FloatTensor:
        """
        Turns codes into the features that de-tokenizers consume.

        Args:
            codes (`torch.LongTensor` of shape `(B, N)`): Codes 0..K-1 of whole images, N being the token count of a
                supported scale.

        Returns:
            `torch.FloatTensor` of shape `(B, N, C)`.

        Raises:
            `TypeError`: codes of a floating-point type. `ValueError`: another shape, length or range.
        """
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise TypeError(f"codes must be integers, got {codes.dtype}")
        self._require("decoder")
        lengths = {scale: self.config.num_tokens(scale) for scale in self.config.scales}
        if codes.ndim != 2 or codes.shape[1] not in lengths.values():
            raise ValueError(
                f"codes must have the shape (batch, tokens) with the tokens of one scale, {lengths}, "
                f"got {tuple(codes.shape)}"
            )
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.config.codebook_size):
            raise ValueError(
                f"codes must be in 0..{self.config.codebook_size - 1}, got {codes.min().item()}..{codes.max().item()}"
            )
        return self._decode_vectors(self.quantizer.lookup(codes.long()))

    @staticmethod
    def pool(hidden_states: torch.FloatTensor, scale: int) -> torch.FloatTensor:
        """Hidden states of a square grid (B, N1, C) -> averages over scale x scale of them (B, N, C).

        The odd last row and column of a grid that the scale does not divide are dropped: 27 -> 13 at scale 2."""
        if scale == 1:
            return hidden_states
        side = math.isqrt(hidden_states.shape[1])
        grid = hidden_states.transpose(1, 2).unflatten(2, (side, side))
        return F.avg_pool2d(grid, scale, stride=scale).flatten(2).transpose(1, 2)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        scale: int = 1,
        do_sample: bool = False,
        temperature: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        teacher_features: torch.FloatTensor | None = None,
        token_kinds: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TATokOutput:
        """
        Encodes and decodes; other arguments as in [`~TATokModel.encode`]. In training mode the features carry a
        straight-through gradient from the codes to the encoder.

        Args:
            teacher_features (`torch.FloatTensor` of shape `(B, N, C)`, *optional*): What the features should be, up to
                their lengths: the teacher's hidden states, pooled by [`~TATokModel.pool`]. With them the output has a
                loss (paper, section 3.1).
            token_kinds (`torch.LongTensor` of shape `(B, N)`, *optional*): Any numbers, the same for tokens whose
                pieces of a picture look alike; for a loss with `rarity_weighting` or `alike_loss_weight`.

        Raises:
            `ValueError`: as in `encode`, teacher's features of another shape than the features, or no kinds where the
                loss needs them.
        """
        self._require("decoder")
        self._check_pixels(pixel_values, scale)
        pre_quantized, encoder_outputs = self._pre_quantize(pixel_values, scale, **kwargs)
        codes, z = self._quantize(pre_quantized, do_sample, temperature, generator)
        vectors = self.quantizer.lookup(codes)
        passed_on = vectors
        if self.training:
            straight = z.to(vectors.dtype)
            passed_on = straight + (vectors - straight).detach()
        features = self._decode_vectors(passed_on)
        return TATokOutput(
            **(
                {}
                if teacher_features is None
                else self._losses(features, teacher_features, codes, vectors, z, token_kinds)
            ),
            codes=codes,
            pre_quantized=pre_quantized,
            features=features,
            hidden_states=encoder_outputs.hidden_states,
            attentions=encoder_outputs.attentions,
        )

    def _losses(self, features, teacher_features, codes, vectors, z, token_kinds):
        """Features and the teacher's (B, N, C), codes (B, N), their vectors and the encoder's (B, N, D) -> the loss and
        its parts."""
        if teacher_features.shape != features.shape:
            raise ValueError(
                f"teacher_features must have the shape of the features, {tuple(features.shape)}, got "
                f"{tuple(teacher_features.shape)}: pool(hidden_states, scale) brings them to a scale"
            )
        config, vectors = self.config, vectors.float()
        if token_kinds is None and (config.rarity_weighting or config.alike_loss_weight):
            raise ValueError("a loss with rarity_weighting or alike_loss_weight needs token_kinds")
        kinds = None if token_kinds is None else token_kinds.unique(return_inverse=True)[1]
        weights = self._token_weights(codes, kinds)
        cosines = F.cosine_similarity(features.float(), teacher_features.float(), dim=-1)
        losses = {
            "feature_loss": 1 - (weights * cosines).mean(),
            "codebook_loss": (weights * (vectors - z.detach()).square().mean(-1)).mean(),
            "commitment_loss": (weights * (z - vectors.detach()).square().mean(-1)).mean(),
        }
        loss = losses["feature_loss"] + config.codebook_loss_weight * losses["codebook_loss"]
        loss = loss + config.commitment_loss_weight * losses["commitment_loss"]
        if config.alike_loss_weight:
            # Unweighted: what looks alike most is plain ground, whose tokens weigh little elsewhere.
            losses["alike_loss"] = (z - mean_of_kind(z, kinds)).square().mean()
            loss = loss + config.alike_loss_weight * losses["alike_loss"]
        if config.entropy_loss_weight:
            losses["entropy_loss"] = self.quantizer.entropy_loss(
                z.flatten(0, 1), config.entropy_loss_temperature, weights.flatten()
            )
            loss = loss + config.entropy_loss_weight * losses["entropy_loss"]
        return {"loss": loss, **losses}

    def _token_weights(self, codes, kinds=None):
        """Codes (B, N) and kinds, where there are any -> weights (B, N) of mean 1."""
        weights = codes.flatten().bincount()[codes].float() ** -self.config.frequency_weighting
        if self.config.rarity_weighting:
            weights = weights * kinds.flatten().bincount()[kinds].float() ** -self.config.rarity_weighting
        return weights / weights.mean()

    def _require(self, half):
        if not hasattr(self, half):
            raise ValueError(f"this TA-Tok was loaded without its {half} (has_{half}=False)")

    def _check_pixels(self, pixel_values, scale):
        self._require("encoder")
        self.config.num_tokens(scale)  # raises for an unsupported scale before any work
        expected = (self.config.encoder_config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must have the shape (batch, {', '.join(map(str, expected))}), got "
                f"{tuple(pixel_values.shape)}; TATokImageProcessor resizes images to it"
            )
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values must be floating-point numbers in -1..1, got {pixel_values.dtype}")

    def _pre_quantize(self, pixel_values, scale, **kwargs):
        encoder_outputs = self.encoder(pixel_values, **kwargs)
        return self.encode_head(self.pool(encoder_outputs.last_hidden_state, scale)), encoder_outputs

    def _quantize(self, pre_quantized, do_sample, temperature, generator):
        """Pre-quantised features (B, N, C) -> codes (B, N) and the bottleneck's vectors (B, N, D) in float32."""
        z = self.in_proj(pre_quantized).float()
        if self.config.l2_normalized:
            z = F.normalize(z, dim=-1)
        return self._choose(z.detach(), do_sample, temperature, generator), z

    @torch.compiler.disable
    def _choose(self, z, do_sample, temperature, generator):
        """The bottleneck's vectors (B, N, D) -> codes (B, N)."""
        flat = z.flatten(0, 1)
        if not self.training and not flat.isfinite().all():
            raise ValueError(
                "the encoder's vectors are not all finite numbers: its weights are broken, or too large for its dtype; "
                "float16 overflows where bfloat16 and float32 do not"
            )
        if do_sample:
            temperature = self._sampling_temperature(temperature)
            uniform = _uniform(*z.shape[:2], generator, z.device)
            codes = self.quantizer.sample(flat, temperature, uniform.flatten())
        elif temperature is not None or generator is not None:
            raise ValueError("temperature and generator only apply when codes are sampled: pass do_sample=True")
        else:
            codes = self.quantizer.nearest(flat)
        return codes.view(z.shape[:2])

    def _sampling_temperature(self, temperature):
        if not self.config.l2_normalized:
            raise ValueError("codes are sampled from a softmax over cosines, but this checkpoint compares by distance")
        if temperature is None and self.config.learned_temperature:
            return 1 / self.quantizer.stochastic_temperature_inv.float()
        temperature = self.config.stochastic_temperature if temperature is None else temperature
        if temperature is None:
            raise ValueError("this checkpoint has no temperature of its own to sample with: pass temperature=")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        return temperature

    def _decode_vectors(self, vectors):
        return self.decode_head(self.decoder(self.out_proj(vectors)))


# As `draw_uniform` in seeded_decoding.py, which this file must do without.
def _uniform(batch_size, length, generator, device):
    """Uniform numbers (batch, length), row i from generator i alone; never from the global one, also without any."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        generators = [generator] * batch_size
    elif not isinstance(generator, list | tuple):
        raise TypeError(f"a generator is a torch.Generator or a list of them, got {generator!r}")
    elif len(generator) == batch_size:
        generators = generator
    else:
        raise ValueError(f"expected one generator or one per sample ({batch_size}), got a list of {len(generator)}")
    return torch.stack([torch.rand(length, generator=g, device=g.device).to(device) for g in generators])


TATokConfig.register_for_auto_class()
TATokModel.register_for_auto_class("AutoModel")

__all__ = ["TATokConfig", "TATokModel", "TATokOutput", "TATokPreTrainedModel"]
