"""Lets diffusers load our pipeline from its `model_index.json` without `trust_remote_code`, once `tar_hf` is imported.

A portable `model_index.json` names files that travel with the repository, and diffusers, which has no registry for
pipelines of other packages, runs these files only when it is told to trust them. The code in the package is trusted
already, so importing this module makes diffusers read such an index as one of the package. Only an index of our own
pipeline is read differently, and nothing in a repository is run then.
"""

import importlib

import diffusers
from diffusers import ConfigMixin, DiffusionPipeline

PIPELINE = ["pipeline_tar_diffusion_detok", "TarDiffusionDeTokPipeline"]
# Files that an index of ours may name -> the modules of the package that they are copies of.
MODULES = {
    "modeling_negative_condition": "tar_hf.modeling.modeling_negative_condition",
    "modeling_ta_tok": "tar_hf.modeling.modeling_ta_tok",
}


@classmethod
def _dict_from_json_file(cls, json_file):
    """Reading the file is where all ways to a pipeline's class begin, `from_pretrained` and `download` alike."""
    index = ConfigMixin._dict_from_json_file.__func__(cls, json_file)
    if index.get("_class_name") == PIPELINE:
        module, name = PIPELINE
        # A plain class name is looked up among diffusers' own.
        setattr(diffusers, name, getattr(importlib.import_module(f"tar_hf.pipelines.{module}"), name))
        index["_class_name"] = name
    return index


@classmethod
def load_config(cls, *args, **kwargs):
    """The components only here: `download` still needs the names of the files."""
    result = ConfigMixin.load_config.__func__(cls, *args, **kwargs)
    index = result[0] if isinstance(result, tuple) else result
    if index.get("_class_name") == PIPELINE[1]:
        for name, entry in index.items():
            if isinstance(entry, list) and entry[0] in MODULES:
                importlib.import_module(MODULES[entry[0]])
                index[name] = [MODULES[entry[0]], entry[1]]
    return result


DiffusionPipeline._dict_from_json_file = _dict_from_json_file
DiffusionPipeline.load_config = load_config
