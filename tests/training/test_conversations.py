"""Conversations as ids and labels, against layouts written by hand."""

import json
import pickle
import random
import re
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from tar_hf import TarPipeline, VisualVocabulary
from tar_hf.training.conversations import ConversationTokenizer, PackingCollator, PaddingCollator, to_dataset
from tar_hf.training.recipe import SourceRecipe
from tar_hf.training.rows import BadRow, Row, read_row
from tar_hf.training.sources import open_source

# Tokens of the golden tokenizer, `Ġ` a space and `Ċ` a newline. Targets stand in brackets: [[ ]] for both kinds of
# targets, [ ] for those that only the original has.
SYSTEM = "[<|im_start|>] system [Ċ] You Ġare Ġa Ġhelpful Ġassistant . [<|im_end|> Ċ]"
USER = "[<|im_start|>] user [Ċ]"
ASSISTANT = "[<|im_start|> a ssi stan t Ċ]"
END = "[<|im_end|> Ċ]"
STOP = "[[ <|im_end|> ]] [Ċ]"

EXAMPLES = {
    "image to text": (
        [("user", "<image>\nDescribe it."), ("assistant", "A cat.\nYes")],
        [[3, 511, 0]],
        f"{SYSTEM} {USER} <I3> <I511> <I0> [Ċ] Describe Ġi t . {END} {ASSISTANT} [[ A Ġc at . Ċ Y e s ]] {STOP}",
    ),
    "text to image": (
        [("user", "A cat."), ("assistant", "<image>")],
        [[3, 511, 0]],
        f"{SYSTEM} {USER} A Ġc at . {END} {ASSISTANT} [[ <im_start> <S2> <I3> <I511> <I0> <im_end> ]] {STOP}",
    ),
    "text to text": (
        [("user", "A cat?"), ("assistant", "Yes"), ("user", "A cat."), ("assistant", "A cat.")],
        [],
        f"{SYSTEM} {USER} A Ġc at ? {END} {ASSISTANT} [[ Y e s ]] {STOP} {USER} A Ġc at . {END} {ASSISTANT} "
        f"[[ A Ġc at . ]] {STOP}",
    ),
    "image to image": (
        [("user", "<image>"), ("assistant", "<image>")],
        [[1, 2], [2, 1]],
        f"{SYSTEM} {USER} <I1> <I2> {END} {ASSISTANT} [[ <im_start> <S2> <I2> <I1> <im_end> ]] {STOP}",
    ),
    "text and images to image": (
        [("user", "A cat <image>\n<image>\n."), ("assistant", "A cat.\n<image>")],
        [[1, 2], [3, 4], [5, 6]],
        f"{SYSTEM} {USER} A Ġc at Ġ <I1> <I2> [Ċ] <I3> <I4> [Ċ] . {END} {ASSISTANT} "
        f"[[ A Ġc at . Ċ <im_start> <S2> <I5> <I6> <im_end> ]] {STOP}",
    ),
    "a system turn of the row's own": (
        [("system", "Yes"), ("user", "A cat?"), ("assistant", "Yes")],
        [],
        f"[<|im_start|>] system [Ċ] Y e s {END} {USER} A Ġc at ? {END} {ASSISTANT} [[ Y e s ]] {STOP}",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(golden):
    return AutoTokenizer.from_pretrained(golden / "published" / "llm")


@pytest.fixture(scope="module")
def conversations(tokenizer):
    return ConversationTokenizer(tokenizer)


def row(turns, codes, scale=3):
    return Row(turns, codes=[{scale: torch.as_tensor(image)} for image in codes])


def read(layout):
    """A layout as its tokens, and the places of the targets that ours and the original's labels hold."""
    tokens, ours, original, depth = [], [], [], 0
    for word in layout.replace("[", " [ ").replace("]", " ] ").split():
        if word in "[]":
            depth += 1 if word == "[" else -1
        else:
            ours += [len(tokens)] if depth == 2 else []
            original += [len(tokens)] if depth else []
            tokens.append(word)
    return tokens, ours, original


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("targets", ["assistant", "original"])
def test_ids_and_labels_are_those_written_by_hand(tokenizer, name, targets):
    turns, codes, layout = EXAMPLES[name]
    tokens, ours, original = read(layout)
    example = ConversationTokenizer(tokenizer, targets=targets)(row(turns, codes), random.Random(0))
    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == tokens
    places = ours if targets == "assistant" else original
    expected = torch.full((len(tokens),), -100)
    expected[places] = example["input_ids"][places]
    assert torch.equal(example["labels"], expected)
    assert example["input_ids"].dtype == example["labels"].dtype == torch.long


def test_a_row_begins_with_what_the_pipeline_builds_and_its_targets_follow(conversations, tokenizer, tar_repo):
    pipe = TarPipeline.from_pretrained(tar_repo)
    codes = [torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9])]
    for answer, drawing in (("<image>", 3), ("\nA cat.", None)):
        turns = [("system", "You are a helpful assistant."), ("user", "<image>\nA cat?\n")]
        prompt = pipe._prompt_ids(turns, codes[:1], drawing=drawing)
        given = codes if drawing else codes[:1]
        example = conversations(row([*turns[1:], ("assistant", answer)], given), random.Random(0))
        assert example["input_ids"][: len(prompt)].tolist() == prompt
        first = len(prompt) - 2 * bool(drawing)  # the pipeline writes the tag and the scale itself
        assert (example["labels"] != -100).nonzero()[0].item() == first
    # Every turn of a conversation with a drawn image reads as it does at inference.
    turns = [("user", "A cat."), ("assistant", "<image>"), ("user", "A cat?"), ("assistant", "Yes")]
    example = conversations(row(turns, codes[:1]), random.Random(0))
    prompt = pipe._prompt_ids([("system", "You are a helpful assistant."), *turns[:3]], codes[:1], image_scale=3)
    assert example["input_ids"][: len(prompt)].tolist() == prompt


def test_the_scale_is_drawn_by_weight_among_those_of_the_row(conversations, tokenizer):
    vocabulary = conversations.vocabulary
    images = Row([("user", "<image><image>"), ("assistant", "<image>")])
    images.codes = [{scale: torch.full((scale,), scale) for scale in (1, 2, 3)}] * 3
    drawn = Counter()
    for seed in range(400):
        ids = conversations(images, random.Random(seed))["input_ids"]
        (scale,) = set(vocabulary.ids_to_codes(ids[ids >= vocabulary.first_code_id]).tolist())  # one for the row
        assert (ids >= vocabulary.first_code_id).sum() == 3 * scale
        assert (ids == vocabulary.scale_id(scale)).sum() == 1
        drawn[scale] += 1
    assert all(abs(drawn[scale] - count) < 40 for scale, count in {1: 200, 2: 100, 3: 100}.items())
    images.codes = [{scale: codes for scale, codes in image.items() if scale != 1} for image in images.codes]
    assert conversations.vocabulary.scale_id(1) not in conversations(images, random.Random(0))["input_ids"]
    only = ConversationTokenizer(tokenizer, scale_weights={2: 1})
    assert vocabulary.scale_id(2) in only(images, random.Random(0))["input_ids"]
    with pytest.raises(BadRow, match=r"codes of the scales \[2, 3\], but scale_weights names \[1\]"):
        ConversationTokenizer(tokenizer, scale_weights={1: 1})(images, random.Random(0))


def test_images_that_are_read_draw_a_scale_of_their_own(tokenizer):
    row = Row([("user", "<image>"), ("assistant", "<image>"), ("user", "<image>"), ("assistant", "<image>")])
    row.codes = [{scale: torch.full((1,), 10 * image + scale) for scale in (1, 2, 3)} for image in range(4)]
    weights = {1: 2, 2: 1, 3: 1}
    for mixed, shares in ((0.0, 0), (0.5, 0.5), (1.0, 1)):
        conversations, differ = ConversationTokenizer(tokenizer, scale_weights=weights, mixed_scales=mixed), 0
        vocabulary = conversations.vocabulary
        for seed in range(400):
            ids = conversations(row, random.Random(seed))["input_ids"]
            first, drawn, second, again = vocabulary.ids_to_codes(ids[ids >= vocabulary.first_code_id]).tolist()
            assert (first, drawn) == (second - 20, again - 20)
            assert (ids == vocabulary.scale_id(drawn - 10)).sum() == 2  # the tag says what is drawn
            differ += first != drawn - 10
        assert abs(differ - 400 * shares * (1 - (4 + 1 + 1) / 16)) <= 40 * shares
    with pytest.raises(ValueError, match=r"mixed_scales must be in 0\.\.1, got 2"):
        ConversationTokenizer(tokenizer, mixed_scales=2)


def test_requests_for_images_are_dropped_now_and_then(tokenizer):
    dropping = ConversationTokenizer(tokenizer, prompt_dropout=0.5)
    ours, _, _ = read(f"{SYSTEM} {USER} {END} {ASSISTANT} <im_start> <S2> <I2> <I1> <im_end> {STOP}")
    for turns, given in (
        ([("user", "A cat."), ("assistant", "<image>")], []),
        ([("system", "Yes"), ("user", "<image> A cat."), ("assistant", "<image>")], [[3, 4]]),
    ):
        whole = ConversationTokenizer(tokenizer)(row(turns, [*given, [2, 1]]), random.Random(0))["input_ids"].tolist()
        drawn = Counter()
        for seed in range(200):
            example = dropping(row(turns, [*given, [2, 1]]), random.Random(seed))
            ids = example["input_ids"].tolist()
            drawn[tokenizer.convert_ids_to_tokens(ids) == ours] += 1
            assert ids == whole or tokenizer.convert_ids_to_tokens(ids) == ours
            assert (example["labels"] != -100).sum() == 6  # tags, scale and codes, in either case
        assert 70 < drawn[True] < 130
    for name in ("image to text", "text to text", "text and images to image"):
        turns, codes, _ = EXAMPLES[name]  # an answer that has words
        whole = ConversationTokenizer(tokenizer)(row(turns, codes), random.Random(0))["input_ids"]
        for seed in range(20):
            assert torch.equal(dropping(row(turns, codes), random.Random(seed))["input_ids"], whole)


def test_an_empty_request_reads_as_the_pipeline_builds_it(tokenizer, tar_repo):
    pipe = TarPipeline.from_pretrained(tar_repo)
    dropping = ConversationTokenizer(tokenizer, prompt_dropout=0.99)
    ids = dropping(row([("user", "A cat."), ("assistant", "<image>")], [[2, 1]]), random.Random(0))["input_ids"]
    (prompt,) = pipe._drawing_rows([""], [[]], 3)
    assert ids[: len(prompt)].tolist() == prompt


def test_rows_that_cannot_be_used(conversations, tokenizer):
    draw = random.Random(0)
    pictures = read_row(
        {"image": b"png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}]}, draw
    )
    with pytest.raises(BadRow, match="run `tar-hf pretokenize` first"):
        conversations(pictures, draw)
    turns = [("user", "A cat."), ("assistant", "<image>")]
    with pytest.raises(BadRow, match=r"codes must be in 0..511, got 512"):
        conversations(row(turns, [[512]]), draw)
    for spelt in ("<I3>", "<im_start>", "<im_end>", "<S0>", "<|im_end|>", "<|endoftext|>"):
        for turns in ([("user", spelt), ("assistant", "a")], [("user", "a"), ("assistant", f"a {spelt}")]):
            with pytest.raises(BadRow, match=f"conversation must not spell .* such as {re.escape(spelt)}"):
                conversations(row(turns, []), draw)
    turns = [("user", "a"), ("assistant", "b")]
    length = len(conversations(row(turns, []), draw)["input_ids"])
    assert ConversationTokenizer(tokenizer, max_length=length)(row(turns, []), draw)
    with pytest.raises(BadRow, match=f"has {length} tokens, more than max_length={length - 1}"):
        ConversationTokenizer(tokenizer, max_length=length - 1)(row(turns, []), draw)


def test_settings_that_cannot_be_used(tokenizer):
    with pytest.raises(ValueError, match="targets must be one of assistant, original, got 'all'"):
        ConversationTokenizer(tokenizer, targets="all")
    with pytest.raises(ValueError, match=r"scale must be in 1..3, got 4"):
        ConversationTokenizer(tokenizer, scale_weights={4: 1})
    with pytest.raises(ValueError, match="scale_weights must name at least one scale"):
        ConversationTokenizer(tokenizer, scale_weights={})
    with pytest.raises(ValueError, match="scale 2 needs a weight above 0"):
        ConversationTokenizer(tokenizer, scale_weights={1: 1, 2: 0})
    with pytest.raises(ValueError, match="prompt_dropout must be at least 0 and below 1, got 1"):
        ConversationTokenizer(tokenizer, prompt_dropout=1)
    changed = pickle.loads(pickle.dumps(tokenizer))
    changed.chat_template = changed.chat_template.replace("message['content'] +", "message['content'] | upper +")
    with pytest.raises(ValueError, match="write answers as they are"):
        ConversationTokenizer(changed)(row([("user", "a"), ("assistant", "b")], []), random.Random(0))


def test_workers_get_a_copy(conversations):
    example = row(*EXAMPLES["text to image"][:2])
    copy = pickle.loads(pickle.dumps(conversations))
    for name, ids in conversations(example, random.Random(0)).items():
        assert torch.equal(copy(example, random.Random(0))[name], ids)


@pytest.fixture(scope="module")
def rows(conversations):
    """Rows of every kind, of different lengths."""
    draw = random.Random(0)
    return [conversations(row(turns, codes), draw) for turns, codes, _ in EXAMPLES.values()]


def test_padding(rows):
    batch = PaddingCollator(396)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    assert {name: tuple(values.shape) for name, values in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (len(rows), longest)
    )
    for i, expected in enumerate(rows):
        length = len(expected["input_ids"])
        assert torch.equal(batch["input_ids"][i, :length], expected["input_ids"])
        assert torch.equal(batch["labels"][i, :length], expected["labels"])
        assert (batch["input_ids"][i, length:] == 396).all() and (batch["labels"][i, length:] == -100).all()
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (longest - length)


def numbered(*lengths):
    return [{"input_ids": torch.full((n,), i), "labels": torch.full((n,), i)} for i, n in enumerate(lengths)]


def test_packing_places_the_longest_first():
    batch = PackingCollator(pad_token_id=9, max_length=8)(numbered(3, 5, 2, 4))
    assert batch["input_ids"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [3, 3, 3, 3, 2, 2, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 1]]
    i = -100
    assert batch["labels"].tolist() == [[i, 1, 1, 1, 1, i, 0, 0], [i, 3, 3, 3, i, 2, i, i]]
    # No wider than what was packed, and without a limit one sequence in the order of the rows.
    assert PackingCollator(9, 8)(numbered(3, 2))["input_ids"].tolist() == [[0, 0, 0, 1, 1]]
    batch = PackingCollator(9, None)(numbered(3, 5, 2))
    assert batch["input_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]
    with pytest.raises(ValueError, match="a row has 9 tokens, more than max_length=8"):
        PackingCollator(9, 8)(numbered(9))


def items(batch):
    return batch["labels"][:, 1:].ne(-100).sum()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_have_the_loss_of_padded_ones_and_do_not_see_each_other(tar_repo, tokenizer, rows, attention):
    model = Qwen2ForCausalLM.from_pretrained(tar_repo, attn_implementation=attention, use_cache=False)
    original = ConversationTokenizer(tokenizer, targets="original")
    draw = random.Random(0)
    for made in (rows, [original(row(turns, codes), draw) for turns, codes, _ in EXAMPLES.values()]):
        padded = PaddingCollator(396)(made)
        for max_length in (160, None):
            packed = PackingCollator(396, max_length)(made)
            assert len(packed["input_ids"]) == (2 if max_length else 1)
            assert items(packed) == items(padded)
            losses = [model(**batch, num_items_in_batch=items(batch)).loss for batch in (padded, packed)]
            assert torch.allclose(*losses, atol=1e-5, rtol=0)

    packed = PackingCollator(396, 160)(rows)
    before = model(**packed).logits
    start = (packed["position_ids"][0] == 0).nonzero()[1].item()
    changed = {**packed, "input_ids": packed["input_ids"].clone()}
    changed["input_ids"][0, :start] = 7
    after = model(**changed).logits
    assert not torch.allclose(before[0, :start], after[0, :start])
    assert torch.equal(before[0, start:], after[0, start:]) and torch.equal(before[1], after[1])


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "rows.jsonl"
    turns = [{"from": "human", "value": "A cat."}, {"from": "gpt", "value": "<image>"}]
    draw = random.Random(0)
    content = [
        {"conversations": turns, "codes_scale2": [[i] * 4], "codes_scale3": [[draw.randrange(512), i]]}
        for i in range(20)
    ]
    content[3]["codes_scale2"] = content[3]["codes_scale3"] = [[512]]  # of another TA-Tok
    file.write_text("\n".join(map(json.dumps, content)))
    return open_source(SourceRecipe(str(file)))


def test_a_source_as_a_dataset(source, conversations, caplog):
    made = to_dataset(source, conversations, seed=1)
    assert made.column_names == ["input_ids", "labels"] and len(made) == 20
    assert "skipped row 3" in caplog.text
    lengths = {len(row["input_ids"]) for row in made}
    assert len(lengths) == 2  # of both scales
    vocabulary = VisualVocabulary.from_tokenizer(conversations.tokenizer)
    for i, example in enumerate(made):
        assert (vocabulary.first_code_id + (i if i != 3 else 512) in example["labels"]) == (i != 3)
    again = to_dataset(source, conversations, seed=2)
    assert [len(row["input_ids"]) for row in again] != [len(row["input_ids"]) for row in made]
