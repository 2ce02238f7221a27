"""Conversations as token ids and labels for the language model, one row or a batch at a time.

Paper 2506.18898; original `preprocess_qwen` in `llava/data/dataset.py` and `prepare_inputs_labels_for_multimodal` in
`llava/model/llava_arch.py`. The ids are those that `TarPipeline` builds: images of the user are bare codes, those of
the assistant `<im_start><S{s-1}><I..>...<im_end>`. One layout serves all five kinds of rows: text to image, image to
text, text to text, image to image, text and image to image.
"""

import random
import re
from dataclasses import replace

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from tar_hf.modeling.visual_vocabulary import VisualVocabulary
from tar_hf.pipelines.tar_prompts import IMAGE, SYSTEM, VISUAL_TEXT, chat_messages
from tar_hf.training.mixture import Mixture, Source
from tar_hf.training.rows import SCALE_WEIGHTS, BadRow, Row

IGNORED = -100  # label of a position without a target
TARGETS = ("assistant", "original")


class ConversationTokenizer:
    """
    A pre-tokenised row -> token ids and labels.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With visual tokens and a chat template.
        vocabulary (`VisualVocabulary`, *optional*): Its visual tokens. By default found in the tokenizer.
        max_length (`int`, *optional*, defaults to `2048`): Longest row in tokens. A longer one is a `BadRow`.
        scale_weights (`dict[int, float]`, *optional*): How often each TA-Tok scale is drawn, by default 2:1:1 for
            1, 2, 3, among those that the row has codes for. All images of a row share it, but for `mixed_scales`.
        mixed_scales (`float`, *optional*, defaults to `0.0`): How often the images that a row asks about draw a scale
            anew, which may be the same, apart from those that are to be drawn: what another `image_scale` than
            `scale` of a `TarPipeline` call needs.
        targets (`str`, *optional*, defaults to `"assistant"`): `"assistant"`: what the assistant has to write, from
            the first token of its answer to the tag that closes it. `"original"`: the original's set, that is whole
            assistant messages with the role in front and the newline behind, and in all messages every newline token
            and chat tag.
        prompt_dropout (`float`, *optional*, defaults to `0.0`): How often a row that only asks for an image, in words
            or with images, is learnt with an empty request instead: what `prompt_guidance_scale` of a `TarPipeline`
            leads away from.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: VisualVocabulary | None = None,
        max_length: int = 2048,
        scale_weights: dict[int, float] | None = None,
        targets: str = "assistant",
        prompt_dropout: float = 0.0,
        mixed_scales: float = 0.0,
    ):
        vocabulary = VisualVocabulary.from_tokenizer(tokenizer) if vocabulary is None else vocabulary
        scale_weights = SCALE_WEIGHTS if scale_weights is None else scale_weights
        if targets not in TARGETS:
            raise ValueError(f"targets must be one of {', '.join(TARGETS)}, got {targets!r}")
        if not scale_weights:
            raise ValueError("scale_weights must name at least one scale, got none")
        for scale, weight in scale_weights.items():
            vocabulary.scale_id(scale)
            if not weight > 0:
                raise ValueError(f"scale {scale} needs a weight above 0, got {weight}: leave it out instead")
        if not 0 <= prompt_dropout < 1:
            raise ValueError(f"prompt_dropout must be at least 0 and below 1, got {prompt_dropout}")
        if not 0 <= mixed_scales <= 1:
            raise ValueError(f"mixed_scales must be in 0..1, got {mixed_scales}")
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.mixed_scales = mixed_scales
        self.max_length = max_length
        self.prompt_dropout = prompt_dropout
        self.scale_weights = dict(scale_weights)
        self.targets = targets
        # Text that would turn into tokens with a meaning of their own.
        special = map(re.escape, sorted(set(tokenizer.all_special_tokens)))
        self.reserved = re.compile("|".join([VISUAL_TEXT.pattern, *special]))
        self.everywhere = []
        if targets == "original":
            self.everywhere = [self._one_id(text) for text in ("\n", "<|im_start|>", "<|im_end|>")]

    def __call__(self, row: Row, draw: random.Random) -> dict[str, torch.LongTensor]:
        """
        Args:
            row (`Row`): With `codes` for each of its images.
            draw (`random.Random`): Draws the scales, and whether the request is dropped.

        Returns:
            `input_ids` and `labels`, each a `torch.LongTensor` of shape `(tokens,)`; `labels` has -100 where nothing is
            to be learnt. Labels stand at the place of their token: models shift them.

        Raises:
            `BadRow`: images without codes, no scale to draw, text that spells special or visual tokens, a row longer
            than `max_length`.
        """
        for _, text in row.turns:
            self._check(text)
        if self.prompt_dropout and _only_asks_for_an_image(row) and draw.random() < self.prompt_dropout:
            row = replace(row, turns=[("user", ""), row.turns[-1]], images=row.images[-1:], codes=row.codes[-1:])
        scale = read_scale = self._draw_scale(row, draw)
        if self.mixed_scales and draw.random() < self.mixed_scales:
            read_scale = self._draw_scale(row, draw)
        codes = self._image_ids(row, scale, read_scale)
        ids, labels = [], []
        for text, targets in self._pieces(row.turns, scale):
            piece = []
            for token in self.tokenizer(text, add_special_tokens=False).input_ids:
                # One code stands in for all of an image's.
                piece += next(codes) if token == self.vocabulary.first_code_id else [token]
            count = len(piece) if targets is None else targets
            ids += piece
            labels += piece[:count] + [IGNORED] * (len(piece) - count)
        if len(ids) > self.max_length:
            raise BadRow(f"the row has {len(ids)} tokens, more than max_length={self.max_length}")
        labels = [token if token in self.everywhere else label for token, label in zip(ids, labels, strict=True)]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def _pieces(self, turns, scale):
        """The text of a conversation in pieces, each with the number of its first tokens that are targets: 0, 1, or
        `None` for all.

        An answer is a piece of its own, tokenised apart from the prompt, as it is when the model writes it.
        """
        if turns[0][0] != "system":
            turns = [("system", SYSTEM), *turns]
        messages = chat_messages(turns, scale)
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            answer = message["content"]
            before, opened = self._render(messages[:i]), self._render(messages[:i], opened=True)
            closed = self._render(messages[: i + 1])
            if not (before.startswith(done) and opened.startswith(before) and closed.startswith(opened + answer)):
                raise ValueError(
                    "the chat template must add each message to those before and write answers as they are, but from "
                    f"{opened + answer!r} it made {closed!r}"
                )
            original = self.targets == "original"
            yield before[len(done) :], 0
            yield opened[len(before) :], None if original else 0
            yield answer, None
            yield closed[len(opened + answer) :], None if original else 1
            done = closed

    def _render(self, messages, opened=False):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)

    def _draw_scale(self, row, draw):
        if not row.num_images:
            return 1
        if not row.codes:
            raise BadRow("the row's pictures have no codes: run `tar-hf pretokenize` first")
        scales = [scale for scale in self.scale_weights if all(scale in image for image in row.codes)]
        if not scales:
            raise BadRow(
                f"the row has codes of the scales {sorted(row.codes[0])}, but scale_weights names "
                f"{sorted(self.scale_weights)}"
            )
        return draw.choices(scales, [self.scale_weights[scale] for scale in scales])[0]

    def _image_ids(self, row, scale, read_scale):
        """The codes of each image as ids, the assistant's of one scale and those that it reads of another."""
        scales = []
        for role, text in row.turns:
            scales += [scale if role == "assistant" else read_scale] * text.count(IMAGE)
        try:
            pairs = zip(row.codes, scales, strict=True)
            return iter([self.vocabulary.codes_to_ids(image[of]).tolist() for image, of in pairs])
        except ValueError as error:
            raise BadRow(str(error)) from error

    def _check(self, text):
        if spelt := self.reserved.search(text):
            raise BadRow(f"a conversation must not spell special or visual tokens such as {spelt[0]}")

    def _one_id(self, text):
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f'targets="original" needs a tokenizer with one token for {text!r}, got {len(ids)}')
        return ids[0]


def _only_asks_for_an_image(row):
    *before, (_, answer) = row.turns
    return answer.strip() == IMAGE and [role for role, _ in before] in (["user"], ["system", "user"])


class PaddingCollator:
    """
    Rows -> `input_ids`, `labels`, `attention_mask`, each (rows, length of the longest), padded on the right.

    Args:
        pad_token_id (`int`): What `input_ids` are padded with.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, torch.LongTensor]]) -> dict[str, torch.LongTensor]:
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


class PackingCollator:
    """
    Rows -> `input_ids`, `labels`, `position_ids`, each (sequences, length of the longest), several rows a sequence.

    Positions start again at each row, by which transformers (5.23, `find_packed_sequence_indices`) tells the rows
    apart: none attends to another, and no row's end predicts the start of the next. Padding is a row of its own. It
    needs a model that keeps no cache, which Trainer sees to.

    Args:
        pad_token_id (`int`): What `input_ids` are padded with.
        max_length (`int`, *optional*): Longest sequence. The longest rows are placed first, each in the first sequence
            with room for it. `None` makes one sequence of all rows without padding, the only form that flash attention
            tells apart.
    """

    def __init__(self, pad_token_id: int, max_length: int | None):
        self.pad_token_id = pad_token_id
        self.max_length = max_length

    def __call__(self, rows: list[dict[str, torch.LongTensor]]) -> dict[str, torch.LongTensor]:
        sequences = self._place(
            [{name: torch.as_tensor(row[name]) for name in ("input_ids", "labels")} for row in rows]
        )
        length = max(sum(len(row["input_ids"]) for row in rows) for rows in sequences)
        packed = [self._join(rows, length) for rows in sequences]
        return {name: torch.stack([sequence[name] for sequence in packed]) for name in packed[0]}

    def _place(self, rows):
        if self.max_length is None:
            return [rows]
        sequences, room = [], []
        for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
            length = len(row["input_ids"])
            if length > self.max_length:
                raise ValueError(f"a row has {length} tokens, more than max_length={self.max_length}")
            place = next((i for i, left in enumerate(room) if left >= length), None)
            if place is None:
                place = len(sequences)
                sequences.append([])
                room.append(self.max_length)
            sequences[place].append(row)
            room[place] -= length
        return sequences

    def _join(self, rows, length):
        ids, labels = [row["input_ids"] for row in rows], [row["labels"].clone() for row in rows]
        for row in labels:
            row[0] = IGNORED
        if padding := length - sum(map(len, ids)):
            ids.append(torch.full((padding,), self.pad_token_id))
            labels.append(torch.full((padding,), IGNORED))
        positions = [torch.arange(len(row)) for row in ids]
        return {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "position_ids": torch.cat(positions)}


def to_dataset(
    source: Source, tokenizer: ConversationTokenizer, seed: int = 0, max_bad_rows: int = 100
) -> datasets.Dataset:
    """
    All rows of a source as a `datasets.Dataset` of `input_ids` and `labels`, tokenised once with drawn scales, in the
    libraries' cache.

    For trainers with a data pipeline of their own, such as TRL's:
    `SFTTrainer(..., args=SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, max_length=None))`.

    Args:
        source (`Source`): Pre-tokenised rows, such as `tar_hf.training.sources.open_source` gives them.
        tokenizer (`ConversationTokenizer`): Makes ids of a row.
        seed (`int`, *optional*, defaults to `0`): Of the draws.
        max_bad_rows (`int`, *optional*, defaults to `100`): See `Mixture`: another row takes a bad one's place.
    """
    columns = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels")})
    options = {"source": source, "tokenizer": tokenizer, "seed": seed, "max_bad_rows": max_bad_rows}
    return datasets.Dataset.from_generator(_examples, columns, gen_kwargs=options)


def _examples(source, tokenizer, seed, max_bad_rows):
    rows = Mixture([source], tokenizer, seed=seed, max_bad_rows=max_bad_rows, shuffle=False)
    for i in range(len(rows)):
        yield {name: ids.numpy() for name, ids in rows[i].items()}
