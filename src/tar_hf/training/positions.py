"""AR-DTok's position table: a start for a fresh one, and larger images from the weights of a smaller grid.

One table of absolute positions serves the condition and the image tokens. Behind a condition of full length N, row
N + j belongs to image token j, in reading order of the grid; the last token is never fed back, so it has no row. Behind
a shorter condition (scales 2 and 3) the tokens start in a lower row, on rows that serve both.

The original (`make` in `tok/models.py`) silently drops a table of another size and starts from a random one. Here the
old table is of use, in one of two ways:

- `interpolate`: each token gets the position of the place in the picture that it covers. What the model knows about the
  layout of pictures carries over behind conditions of full length. Behind shorter ones most tokens lie on rows below N,
  which stay as they are, and must learn the new grid.
- `extend`: all old rows stay, so every prefix that the old model could read gives the same logits, at any condition
  length. But a row now stands for another place in the picture (token 20 is in the second line of a grid of 16, and in
  the first of one of 32), and the rows added behind are untrained.

Fixed positions are a formula: they are computed for the new length, which leaves the old rows as they are.
"""

import copy
import math

import torch
import torch.nn.functional as F

from tar_hf.modeling.modeling_ar_detok import ARDeTokForCausalLM, ARDeTokPositionEmbedding

METHODS = ("interpolate", "extend")
STARTS = ("normal", "grid")
GRID_SCALE = 4  # of a grid start, in deviations of fresh weights


def grow_positions(
    table: torch.Tensor, condition_tokens: int, old_side: int, new_side: int, method: str = "interpolate"
) -> torch.Tensor:
    """
    A position table for a larger grid of image tokens.

    Args:
        table (`torch.Tensor` of shape `(N + old_side**2 - 1, W)`): The old table.
        condition_tokens (`int`): N, the longest condition.
        old_side, new_side (`int`): Sides of the token grids.
        method (`str`, *optional*, defaults to `"interpolate"`): `interpolate` keeps the first N rows and resamples the
            others as a grid, bicubically. `extend` keeps all rows and draws the new ones at the end from the normal
            distribution that has the mean and the deviation of the old ones in each column, always the same numbers.

    Returns:
        `torch.Tensor` of shape `(N + new_side**2 - 1, W)`, in the table's dtype.

    Raises:
        `ValueError`: a table of another length, a smaller grid, or an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"position_growth must be one of {', '.join(METHODS)}, got {method!r}")
    if table.ndim != 2 or len(table) != condition_tokens + old_side**2 - 1:
        raise ValueError(
            f"a table for {condition_tokens} condition tokens and a grid of {old_side} x {old_side} must have "
            f"{condition_tokens + old_side**2 - 1} rows, got the shape {tuple(table.shape)}"
        )
    if new_side < old_side:
        raise ValueError(
            f"positions grow, they do not shrink: expected a grid of at least {old_side} x {old_side}, got "
            f"{new_side} x {new_side}"
        )
    if new_side == old_side:
        return table.clone()
    if method == "extend":
        deviation, mean = torch.std_mean(table.float(), dim=0)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(new_side**2 - old_side**2, table.shape[1], generator=generator).to(table.device)
        return torch.cat([table, (mean + deviation * drawn).to(table.dtype)])

    if old_side < 2:
        raise ValueError("a grid of one token has no positions to interpolate between: use extend")
    condition, tokens = table[:condition_tokens], table[condition_tokens:].float()
    # The last place of the grid has no row. It continues the plane through its three neighbours.
    corner = tokens[-1] + tokens[-old_side] - tokens[-old_side - 1]
    grid = torch.cat([tokens, corner[None]]).mT.unflatten(-1, (old_side, old_side))
    # With `antialias` the kernel is PIL's, which keeps a linear table linear; the plain one does not.
    grid = F.interpolate(grid[None], size=(new_side, new_side), mode="bicubic", antialias=True)[0]
    return torch.cat([condition, grid.flatten(1).mT[:-1].to(table.dtype)])


def grow(model: ARDeTokForCausalLM, image_size: int, method: str = "interpolate") -> ARDeTokForCausalLM:
    """
    A model of its own that draws larger images: the position table grown, every other weight as it was.

    Args:
        model (`ARDeTokForCausalLM`): The model of the smaller grid. Stays as it is.
        image_size (`int`): Side of the drawn image in pixels.
        method (`str`, *optional*, defaults to `"interpolate"`): See `grow_positions`.

    Raises:
        `ValueError`: a size that is no multiple of the autoencoder's patch or smaller than before, an unknown method.
    """
    config = copy.deepcopy(model.config)
    old_side, config.vq_config.num_patches = config.vq_config.num_patches, grid_side(config.vq_config, image_size)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.position_embedding.weight"
    state[name] = grow_positions(
        state[name], config.max_condition_tokens, old_side, config.vq_config.num_patches, method
    )
    if config.fixed_positions:
        state[name] = ARDeTokPositionEmbedding(config).sinusoids().to(state[name])
    with torch.device("meta"):
        grown = ARDeTokForCausalLM(config)
    grown.load_state_dict(state, assign=True)
    grown.generation_config = copy.deepcopy(model.generation_config)
    return grown.train(model.training)


def grid_side(vq_config, image_size: int) -> int:
    """Side of the token grid of an image. `ValueError` for a size that is no multiple of the autoencoder's patch."""
    patch = 2 ** (len(vq_config.channel_multiplier) - 1)
    if image_size <= 0 or image_size % patch:
        raise ValueError(f"image_size must be a positive multiple of {patch}, got {image_size}")
    return image_size // patch


@torch.no_grad()
def start_on_grid(model: ARDeTokForCausalLM):
    """
    Starts a fresh model's positions so that places of the picture are near each other where they look alike.

    Each row gets sines and cosines of the place, across and down, that it is about: that of the condition token, or of
    the image token that is drawn next. Then attention to where the drawing is takes one rule to learn instead of one
    for each row. Holds behind conditions of full length. Four times as large as the normal numbers that the rows had: a
    condition token's features, a sum over their whole width, would drown these.
    """
    config, table = model.config, model.model.position_embedding.weight
    places = torch.cat([_places(math.isqrt(config.max_condition_tokens)), _places(config.vq_config.num_patches)[1:]])
    waves = table.shape[1] // 4
    # From a quarter of a wave over the picture to one every other token.
    lengths = torch.logspace(math.log2(0.25), math.log2(config.vq_config.num_patches / 2), waves, base=2)
    angles = 2 * math.pi * places[:, :, None] * lengths  # (rows, 2, waves)
    rows = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    rows *= math.sqrt(2) * GRID_SCALE * config.initializer_range
    table[:, : rows.shape[1]] = rows.to(table)


def _places(side):
    """The middles of a grid's cells (side * side, 2), in reading order, as shares of the picture."""
    middles = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(middles, middles, indexing="ij"), dim=-1).flatten(0, 1)
