"""The models, the image processor and the visual vocabulary. Importing them registers transformers' Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM
from transformers.models.auto import image_processing_auto

from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
from tar_hf.modeling.modeling_ar_detok import ARDeTokConfig, ARDeTokForCausalLM
from tar_hf.modeling.modeling_ta_tok import TATokConfig, TATokModel

AutoConfig.register(TATokConfig.model_type, TATokConfig)
AutoConfig.register(ARDeTokConfig.model_type, ARDeTokConfig)
AutoModel.register(TATokConfig, TATokModel)
AutoModelForCausalLM.register(ARDeTokConfig, ARDeTokForCausalLM)
AutoImageProcessor.register(TATokConfig, image_processor_classes={"pil": TATokImageProcessor}, exist_ok=True)
# PIL is this processor's choice, not a fallback: without this the library warns wherever torchvision is installed.
getattr(image_processing_auto, "DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS", []).append(TATokImageProcessor.__name__)
