"""Self-reflection (paper 2506.18898): the language model says which of several drawings match what was asked for.

This file travels with `pipeline_tar.py` into repositories, so it imports nothing of the package.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from .tar_prompts import DESCRIBE, IMAGE, MATCHES, VARIATION, user_turns
from .tar_sampling import make_generators

try:
    from tar_hf.modeling.seeded_decoding import NumbersOnly
except ImportError:  # in a Hub repository, where the files stand side by side
    from .seeded_decoding import NumbersOnly

Request = tuple[str, list[torch.LongTensor]]  # a prompt, and the codes (N,) of its images
DESCRIPTION_TOKENS = 64  # of a description at most


class Judge:
    """
    How well drawings match what they were drawn for.

    The language model is asked whether a drawing matches its prompt. For a variation of an image (`VARIATION`) it
    describes that image once, and the drawings are judged by how likely it would say the same of each: what two images
    have in common is easier to say of one after the other than to see in both at once.

    Args:
        pipe (`TarPipeline`): The system.
        requests (`list[Request]`): What was asked for. The judge sees a request's own images where its prompt has them.
        scale (`int`, *optional*, defaults to `1`): Of the drawings' codes.
        likelihood (`float`, *optional*, defaults to `0.0`): Of pictures, how much the likelihood of what is read from
            them counts beside the judgement.
        callback (*optional*): Sees the descriptions being written, see `TarPipeline`.
    """

    def __init__(self, pipe, requests: list[Request], scale: int = 1, likelihood: float = 0.0, callback=None):
        self.pipe = pipe
        self.requests = requests
        self.scale = scale
        self.likelihood = likelihood
        self.answers = [_first_tokens(pipe.tokenizer, words) for words in (("yes", "Yes"), ("no", "No"))]
        variations = {i: given for i, (prompt, given) in enumerate(requests) if prompt == VARIATION}
        described = self._describe(variations.values(), callback) if variations else []
        self.descriptions = dict(zip(variations, described, strict=True))  # by the request

    def __call__(self, codes: torch.LongTensor) -> torch.FloatTensor:
        """
        Args:
            codes (`torch.LongTensor` of shape `(requests * copies, candidates, N)`): What was drawn, the copies of a
                request side by side.

        Returns:
            `torch.FloatTensor` of shape `(requests * copies, candidates)`: log-odds of a match, in float32.
        """
        return self._of_each(self._log_odds, codes)

    def log_likelihood(self, codes: torch.LongTensor) -> torch.FloatTensor:
        """
        How likely the model would have drawn this.

        Args:
            codes (`torch.LongTensor` of shape `(requests * copies, candidates, N)`): As in a call.

        Returns:
            `torch.FloatTensor` of shape `(requests * copies, candidates)`: log-likelihoods of all N codes behind the
            request, in nats, without guidance or limits of the sampling, in float32.
        """
        return self._of_each(self._log_likelihood, codes)

    def _of_each(self, score, codes):
        copies = len(codes) // len(self.requests)
        scores = torch.stack([score(i // copies, drawn) for i, drawn in enumerate(codes)]).cpu()
        numbers = NumbersOnly()
        numbers(None, scores)
        numbers.check()
        return scores

    @torch.no_grad()
    def _log_likelihood(self, i, drawn):
        """Of drawing each of the candidates (candidates, N) for request `i`."""
        prompt, given = self.requests[i]
        rows = self.pipe._drawing_rows([prompt], [given], self.scale)
        # One after the other: the logits of a picture with a large codebook are no small thing.
        logits = (self.pipe._code_logits(rows, codes[None])[0] for codes in drawn)
        likely = [
            -cross_entropy(of, codes.to(of.device), reduction="sum") for of, codes in zip(logits, drawn, strict=True)
        ]
        return torch.stack(likely)

    @torch.no_grad()
    def _log_odds(self, i, drawn):
        """Of a match with request `i`, for each of the candidates (candidates, N)."""
        if i in self.descriptions:
            return self._log_odds_of_saying(self.descriptions[i], drawn)
        prompt, given = self.requests[i]
        turns = user_turns(f"{IMAGE}\n{MATCHES.format(prompt)}")
        answer = self._logits([self.pipe._prompt_ids(turns, [codes, *given]) for codes in drawn], last=1)[:, 0].float()
        yes, no = (answer[:, tokens].logsumexp(-1) for tokens in self.answers)
        return yes - no

    def _log_odds_of_saying(self, description, drawn):
        """Of the description's token ids, to the end of the answer, for each of the candidates."""
        logits = self._logits([self._asked_to_describe(codes) + description for codes in drawn], len(description) + 1)
        targets = torch.tensor(description, device=logits.device)
        # One after the other: in float32 a large vocabulary's logits are no small thing.
        surprise = torch.stack([cross_entropy(of[:-1].float(), targets, reduction="sum") for of in logits])
        return -surprise - torch.log(-torch.expm1(-surprise))

    def _logits(self, rows, last):
        """Of the last so many places of rows of token ids."""
        ids, mask = self.pipe._pad(rows)
        return self.pipe.model(input_ids=ids, attention_mask=mask, logits_to_keep=last).logits

    def _describe(self, images, callback):
        """What the model says of images, each in a list of its own, as token ids."""
        rows = [self._asked_to_describe(codes) for (codes,) in images]
        texts = self.pipe._write(rows, DESCRIPTION_TOKENS, do_sample=False, generator=None, callback=callback)
        tokenizer = self.pipe.tokenizer
        return [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for text in texts]

    def _asked_to_describe(self, codes):
        return self.pipe._prompt_ids(user_turns(f"{IMAGE}\n{DESCRIBE}"), [codes])


@dataclass
class Choice:
    """
    The best of each image's candidates.

    Args:
        codes (`torch.LongTensor` of shape `(images, N)`): Their codes.
        pixels (`torch.FloatTensor` of shape `(images, 3, H, W)`): Their pictures, in 0..1.
        chosen (`torch.LongTensor` of shape `(images,)`): Which candidate that is.
        scores, picture_scores (`torch.FloatTensor` of shape `(images, candidates)`, the second *optional*): How likely
            each candidate is a match, by its codes, and by what is read from its picture; NaN without a picture.
    """

    codes: torch.LongTensor
    pixels: torch.FloatTensor
    chosen: torch.LongTensor
    scores: torch.FloatTensor
    picture_scores: torch.FloatTensor | None = None


def choose(
    judge: Judge,
    codes: torch.LongTensor,
    generators: list[torch.Generator],
    pictures: int,
    draw: Callable[[torch.LongTensor, list[torch.Generator]], torch.FloatTensor],
    read: Callable[[torch.FloatTensor], torch.LongTensor],
) -> Choice:
    """
    The best candidates by their codes and, with several pictures each, by their pictures too.

    Args:
        judge (`Judge`): Of their requests.
        codes (`torch.LongTensor` of shape `(images, candidates, N)`): What was drawn.
        generators (`list[torch.Generator]`): One for each image, of the draws of its pixels.
        pictures (`int`): How many candidates of an image become pictures, at most.
        draw (`Callable`): Codes (n, N) and n generators -> pixels (n, 3, H, W).
        read (`Callable`): Pixels -> codes, the other way.
    """
    logits = judge(codes)
    best = logits.argsort(dim=-1, descending=True, stable=True)[:, :pictures]
    codes = codes.gather(1, best[..., None].expand(-1, -1, codes.shape[-1]))
    each = codes.shape[1]
    generators = [own for generator in generators for own in make_generators(generator, each)]
    pixels = draw(codes.flatten(0, 1), generators)
    if each == 1:
        return Choice(codes[:, 0], pixels, best[:, 0], logits.sigmoid())
    seen = read(pixels).view_as(codes)
    picture_logits = judge(seen)
    picture_scores = torch.full_like(logits, torch.nan).scatter(1, best, picture_logits.sigmoid())
    merits = logits.gather(1, best) + picture_logits
    if judge.likelihood:
        merits += judge.likelihood * judge.log_likelihood(seen)
    chosen = merits.argmax(-1)
    images = torch.arange(len(codes))
    pixels = pixels.unflatten(0, codes.shape[:2])[images, chosen]
    return Choice(codes[images, chosen], pixels, best[images, chosen], logits.sigmoid(), picture_scores)


def _first_tokens(tokenizer, words):
    """First tokens of the words, which differ from tokenizer to tokenizer."""
    return sorted({tokenizer(word, add_special_tokens=False).input_ids[0] for word in words})
