"""tar-mini's tokenizer: words of the world are tokens, everything else is bytes."""

from itertools import islice

from tar_hf.mini import world
from tar_hf.mini.tokenizer import make_tokenizer


def test_words_are_tokens_and_any_text_comes_back():
    tokenizer = make_tokenizer()
    for prompt, _, _ in islice(world.samples("test"), 200):
        ids = tokenizer(prompt).input_ids
        assert len(ids) <= len(prompt.replace(".", " .").replace(",", " ,").split())
        assert tokenizer.decode(ids) == prompt
    assert tokenizer.decode(tokenizer("Grüße, 世界!\n").input_ids) == "Grüße, 世界!\n"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a cat"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
