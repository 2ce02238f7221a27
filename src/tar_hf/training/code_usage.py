"""How much of its codebook an image tokenizer uses while it is trained. K codes."""

import torch


class CodeUsage:
    """Counts codes, on the device of the training."""

    def __init__(self, num_codes: int, device: torch.device):
        self.counts = torch.zeros(num_codes, dtype=torch.long, device=device)

    def add(self, codes: torch.LongTensor):
        codes = codes.flatten()
        self.counts.scatter_add_(0, codes, torch.ones_like(codes))

    def metrics(self, accelerator) -> dict[str, float]:
        """Of all processes since the last call, see `code_statistics`."""
        counts = accelerator.reduce(self.counts, "sum")
        self.counts.zero_()
        return code_statistics(counts)


def code_statistics(counts: torch.LongTensor) -> dict[str, float]:
    """How often each code was used (K,) -> the share that was used at all, and the perplexity, 1..K."""
    counts = counts.cpu()
    if not counts.sum():
        return {}
    probabilities = counts.double() / counts.sum()
    perplexity = torch.special.entr(probabilities).sum().exp()
    return {"code_usage": (counts > 0).double().mean().item(), "perplexity": perplexity.item()}
