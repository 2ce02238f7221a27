"""What the contenders share: a clock, and what is fed to the models. Needs nothing but torch."""

import time

import torch

STEPS = 16  # tokens that are timed behind the first


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize():
    """Waits for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
