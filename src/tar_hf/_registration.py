"""Makes transformers and diffusers know our classes once `tar_hf` is imported, without importing torch at that moment.

Registering needs the classes, and those need torch and half of transformers: seconds. So `import tar_hf` only arranges
that the first use of an Auto class imports `tar_hf.modeling`, and the first of diffusers' `DiffusionPipeline` imports
`tar_hf.pipelines.diffusers_index`, which register everything. Whichever of the packages is imported first, the entry
points below are wrapped as soon as they exist, and unwrapped at their first call.
"""

import functools
import importlib
import sys
from importlib.abc import MetaPathFinder

# Module: class, its methods, and the module of ours that registers. AutoModel and its kind read the configuration
# through AutoConfig first.
ENTRY_POINTS = {
    "transformers.models.auto.configuration_auto": ("AutoConfig", ("from_pretrained", "for_model"), "tar_hf.modeling"),
    "transformers.models.auto.image_processing_auto": ("AutoImageProcessor", ("from_pretrained",), "tar_hf.modeling"),
    "transformers.pipelines.base": (
        "PipelineRegistry",
        ("check_task", "get_supported_tasks"),
        "tar_hf.pipelines.pipeline_text_to_image",
    ),
    "diffusers.pipelines.pipeline_utils": (
        "DiffusionPipeline",
        ("from_pretrained", "download"),
        "tar_hf.pipelines.diffusers_index",
    ),
}
HUB_OPTIONS = ("revision", "token", "local_files_only")
FETCHED_WITH: dict[str, dict] = {}  # by model: the options with which `pipeline` fetches it


def install():
    for module_name in ENTRY_POINTS:
        if module_name in sys.modules:
            _wrap_entry_points(sys.modules[module_name])
    if any(module_name not in sys.modules for module_name in ENTRY_POINTS):
        sys.meta_path.insert(0, _AutoModuleFinder())


def _wrap_entry_points(module):
    class_name, methods, registering = ENTRY_POINTS[module.__name__]
    if class_name == "AutoConfig":
        _serve_task(module.AutoConfig)
    for method in methods:
        _register_before(getattr(module, class_name), method, registering)


def _register_before(auto_class, method, registering):
    original = auto_class.__dict__[method]
    of_class = isinstance(original, classmethod)

    @functools.wraps(original.__func__ if of_class else original)
    def register_and_call(owner, *args, **kwargs):
        setattr(auto_class, method, original)
        importlib.import_module(registering)
        return getattr(owner, method)(*args, **kwargs)

    setattr(auto_class, method, classmethod(register_and_call) if of_class else register_and_call)


def _serve_task(auto_config):
    """Lets `pipeline("text-to-image", model=...)` use the installed class: a repository that also carries the code for
    those without the package would make the library insist on running that. And notes for that class what the parts are
    to be fetched with, which the library keeps to itself."""
    original = auto_config.__dict__["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls, *args, **kwargs):
        task = kwargs.get("_from_pipeline")  # what `pipeline` calls it with
        config = original(cls, *args, **kwargs)
        tasks = getattr(config, "custom_pipelines", None) or {}
        if tasks.get(task, {}).get("impl") == "pipeline_text_to_image.TextToImagePipeline":
            config.custom_pipelines = {name: entry for name, entry in tasks.items() if name != task}
            FETCHED_WITH[str(args[0])] = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        return config

    auto_config.from_pretrained = classmethod(from_pretrained)


class _AutoModuleFinder(MetaPathFinder):
    """Lets the ordinary finders load the modules of `ENTRY_POINTS` and wraps their entry points right after."""

    def find_spec(self, fullname, path, target=None):
        if fullname not in ENTRY_POINTS:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                _wrap_entry_points(module)

            spec.loader.exec_module = exec_module
        return spec
