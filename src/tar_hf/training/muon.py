"""Muon, an optimizer that turns a matrix by an orthogonal step, for the layers of a model, and AdamW for all else.

Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks" (2024), with steps as large as
AdamW's, so that learning rates mean the same (paper 2502.16982). torch has the optimizer too (`torch.optim.Muon`); that
one takes matrices alone, one after the other, and computes in bfloat16, which most CPUs emulate.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from tar_hf.training.recipe import MuonRecipe, RecipeError

# Of x -> a x + b x^3 + c x^5, which brings every singular value near 1 when it is applied some times.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# The root mean square of an AdamW step, measured in parts of its learning rate (paper 2502.16982, section 2.2).
ADAMW_STEP = 0.2


class MuonAdamW(Optimizer):
    """
    AdamW, but for parameter groups that have a `momentum`: these hold matrices, and get the steps of Muon.

    The kernels of a convolution are a matrix with a row for each channel that comes out.

    A step of Muon has the singular directions of the mean gradient and singular values near 1, so that rare directions
    are learnt as fast as frequent ones. It is scaled to the root mean square of an AdamW step.

    Args:
        params (`Iterable[dict]`): Groups of parameters. Those of matrices say `momentum`.
        kwargs: Those of `torch.optim.AdamW`; `lr` and `weight_decay` are Muon's, too.

    Raises:
        `ValueError`: a parameter of such a group that is neither.
    """

    def __init__(self, params: Iterable[dict], **kwargs):
        groups = list(params)
        rest = [dict(group) for group in groups if "momentum" not in group]
        self.adamw = AdamW(rest or [{"params": []}], **kwargs)  # an adapter may train matrices alone
        super().__init__(groups, self.adamw.defaults)
        for group in self.param_groups:
            if shapes := [tuple(p.shape) for p in group["params"] if "momentum" in group and p.ndim not in (2, 4)]:
                raise ValueError(f"Muon steps matrices and kernels, got a parameter of shape {shapes[0]}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Each time anew: schedules and loaded states replace what these are.
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self.adamw.step()
        for group in self.param_groups:
            if "momentum" in group:
                self._muon_step(group)
        return loss

    def _muon_step(self, group):
        alike = defaultdict(list)  # matrices of one shape are multiplied together
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike[matrix.shape, matrix.dtype, matrix.device].append(matrix)
        for matrices in alike.values():
            updates = []
            for matrix in matrices:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                updates.append(matrix.grad.lerp(mean, group["momentum"]))  # Nesterov's: the next mean, foretold
            updates = torch.stack(updates).flatten(2)  # what kernels have more than matrices
            step = group["lr"] * ADAMW_STEP * max(updates.shape[1:]) ** 0.5
            updates = orthogonalize(updates).unflatten(2, matrices[0].shape[1:])
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update.to(matrix.dtype), alpha=-step)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """
    Matrices with the singular vectors of those given, and singular values near 1 (about 0.7 to 1.2).

    By a Newton-Schulz iteration: matrix products alone, in bfloat16 on an accelerator and float32 on a CPU.

    Args:
        matrices (`torch.Tensor` of shape `(..., rows, columns)`): One or many.
    """
    turned = matrices.size(-2) > matrices.size(-1)  # products of the shorter side with itself are the cheaper ones
    x = matrices.mT if turned else matrices
    x = x.to(torch.float32 if x.device.type == "cpu" else torch.bfloat16)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if turned else x


def matrices_of_layers(model: nn.Module) -> list[nn.Parameter]:
    """
    What Muon steps: the trained weights of the linear layers and convolutions in a model's stacks (`nn.ModuleList`).

    Embeddings, an output head and what leads into and out of the stack are none of them: their rows stand for tokens
    or channels, and AdamW steps each row at its own pace. Nor are grouped convolutions, which mix few channels.
    """
    found = {}
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for module in stack.modules():
                mixing = isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.groups == 1
                if mixing and module.weight.requires_grad:
                    found[id(module.weight)] = module.weight
    return list(found.values())


def make_optimizer(
    model: nn.Module,
    recipe: MuonRecipe,
    learning_rate: float,
    weight_decay: float = 0.0,
    decayed: Iterable[str] = (),
    **adamw,
) -> MuonAdamW:
    """
    The optimizer of a model.

    Args:
        model (`nn.Module`): What is trained.
        recipe (`MuonRecipe`): Of the layers' matrices.
        learning_rate (`float`): Of all else.
        weight_decay (`float`, *optional*, defaults to `0.0`): Of the layers' matrices, and of what `decayed` names.
        decayed (*optional*): Names of parameters.
        adamw: Other arguments of `torch.optim.AdamW`.

    Raises:
        `RecipeError`: a model that has none of `matrices_of_layers`.
    """
    matrices = matrices_of_layers(model)
    if not matrices:
        raise RecipeError(f"muon steps the layers of a stack, and {type(model).__name__} trains none: leave it out")
    stepped, decayed = {id(matrix) for matrix in matrices}, set(decayed)
    rest = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in stepped:
            rest[name in decayed].append(parameter)
    muon = {"params": matrices, "momentum": recipe.momentum, "weight_decay": weight_decay}
    if recipe.learning_rate is not None:
        muon["lr"] = recipe.learning_rate
    groups = [{"params": rest[True], "weight_decay": weight_decay}, {"params": rest[False], "weight_decay": 0.0}]
    return MuonAdamW([muon, *(group for group in groups if group["params"])], lr=learning_rate, **adamw)
