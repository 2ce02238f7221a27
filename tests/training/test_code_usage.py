"""Shares and perplexities of codes, by hand."""

import math

import pytest
import torch
from accelerate import Accelerator

from tar_hf.training.code_usage import CodeUsage, code_statistics


def test_statistics_of_codes():
    assert code_statistics(torch.tensor([6, 6, 0, 0])) == {"code_usage": 0.5, "perplexity": pytest.approx(2)}
    assert code_statistics(torch.full((50,), 3)) == {"code_usage": 1, "perplexity": pytest.approx(50)}
    assert code_statistics(torch.tensor([0, 9])) == {"code_usage": 0.5, "perplexity": 1}
    skewed = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert code_statistics(torch.tensor([3, 1]))["perplexity"] == pytest.approx(skewed)
    assert code_statistics(torch.zeros(4, dtype=torch.long)) == {}


def test_codes_are_counted_since_the_last_call():
    usage, accelerator = CodeUsage(4, torch.device("cpu")), Accelerator(cpu=True)
    usage.add(torch.tensor([[0, 1], [1, 1]]))
    usage.add(torch.tensor([2]))
    assert usage.metrics(accelerator) == code_statistics(torch.tensor([1, 3, 1, 0]))
    assert usage.metrics(accelerator) == {}
