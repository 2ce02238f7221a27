"""Every common test that is not run on one of our classes although its library would run it, with the reason.

Tests that transformers itself leaves out, for want of a GPU, of another library or of the feature in question, are not
here: it gives those reasons, and the step prints them. Its `GenerationTesterMixin` is not run at all, since its source
distribution lacks the file; the step puts an empty class in its place. `tests/modeling` tests `generate`.
Of diffusers' pipeline tests we leave none out.
"""

import unittest

NO_LANGUAGE_MODEL = (
    "looks for a vision tower beside a language model; test_sdpa_can_dispatch_non_composite_models is run instead, "
    "which looks at every attention layer"
)

SKIPS = {
    "ARDeTokModelTest": {
        "test_causal_lm_loss_honors_shift_labels": (
            "labels are never shifted: the condition's last position already predicts the first of them"
        ),
        "test_generation_tester_mixin_inheritance": (
            "asks for GenerationTesterMixin, which the source distribution lacks; `generate` draws one whole image "
            "after a condition and rejects the lengths and modes that the mixin would ask for"
        ),
        "test_sdpa_can_dispatch_composite_models": NO_LANGUAGE_MODEL,
    },
    "TATokModelTest": {
        "test_model_get_set_embeddings": "the input layer is a convolution over pixels, no nn.Embedding",
        "test_retain_grad_hidden_states_attentions": "the first output is the codes, integers without a gradient",
        "test_sdpa_can_dispatch_composite_models": NO_LANGUAGE_MODEL,
    },
}


def apply_skips(test_class: type) -> type:
    """Class decorator. A name that transformers no longer has is an error, so that the list cannot go stale."""
    for name, reason in SKIPS[test_class.__name__].items():
        setattr(test_class, name, unittest.skip(reason)(getattr(test_class, name)))
    return test_class
