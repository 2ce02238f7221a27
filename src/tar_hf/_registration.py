"""Makes transformers' Auto classes know ours once `tar_hf` is imported, without importing torch at that moment.

Registering needs the classes, and those need torch and half of transformers: seconds. So `import tar_hf` only arranges
that the first use of an Auto class imports `tar_hf.modeling`, which registers everything. Whichever of the two packages
is imported first, the entry points below are wrapped as soon as they exist, and unwrapped at their first call.
"""

import functools
import importlib
import sys
from importlib.abc import MetaPathFinder

# AutoModel and its kind read the configuration through AutoConfig first.
ENTRY_POINTS = {
    "transformers.models.auto.configuration_auto": ("AutoConfig", ("from_pretrained", "for_model")),
    "transformers.models.auto.image_processing_auto": ("AutoImageProcessor", ("from_pretrained",)),
}


def install():
    for module_name in ENTRY_POINTS:
        if module_name in sys.modules:
            _wrap_entry_points(sys.modules[module_name])
    if any(module_name not in sys.modules for module_name in ENTRY_POINTS):
        sys.meta_path.insert(0, _AutoModuleFinder())


def _wrap_entry_points(module):
    class_name, methods = ENTRY_POINTS[module.__name__]
    for method in methods:
        _register_before(getattr(module, class_name), method)


def _register_before(auto_class, method):
    original = auto_class.__dict__[method]

    @functools.wraps(original.__func__)
    def register_and_call(cls, *args, **kwargs):
        setattr(auto_class, method, original)
        importlib.import_module("tar_hf.modeling")
        return getattr(cls, method)(*args, **kwargs)

    setattr(auto_class, method, classmethod(register_and_call))


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
