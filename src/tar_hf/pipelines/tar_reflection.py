"""Self-reflection (paper 2506.18898): the language model says which of several drawings match what was asked for.

This file travels with `pipeline_tar.py` into repositories, so it imports nothing of the package.
"""

import torch

from .tar_prompts import IMAGE, MATCHES, user_turns

Request = tuple[str, list[torch.LongTensor]]  # a prompt, and the codes (N,) of its images


@torch.no_grad()
def match_logits(pipe, requests: list[Request], codes: torch.LongTensor) -> torch.FloatTensor:
    """
    How much likelier the model says yes than no to each candidate.

    Args:
        pipe (`TarPipeline`): The system.
        requests (`list[Request]`): What each image was drawn for. The judge sees a request's own images where its
            prompt has them.
        codes (`torch.LongTensor` of shape `(images, candidates, N)`): What was drawn.

    Returns:
        `torch.FloatTensor` of shape `(images, candidates)`: log-odds, in float32.
    """
    answers = [_first_tokens(pipe.tokenizer, words) for words in (("yes", "Yes"), ("no", "No"))]
    logits = []
    for (prompt, given), drawn in zip(requests, codes, strict=True):
        turns = user_turns(f"{IMAGE}\n{MATCHES.format(prompt)}")
        ids, mask = pipe._pad([pipe._prompt_ids(turns, [row, *given]) for row in drawn])
        answer = pipe.model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1].float()
        yes, no = (answer[:, tokens].logsumexp(-1) for tokens in answers)
        logits.append(yes - no)
    return torch.stack(logits).cpu()


def _first_tokens(tokenizer, words):
    """First tokens of the words, which differ from tokenizer to tokenizer."""
    return sorted({tokenizer(word, add_special_tokens=False).input_ids[0] for word in words})
