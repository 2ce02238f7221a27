"""Linear layers whose weights lie in the order in which oneDNN reads them, for drawing token by token on a CPU.

A product of a few rows with a large matrix reads the matrix once and computes little. The plain call does not get
there: with AVX2 and float32, two rows (guidance) take it twice the time of one. From packed weights they take 1.2 times
that. The compiler of torch packs weights too, with the operators used here; this needs no compiler, and goes with it.
"""

from copy import deepcopy

import torch
from torch import nn

ROWS = 16  # that the order is chosen for; weights packed for one row are slow with two, those for 16 with none


class PackedLinear(nn.Module):
    """
    A linear layer for inference on the CPU, with packed weights. `weight` and `state_dict` give them as they were.

    Args:
        linear (`nn.Linear`): What it computes the same as, but for the order of sums.

    Raises:
        `ValueError`: weights that are not on a CPU, quantised, or of a dtype that oneDNN cannot multiply here.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        check_packable(linear)
        weight = linear.weight.detach()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, weight.dtype
        self.bias = linear.bias
        self._packed = _pack(weight)

    @property
    def weight(self) -> torch.Tensor:
        """A copy (out_features, in_features), unpacked."""
        return self._packed.to_dense()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != self.dtype:
            raise TypeError(f"weights that were packed in {self.dtype} take inputs of it, got {input.dtype}")
        multiply = torch.ops.tar_hf.packed_linear if torch.compiler.is_compiling() else _multiply
        return multiply(input, self._packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse=True):
        there = fn(torch.empty(0, dtype=self.dtype))
        if there.device.type != "cpu" or there.dtype != self.dtype:
            raise ValueError(f"packed weights stay {self.dtype} on the CPU: load the model again for {there.device}")
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo):
        linear = nn.Linear(self.in_features, self.out_features, bias=False, dtype=self.dtype, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = deepcopy(self.bias, memo)
        return memo.setdefault(id(self), PackedLinear(linear))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is None:
            missing.append(f"{prefix}weight")
        elif weight.shape != (self.out_features, self.in_features):
            errors.append(f"{prefix}weight must be {(self.out_features, self.in_features)}, got {tuple(weight.shape)}")
        else:
            self._packed = _pack(weight.to(self.dtype))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


def _multiply(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")


if not hasattr(torch.ops.tar_hf, "packed_linear"):  # else another copy of this file has defined it
    # The compiler takes that operator with weights that it has packed itself, and no others: it is not to look inside.
    torch.library.custom_op("tar_hf::packed_linear", _multiply, mutates_args=())

    @torch.library.register_fake("tar_hf::packed_linear")
    def _(input, packed, bias):
        return input.new_empty(*input.shape[:-1], packed.shape[0])


def _pack(weight):
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def check_packable(linear: nn.Linear):
    """Raises a `ValueError` unless the weights are plain ones on a CPU, of a dtype that oneDNN multiplies here."""
    weight = linear.weight.data
    if type(weight) is not torch.Tensor or weight.device.type != "cpu":
        raise ValueError(f"plain weights on a CPU can be packed, got {type(weight).__name__} on {weight.device}")
    able = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    if not able.get(weight.dtype):
        raise ValueError(f"this CPU has no products of {weight.dtype} to pack for: load with dtype=torch.float32")


def pack_linears(model: nn.Module) -> nn.Module:
    """
    Packs the weights of a model's linear layers, in place and one by one, so that not all are there twice.

    For inference on a CPU. Results are the same but for rounding. The output layer stays plain: a language model reads
    the rows of its codes alone, and it may be tied to the input.

    Args:
        model (`nn.Module`): AR-DTok, or a language model.

    Returns:
        `nn.Module`: `model`.

    Raises:
        `RuntimeError`: a torch without oneDNN.
        `ValueError`: see `PackedLinear`. Nothing is packed then.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("packing needs a torch with oneDNN (torch.backends.mkldnn.is_available() is False)")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and layer is not head
    ]
    for _, _, layer in layers:
        check_packable(layer)
    while layers:  # forgets each, so that its plain weights go
        parent, name, layer = layers.pop()
        setattr(parent, name, PackedLinear(layer))
    return model
