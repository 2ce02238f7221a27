"""Converters from the original release's files to repositories of safetensors: one file a kind of checkpoint."""

from tar_hf.conversion.ar_detok import convert_ar_detok
from tar_hf.conversion.assign import Report
from tar_hf.conversion.checkpoint import ConversionError
from tar_hf.conversion.diffusion_detok import convert_diffusion_detok
from tar_hf.conversion.llm import convert_llm
from tar_hf.conversion.ta_tok import convert_ta_tok

__all__ = [
    "ConversionError",
    "Report",
    "convert_ar_detok",
    "convert_diffusion_detok",
    "convert_llm",
    "convert_ta_tok",
]
