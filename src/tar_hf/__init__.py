"""Tar (paper 2506.18898), native to Hugging Face: see the README for what each name is.

The names below load on first use, so that importing the package costs no torch. Importing it is also what makes
transformers' Auto classes know TA-Tok and AR-DTok, and diffusers the diffusion de-tokenizer.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from tar_hf import _registration
from tar_hf._version import __version__

if TYPE_CHECKING:
    from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
    from tar_hf.modeling.modeling_ar_detok import ARDeTokConfig, ARDeTokForCausalLM
    from tar_hf.modeling.modeling_ta_tok import TATokConfig, TATokModel, TATokOutput
    from tar_hf.modeling.packed_linear import pack_linears
    from tar_hf.modeling.visual_vocabulary import VisualVocabulary
    from tar_hf.pipelines.pipeline_tar import TarPipeline
    from tar_hf.pipelines.pipeline_tar_diffusion_detok import TarDiffusionDeTokPipeline

_MODULES = {
    "ARDeTokConfig": "tar_hf.modeling.modeling_ar_detok",
    "ARDeTokForCausalLM": "tar_hf.modeling.modeling_ar_detok",
    "TATokConfig": "tar_hf.modeling.modeling_ta_tok",
    "TATokImageProcessor": "tar_hf.modeling.image_processing_ta_tok",
    "TATokModel": "tar_hf.modeling.modeling_ta_tok",
    "TATokOutput": "tar_hf.modeling.modeling_ta_tok",
    "TarDiffusionDeTokPipeline": "tar_hf.pipelines.pipeline_tar_diffusion_detok",
    "TarPipeline": "tar_hf.pipelines.pipeline_tar",
    "VisualVocabulary": "tar_hf.modeling.visual_vocabulary",
    "pack_linears": "tar_hf.modeling.packed_linear",
}

__all__ = [
    "ARDeTokConfig",
    "ARDeTokForCausalLM",
    "TATokConfig",
    "TATokImageProcessor",
    "TATokModel",
    "TATokOutput",
    "TarDiffusionDeTokPipeline",
    "TarPipeline",
    "VisualVocabulary",
    "__version__",
    "pack_linears",
]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__():
    return sorted([*globals(), *_MODULES])


_registration.install()
