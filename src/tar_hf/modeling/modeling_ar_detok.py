"""AR-DTok: an autoregressive decoder that draws an image from TA-Tok features, VQ token by VQ token.

Paper 2506.18898, section 3.2; original files `tok/ar_dtok/ar_model.py` and `generate.py`, after LlamaGen. A LLaMA-like
decoder with absolute positions reads the projected features as a prefix and continues with the tokens of a VQ-16
autoencoder, whose decoder makes the pixels.

Shapes: B images, N condition tokens (729, 169 or 81), C their width, M image tokens (a square grid), V VQ codes,
W width of the decoder, H x H pixels.

This file travels with converted checkpoints, so it imports nothing of the package but files beside it.
"""

import math

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    JanusVQVAE,
    JanusVQVAEConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .jacobi_decoding import jacobi_decoding
from .reserved_cache import keep_first_rows, take_rows
from .seeded_decoding import draw_uniform, seeded_decoding

FEW_QUERIES = 16  # on CPUs, of a row: up to here attention is computed in float32, see `_better_in_float32`

# name: (layers, heads, width), the published sizes
PRESETS = {
    "llama-abs-S": (12, 6, 384),
    "llama-abs-B": (12, 12, 768),
    "llama-abs-L": (24, 16, 1024),
    "llama-abs-LP": (30, 20, 1280),
    "llama-abs-XL": (36, 20, 1280),
    "llama-abs-XXL": (48, 24, 1536),
    "llama-abs-XXXL": (48, 40, 2560),
}


@strict
class ARDeTokConfig(PreTrainedConfig):
    r"""
    Configuration of [`ARDeTokForCausalLM`]. The defaults are the LP preset at 256 px.

    Args:
        vocab_size (`int`, *optional*, defaults to `16384`): V, the number of VQ codes.
        hidden_size (`int`, *optional*, defaults to `1280`): W.
        intermediate_size (`int`, *optional*):
            Width of the SwiGLU layer. By default 8/3 of `hidden_size`, rounded up to a multiple of 256.
        num_hidden_layers (`int`, *optional*, defaults to `30`): Decoder layers.
        num_attention_heads (`int`, *optional*, defaults to `20`): Query heads.
        num_key_value_heads (`int`, *optional*): Key and value heads. By default as many as query heads.
        condition_size (`int`, *optional*, defaults to `1152`): C, the width of the TA-Tok features.
        max_condition_tokens (`int`, *optional*, defaults to `729`): Longest condition that the position table holds.
        fixed_positions (`bool`, *optional*, defaults to `False`): Sinusoidal positions that are not trained.
        rms_norm_eps (`float`, *optional*, defaults to `1e-5`): Epsilon of the norms.
        embedding_dropout, residual_dropout, mlp_dropout (`float`, *optional*, defaults to `0.1`): Training only.
        attention_dropout (`float`, *optional*, defaults to `0.0`): Training only.
        condition_dropout (`float`, *optional*, defaults to `0.1`):
            Probability with which training zeroes a row's condition, which is what guidance needs.
        initializer_range (`float`, *optional*, defaults to `0.02`): Standard deviation of fresh weights.
        vq_config (`JanusVQVAEConfig` or `dict`, *optional*):
            The VQ autoencoder. `num_patches`, the side of the token grid, fixes M. Defaults to LlamaGen's VQ-16 with a
            grid of 16 x 16.
    """

    model_type = "ar_detok"
    sub_configs_defaults = {"vq_config": JanusVQVAEConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 16384
    hidden_size: int = 1280
    intermediate_size: int | None = None
    num_hidden_layers: int = 30
    num_attention_heads: int = 20
    num_key_value_heads: int | None = None
    condition_size: int = 1152
    max_condition_tokens: int = 729
    fixed_positions: bool = False
    rms_norm_eps: float | int = 1e-5
    embedding_dropout: float | int = 0.1
    residual_dropout: float | int = 0.1
    mlp_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    condition_dropout: float | int = 0.1
    initializer_range: float | int = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    vq_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if self.vq_config is None:
            self.vq_config = {"num_patches": 16}
        if self.intermediate_size is None:
            self.intermediate_size = 256 * math.ceil(int(8 * self.hidden_size / 3) / 256)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size ({self.hidden_size}) and be "
                f"a multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.fixed_positions and self.hidden_size % 2:
            raise ValueError(f"fixed_positions are sines and cosines: hidden_size must be even, got {self.hidden_size}")
        if self.vq_config.num_embeddings != self.vocab_size:
            raise ValueError(
                f"the decoder predicts {self.vocab_size} VQ codes (vocab_size) but the VQ autoencoder has "
                f"{self.vq_config.num_embeddings} (vq_config.num_embeddings)"
            )

    @classmethod
    def from_preset(cls, name: str, image_size: int = 256, **kwargs) -> "ARDeTokConfig":
        """
        A published size: `llama-abs-S`, `-B`, `-L`, `-LP`, `-XL`, `-XXL`, `-XXXL`, with LlamaGen's VQ-16 tokens.

        Args:
            name (`str`): The preset.
            image_size (`int`, *optional*, defaults to `256`): Side of the drawn image in pixels, a multiple of 16.
            kwargs: Further fields of the configuration.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
        if image_size <= 0 or image_size % 16:
            raise ValueError(f"image_size must be a positive multiple of 16, got {image_size}")
        layers, heads, width = PRESETS[name]
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}
        return cls(**{"vq_config": {"num_patches": image_size // 16}, **sizes, **kwargs})

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_image_tokens(self) -> int:
        """M, the number of VQ tokens of one image."""
        return self.vq_config.num_patches**2

    @property
    def image_size(self) -> int:
        """Side of the drawn image in pixels."""
        return self.vq_config.num_patches * 2 ** (len(self.vq_config.channel_multiplier) - 1)

    @property
    def max_position_embeddings(self) -> int:
        """Rows of the position table: the last token is never fed back, so it needs none."""
        return self.max_condition_tokens + self.num_image_tokens - 1


class ARDeTokAttention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: ARDeTokConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.heads) * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        qkv = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = qkv.split(self.heads, dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if _better_in_float32(implementation, query.device, query.dtype, query.shape[2]):
            query, key, value, attention_mask = _in_float32(query, key, value, attention_mask)
        else:
            key, value = key.to(query.dtype), value.to(query.dtype)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dropout(self.o_proj(output.flatten(2).to(hidden_states.dtype))), weights


def _multiplies_bfloat16() -> bool:
    """Whether small products of bfloat16 are fast on this CPU: those of MKL are, with the instructions for them, which
    it uses on Intel's alone."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.cpu, "get_capabilities")):
        return False
    cpu = torch.cpu.get_capabilities()
    return "Intel" in cpu.get("cpu_name", "") and cpu.get("avx512_bf16", False)


MULTIPLIES_BFLOAT16 = _multiplies_bfloat16()


def _better_in_float32(implementation, device, dtype, queries) -> bool:
    """Whether so many queries of a row attend faster in float32, whatever the model's type.

    With few queries the CPU kernel of half precision is the slower one, where its products are not fast; nor are those
    of the eager attention.
    """
    fast = MULTIPLIES_BFLOAT16 and dtype == torch.bfloat16 and implementation == "sdpa"
    return device.type == "cpu" and queries <= FEW_QUERIES and not fast


def _in_float32(*tensors):
    return [t.float() if t is not None and t.is_floating_point() else t for t in tensors]


def decoding_dtype(model, queries: int = 1) -> torch.dtype | None:
    """What a cache best holds where so many queries at a time attend in another type than the model's: casting all that
    it holds at every step costs more than attending to it."""
    in_float32 = _better_in_float32(model.config._attn_implementation, model.device, model.dtype, queries)
    return torch.float32 if in_float32 and model.dtype.itemsize < 4 else None


class ARDeTokMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ARDeTokConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.mlp_dropout)

    def forward(self, hidden_states):
        return self.dropout(self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)))


class ARDeTokDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: ARDeTokConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ARDeTokAttention(config, layer_idx)
        self.mlp = ARDeTokMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ARDeTokPreTrainedModel(PreTrainedModel):
    config: ARDeTokConfig
    base_model_prefix = "model"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ARDeTokDecoderLayer", "JanusVQVAE"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ARDeTokDecoderLayer, "attentions": ARDeTokAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ARDeTokPositionEmbedding) and self.config.fixed_positions:
            init.copy_(module.weight, module.sinusoids())


class ARDeTokPositionEmbedding(nn.Embedding):
    """One table of absolute positions over the condition and the image tokens, learned or fixed."""

    def __init__(self, config: ARDeTokConfig):
        super().__init__(config.max_position_embeddings, config.hidden_size)

    def sinusoids(self) -> torch.Tensor:
        """The fixed table: sines in the first half of the width, cosines in the second."""
        frequencies = 10000.0 ** (
            -torch.arange(self.embedding_dim // 2, dtype=torch.float64) / (self.embedding_dim / 2)
        )
        angles = torch.arange(self.num_embeddings, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.weight)


class ARDeTokModel(ARDeTokPreTrainedModel):
    """The decoder without output head: condition prefix and image tokens to hidden states."""

    def __init__(self, config: ARDeTokConfig):
        super().__init__(config)
        self.condition_proj = nn.Linear(config.condition_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = ARDeTokPositionEmbedding(config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(ARDeTokDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def check_condition(self, condition: torch.Tensor):
        """Raises a `ValueError` unless the features are (B, N, C) with a width and length that this model takes."""
        if condition.ndim != 3 or condition.shape[-1] != self.config.condition_size:
            raise ValueError(
                f"condition must have the shape (batch, tokens, {self.config.condition_size}), got "
                f"{tuple(condition.shape)}: is it made by the TA-Tok that this de-tokenizer was trained with?"
            )
        if not 0 < condition.shape[1] <= self.config.max_condition_tokens:
            raise ValueError(
                f"condition must have 1..{self.config.max_condition_tokens} tokens, got {condition.shape[1]}"
            )

    def embed_condition(self, condition: torch.Tensor) -> torch.Tensor:
        """Features (B, N, C) -> prefix (B, N, W). In training, rows lose their condition at `condition_dropout`."""
        self.check_condition(condition)
        condition = condition.to(self.condition_proj.bias.dtype)
        if self.training and self.config.condition_dropout > 0:
            kept = torch.rand(len(condition), 1, 1, device=condition.device) >= self.config.condition_dropout
            condition = condition * kept
        return self.condition_proj(condition)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        condition: torch.FloatTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        `condition` (B, N, C) and `input_ids` (B, L), either or both -> hidden states (B, N + L, W).

        By default they follow what `past_key_values` hold. `position_ids` (B, N + L) and an additive `attention_mask`
        (B, 1, N + L, keys) say otherwise.
        """
        if input_ids is None and condition is None:
            raise ValueError("expected condition, input_ids or both, got neither")
        prefix = [] if condition is None else [self.embed_condition(condition)]
        tokens = [] if input_ids is None else [self.embed_tokens(input_ids)]
        inputs_embeds = torch.cat(prefix + tokens, dim=1)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past)[None]
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = self.dropout(inputs_embeds) + self.position_embedding(position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class ARDeTokForCausalLM(ARDeTokPreTrainedModel, GenerationMixin):
    """
    The autoregressive de-tokenizer with its VQ autoencoder: TA-Tok features in, pixels out.

    ```python
    >>> detok = ARDeTokForCausalLM.from_pretrained(path).eval()
    >>> features = ta_tok.decode(codes)
    >>> pixels = detok.detokenize(features, generator=torch.Generator().manual_seed(0))  # (B, 3, H, H) in 0..1
    ```
    """

    def __init__(self, config: ARDeTokConfig):
        super().__init__(config)
        self.model = ARDeTokModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vqvae = JanusVQVAE._from_config(config.vq_config)
        # The library's name of a loss that shifts nothing: by it, Trainer counts all of the labels as targets.
        self.loss_type = "ForMaskedLM"
        # The sampling of the release; a repo's generation_config.json overrides it.
        self.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, guidance_scale=4.0
        )
        self.post_init()
        self._freeze()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)  # makes every weight trainable
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    def _freeze(self):
        """The autoencoder defines the tokens, so it is trained beforehand; fixed positions stay fixed."""
        self.vqvae.requires_grad_(False)
        if self.config.fixed_positions:
            self.model.position_embedding.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        condition: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        guidance_scale: float | None = None,
        logits_to_keep: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): Image tokens known so far, 0..V-1.
            condition (`torch.FloatTensor` of shape `(B, N, C)`, *optional*): TA-Tok features. Only left out when
                `past_key_values` already holds them.
            labels (`torch.LongTensor` of shape `(B, M)`, *optional*): All image tokens, the targets of the loss.
                Without `input_ids` the inputs are derived from them: nothing is to be shifted outside. -100 is not
                counted, and then needs `input_ids`.
            past_key_values (`Cache`, *optional*): Keys and values of everything before; of 2B rows under guidance.
            use_cache (`bool`, *optional*): Whether to return `past_key_values`.
            guidance_scale (`float`, *optional*): When given, each row is run a second time without its condition, and
                the logits are `uncond + guidance_scale * (cond - uncond)`.
            logits_to_keep (`int`, *optional*, defaults to `0`): Only compute the last so many logits; 0 means all.

        Returns:
            `CausalLMOutputWithPast`: `logits` (B, L + 1, V) where a condition is given: `logits[:, j]` predicts image
            token j. Without it (B, L, V), for the tokens that follow each input.
        """
        if labels is not None and condition is None and past_key_values is None:
            raise ValueError("condition is missing: an image is learnt behind TA-Tok's features")
        if labels is not None and input_ids is None:
            tokens, size = self.config.num_image_tokens, self.config.image_size
            if labels.shape[1] != tokens:
                raise ValueError(f"labels must be the {tokens} tokens of a {size} px image, got {labels.shape[1]}")
            if not torch.compiler.is_compiling() and (labels == -100).any():
                raise ValueError("labels hold -100, so the inputs cannot be derived from them: pass input_ids too")
            input_ids = labels[:, :-1]
        # The last prefix position predicts token 0: what stands before it predicts nothing.
        first = condition.shape[1] - 1 if condition is not None else 0
        rows = None
        if guidance_scale is not None:
            if condition is not None:
                # Behind no condition all rows are alike until their tokens come: one of them is computed for all.
                alike = input_ids is None and not self.training and _may_choose_rows(past_key_values, kwargs)
                if alike and len(condition) > 1:
                    rows = [*range(len(condition)), *[len(condition)] * len(condition)]
                condition = torch.cat([condition, torch.zeros_like(condition if rows is None else condition[:1])])
            input_ids = None if input_ids is None else torch.cat([input_ids, input_ids])

        is_static = type(past_key_values) is StaticCache
        outputs = self.model(
            input_ids=input_ids,
            condition=condition,
            # A static cache is of all rows from the start: what is computed once is held by another first.
            past_key_values=past_key_values if rows is None or not is_static else DynamicCache(config=self.config),
            use_cache=use_cache,
            **kwargs,
        )
        if rows is not None:
            outputs = _chosen_rows(outputs, rows, past_key_values if is_static else None)
        hidden_states = outputs.last_hidden_state[:, first:]
        logits = self.lm_head(hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states)
        if guidance_scale is not None:
            conditional, unconditional = logits.float().chunk(2)
            logits = unconditional + guidance_scale * (conditional - unconditional)

        loss = None
        if labels is not None:
            if logits.shape[:2] != labels.shape:
                raise ValueError(
                    f"labels must name the token after the condition and after each input, {tuple(logits.shape[:2])}, "
                    f"got {tuple(labels.shape)}"
                )
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(
        self,
        condition: torch.FloatTensor,
        generation_config: GenerationConfig | None = None,
        guidance_scale: float | None = None,
        guidance_interval: int = -1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        jacobi_window: int | None = None,
        **kwargs,
    ) -> torch.LongTensor:
        r"""
        Draws all M tokens of an image, for each row of the condition.

        Args:
            condition (`torch.FloatTensor` of shape `(B, N, C)`): TA-Tok features.
            generation_config (`GenerationConfig`, *optional*): Sampling options; the model's own by default, which are
                those of the release: `do_sample=True, temperature=1.0, top_k=0, top_p=1.0, guidance_scale=4.0`.
            guidance_scale (`float`, *optional*): Classifier-free guidance, before temperature and filters; 1 is off.
            guidance_interval (`int`, *optional*, defaults to `-1`): With i >= 0 only the first i + 2 tokens are guided,
                and from then on the unconditional rows are no longer computed. -1 guides all of them.
            generator (`torch.Generator` or a list with one per returned row, *optional*): Source of the draws. Row i
                depends on its own generator only; the global one is neither used nor moved, also without a generator.
            jacobi_window (`int`, *optional*): Draws so many tokens at once and keeps those that are the ones of drawing
                one by one: fewer steps, the same image, see `jacobi_decode`. Worth it where a step of many tokens costs
                little more than a step of one: few images, and weights that take longer to read than to multiply.
            kwargs: Every other option of [`~GenerationMixin.generate`] for greedy search and sampling: `do_sample`,
                `temperature`, `top_k`, `top_p`, `num_return_sequences`, `cache_implementation`, `streamer`, ...

        Returns:
            `torch.LongTensor` of shape `(B * num_return_sequences, M)`, or a `GenerateDecoderOnlyOutput` with
            `return_dict_in_generate=True`. Always M tokens, unless the caller's own `stopping_criteria` end it earlier.

        Raises:
            `ValueError`: a condition of another width, a length option, a mode other than the two, tokens to go on
            from, a cache that is not empty, a model in training mode, or scores that are NaN.
        """
        if self.training:
            raise ValueError(
                "in training mode conditions and features are dropped at random: call eval() before drawing"
            )
        for name in ("inputs", "input_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                raise ValueError(f"an image is drawn from its condition, from the first token on: leave {name} out")
        if (cache := kwargs.get("past_key_values")) is not None and (jacobi_window or cache.get_seq_length()):
            raise ValueError("past_key_values must be empty, and jacobi_window has a cache of its own: leave it out")
        num_tokens = self.config.num_image_tokens
        for config in (kwargs, {} if generation_config is None else generation_config.to_diff_dict()):
            for option in ("max_length", "min_length", "max_new_tokens", "min_new_tokens", "eos_token_id", "max_time"):
                if config.get(option) is not None and (option, config[option]) != ("max_new_tokens", num_tokens):
                    raise ValueError(
                        f"an image always has {num_tokens} tokens: {option}={config[option]} cannot be respected"
                    )
        generation_config, kwargs = self._prepare_generation_config(generation_config, **kwargs)
        generation_config.max_new_tokens, generation_config.max_length = num_tokens, None
        if not generation_config.do_sample and generation_config.top_k == 0:
            generation_config.top_k = 50  # the library's neutral value: it warns about any other in greedy search
        mode = generation_config.get_generation_mode(kwargs.get("assistant_model"))
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or not generation_config.use_cache:
            raise ValueError(f"only greedy search and sampling with a cache draw an image, got {mode}")

        guidance_scale = generation_config.guidance_scale if guidance_scale is None else guidance_scale
        generation_config.guidance_scale = 1.0  # forward() guides: the library's own guidance runs one row at a time
        if guidance_scale is not None and guidance_scale < 1:
            raise ValueError(f"guidance_scale must be at least 1, which turns guidance off, got {guidance_scale}")
        if guidance_interval < -1:
            raise ValueError(f"guidance_interval must be -1 for no end or a token number, got {guidance_interval}")
        if guidance_interval >= 0 and generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError(
                "guidance_interval drops rows of the cache in the middle, which only the dynamic and the static cache "
                f"allow, got cache_implementation={generation_config.cache_implementation!r}"
            )
        guided = guidance_scale is not None and guidance_scale != 1
        self.model.check_condition(condition)

        def make_uniform(rows, device):
            return draw_uniform(rows, num_tokens, generator, device)

        if jacobi_window is None:
            decoding = seeded_decoding(
                make_uniform,
                capacity=condition.shape[1] + num_tokens,
                cache_dtype=decoding_dtype(self),
                streamer=kwargs.get("streamer"),
                synced_gpus=bool(kwargs.get("synced_gpus")),
            )
        else:
            self._check_jacobi(jacobi_window, guidance_interval, generation_config)
            cache_dtype = decoding_dtype(self, jacobi_window)
            decoding = jacobi_decoding(jacobi_window, make_uniform, cache_dtype, kwargs.get("streamer"))
        return super().generate(
            # To the library the condition is the prompt's embeddings: it only looks at the shape.
            inputs_embeds=condition,
            generation_config=generation_config,
            custom_generate=decoding,
            guidance=(guidance_scale, guidance_interval) if guided else None,
            **kwargs,
        )

    def _check_jacobi(self, window, guidance_interval, generation_config):
        if not isinstance(window, int) or window < 2:
            raise ValueError(f"jacobi_window must be a number of tokens, at least 2, got {window!r}")
        if guidance_interval >= 0:
            raise ValueError("jacobi_window guides all tokens: leave guidance_interval out")
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                "jacobi_window masks each row for itself, which only the attentions eager and sdpa do, got "
                f"{self.config._attn_implementation}"
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "jacobi_window has a cache of its own, got cache_implementation="
                f"{generation_config.cache_implementation!r}"
            )
        for option in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(generation_config, option):
                raise ValueError(f"jacobi_window has no scores and states step by step: leave {option} out")

    def prepare_inputs_for_generation(
        self,
        input_ids,
        inputs_embeds=None,
        past_key_values=None,
        guidance=None,
        is_first_iteration=False,
        next_sequence_length=None,
        **kwargs,
    ):
        guidance_scale, interval = guidance or (None, -1)
        step = input_ids.shape[1]
        if 0 <= interval < step - 1:
            guidance_scale = None
            if step == interval + 2:
                keep_first_rows(past_key_values, len(input_ids))
        # A copy: of one row the last column counts as contiguous, and has another stride at every step, for each of
        # which a compiled step is compiled, and its CUDA graph recorded, anew.
        last = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
        inputs = {"condition": inputs_embeds} if is_first_iteration else {"input_ids": last}
        return {**inputs, "past_key_values": past_key_values, "guidance_scale": guidance_scale, **kwargs}

    def decode_ids(self, ids: torch.LongTensor) -> torch.FloatTensor:
        """
        VQ tokens (B, M) -> pixels (B, 3, H, H), nominally 0..1 but not clamped.

        Raises `TypeError` for ids of a floating-point type and `ValueError` for another shape or ids outside 0..V-1.
        """
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        if ids.ndim != 2 or ids.shape[1] != self.config.num_image_tokens:
            raise ValueError(f"ids must have the shape (batch, {self.config.num_image_tokens}), got {tuple(ids.shape)}")
        if ids.numel() and (ids.min() < 0 or ids.max() >= self.config.vocab_size):
            raise ValueError(
                f"ids must be in 0..{self.config.vocab_size - 1}, got {ids.min().item()}..{ids.max().item()}"
            )
        # On a CPU one after another: a batch is slower, and needs its memory.
        parts = ids.long().split(1 if ids.device.type == "cpu" else max(1, len(ids)))
        return torch.cat([self.vqvae.decode(part) for part in parts]) * 0.5 + 0.5

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.FloatTensor) -> torch.LongTensor:
        """
        Pixels (B, 3, H, H) in 0..1 -> VQ tokens (B, M), the targets of training.

        Raises `ValueError` for another shape or pixels outside 0..1.
        """
        size = self.config.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"pixels must have the shape (batch, 3, {size}, {size}), got {tuple(pixels.shape)}")
        if pixels.numel() and not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(f"pixels must be in 0..1, got {pixels.min().item():.4g}..{pixels.max().item():.4g}")
        return nearest_vq_tokens(self.vqvae, pixels)

    @torch.no_grad()
    def detokenize(
        self,
        features: torch.FloatTensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs,
    ) -> torch.FloatTensor:
        """
        TA-Tok features (B, N, C) -> pixels (B, 3, H, H) in 0..1. The method that every de-tokenizer has.

        `kwargs` are the options of [`~ARDeTokForCausalLM.generate`], for instance `guidance_scale` and `temperature`.
        """
        drawn = self.generate(features, generator=generator, **kwargs)
        return self.decode_ids(drawn if isinstance(drawn, torch.Tensor) else drawn.sequences).clamp(0, 1)


def _may_choose_rows(past_key_values, options):
    """Whether rows can be chosen of what a call leaves in a cache, and nothing that it gets is of each row yet."""
    empty = past_key_values is None or (
        type(past_key_values) in (DynamicCache, StaticCache)
        and not past_key_values.offloading
        and past_key_values.get_seq_length() == 0
    )
    return empty and all(options.get(name) is None for name in ("attention_mask", "position_ids"))


def _chosen_rows(outputs, rows, cache=None):
    """What the decoder gives and leaves in a cache, the given one or its own, of these rows, some more than once."""
    if cache is not None:
        take_rows(cache, outputs.past_key_values, torch.tensor(rows))
    elif (cache := outputs.past_key_values) is not None:
        cache.batch_select_indices(torch.tensor(rows))
    hidden_states, attentions = (
        None if of_layers is None else tuple(None if of_layer is None else of_layer[rows] for of_layer in of_layers)
        for of_layers in (outputs.hidden_states, outputs.attentions)
    )
    return BaseModelOutputWithPast(
        last_hidden_state=outputs.last_hidden_state[rows],
        past_key_values=cache,
        hidden_states=hidden_states,
        attentions=attentions,
    )


@torch.no_grad()
def nearest_vq_tokens(vqvae: JanusVQVAE, pixels: torch.FloatTensor) -> torch.LongTensor:
    """Pixels (B, 3, H, H) in 0..1 -> VQ tokens (B, M) of an autoencoder, which needs its encoding half only."""
    latents = vqvae.quant_conv(vqvae.encoder(pixels.to(vqvae.dtype) * 2 - 1))
    # Cosine decides, as in LlamaGen. JanusVQVAE.encode compares by distance and finds other tokens.
    latents = F.normalize(latents.float().flatten(2).mT, dim=-1)
    codebook = F.normalize(vqvae.quantize.embedding.weight.float(), dim=-1)
    return torch.stack([(rows @ codebook.mT).argmax(-1) for rows in latents])


ARDeTokConfig.register_for_auto_class()
ARDeTokForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["PRESETS", "ARDeTokConfig", "ARDeTokForCausalLM", "ARDeTokModel", "ARDeTokPreTrainedModel"]
