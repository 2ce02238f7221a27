"""The parts of a Tar system, each loaded when it is first needed: language model, TA-Tok's halves, de-tokenizer.

Describing an image loads no de-tokenizer, and drawing one no vision encoder. Parts are saved and published together.

This file travels with `pipeline_tar.py` into repositories, so it imports nothing of the package.
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .tar_repository import PARTS, PARTS_FILE, RepoFolder, local_folder, named_model, read_parts, write_pipeline_code
from .tar_sampling import unknown_options, watch_pixels

try:
    from tar_hf.modeling.packed_linear import pack_linears
    from tar_hf.modeling.reserved_cache import KEPT_CACHES
    from tar_hf.modeling.visual_vocabulary import VisualVocabulary
except ImportError:  # in a Hub repository, where the files stand side by side
    from .packed_linear import pack_linears
    from .reserved_cache import KEPT_CACHES
    from .visual_vocabulary import VisualVocabulary


class TarParts:
    """
    Where the parts of a system are, and those that have been loaded.

    Args:
        model (`PreTrainedModel` or a function): A causal language model with visual tokens, or what loads it.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        ta_tok (`TATokModel`, `str` or `Path`, *optional*): The image tokenizer, or where it is.
        image_processor (`TATokImageProcessor`, *optional*): By default the one that stands with `ta_tok`.
        detokenizer (*optional*): Anything with `detokenize(features, generator=..., guidance_scale=..., **options)`, or
            where it is.
        load_options (`dict`, *optional*): What `from_pretrained` of the parts gets.
        pack (`bool`, *optional*, defaults to `False`): See `from_pretrained`. A model that is passed in stays as it is.
    """

    def __init__(
        self, model, tokenizer, ta_tok=None, image_processor=None, detokenizer=None, load_options=None, pack=False
    ):
        self.tokenizer = tokenizer
        self.vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
        self._sources = {"model": model, "ta_tok": ta_tok, "detokenizer": detokenizer}
        self._loaded = {"image_processor": image_processor} if image_processor is not None else {}
        self._load_options = load_options or {}
        self._pack = pack
        self._device = torch.device("cpu")
        if isinstance(model, nn.Module):
            self._loaded["model"] = self._check_rows(model)

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        ta_tok=None,
        detokenizer=None,
        image_processor=None,
        dtype=None,
        device_map=None,
        quantization_config=None,
        attn_implementation: str | None = None,
        pack: bool = False,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool | None = None,
    ) -> "TarParts":
        """
        Loads the tokenizer and notes where the parts are.

        Args:
            path (`str` or `Path`): Folder or Hub id. Its root is the language model. "tar-mini" is the small model in
                the package, unless there is a folder of that name.
            ta_tok, detokenizer (*optional*): Replace the repo's own: paths, Hub ids or objects. As the de-tokenizer
                "tar-mini-diffusion" is the diffusion one of the small model, in the package too.
            image_processor (`TATokImageProcessor`, *optional*): For a `ta_tok` that is a model. By default the one that
                stands with its files.
            dtype, device_map (*optional*): For every part. A diffusion de-tokenizer goes where TA-Tok's decoder is.
            attn_implementation (*optional*): For every part that is a model of transformers.
            quantization_config (*optional*): For the language model.
            pack (`bool`, *optional*, defaults to `False`): Pack the weights of the language model and of AR-DTok for
                drawing on a CPU, see `pack_linears`. Parts that are passed in as objects stay as they are.
            revision, token, local_files_only, trust_remote_code (*optional*): For every download from `path`.
        """
        path, detokenizer = named_model(path), named_model(detokenizer)
        hub = {"revision": revision, "token": token, "local_files_only": local_files_only}
        options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        options = {name: value for name, value in options.items() if value is not None}
        root = local_folder(path, ["*.json", "*.txt", "*.jinja", "*.py"], ["ta_tok/*", "detokenizer/*"], **hub)
        tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=trust_remote_code)
        quantization = {} if quantization_config is None else {"quantization_config": quantization_config}

        def load():
            root = local_folder(path, ["*"], ["ta_tok/*", "detokenizer/*"], **hub)
            return AutoModelForCausalLM.from_pretrained(
                root, trust_remote_code=trust_remote_code, **options, **quantization
            )

        part_options = {**options, "trust_remote_code": trust_remote_code, "hub": hub}
        return cls.around(load, tokenizer, path, ta_tok, detokenizer, part_options, image_processor, pack)

    @classmethod
    def around(
        cls, model, tokenizer, path, ta_tok=None, detokenizer=None, load_options=None, image_processor=None, pack=False
    ) -> "TarParts":
        """A system of a language model, or what loads it, with the parts that its repository `path` names."""
        hub = (load_options or {}).get("hub", {})
        parts, sources = read_parts(path, **hub), {}
        for name, given in zip(PARTS, (ta_tok, detokenizer), strict=True):
            noted = parts.get(name, name)
            if given is None and noted == name:  # a folder of this repository, fetched when it is needed
                inside = RepoFolder(path, name, hub)
                sources[name] = inside if inside.exists() else None
            else:
                sources[name] = noted if given is None else given
        return cls(model, tokenizer, **sources, image_processor=image_processor, load_options=load_options, pack=pack)

    def save_pretrained(self, folder: str | Path):
        """Writes the language model at the root, and the parts that were given as objects or local folders below it."""
        folder = Path(folder)
        if isinstance(self._sources["ta_tok"], nn.Module):
            _ = self.image_processor  # raises where there is none, before anything is written
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        parts = {}
        for name, source in self._sources.items():
            if source is None or name == "model":
                continue
            if isinstance(source, str) and not Path(source).is_dir():
                parts[name] = source  # a Hub id stays a reference
                continue
            parts[name] = name
            if name == "ta_tok":
                model = source if isinstance(source, nn.Module) else self._load_ta_tok()
                model.save_pretrained(folder / name)
                self.image_processor.save_pretrained(folder / name)
            else:
                self.detokenizer.save_pretrained(folder / name)
        (folder / PARTS_FILE).write_text(json.dumps(parts, indent=2) + "\n")
        write_pipeline_code(folder)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Saves, checks that the folder loads without this package, uploads. `kwargs` are those of `push_folder`."""
        try:  # what is imported outside of a `try` must be there for the repository's code to load
            from tar_hf.conversion.assemble import write_tar_card
            from tar_hf.conversion.publish import push_folder
        except ImportError as error:
            raise ImportError("pushing needs the package: pip install tar-hf") from error

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder)
            write_tar_card(folder, repo_id)
            return push_folder(folder, repo_id, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where the language model is, or, before it is loaded, another part, or where they will be."""
        loaded = [self._loaded[name] for name in ("model", "decoder", "encoder") if name in self._loaded]
        return loaded[0].device if loaded else self._device

    def to(self, device: str | torch.device) -> "TarParts":
        """Moves the parts that are loaded or were passed in; the others will load there."""
        self._device = torch.device(device)
        for part in (*self._loaded.values(), *self._sources.values()):
            if hasattr(part, "to"):
                part.to(device)
                KEPT_CACHES.pop(part, None)  # which lie where it was
        return self

    @property
    def model(self):
        """The language model."""
        if "model" not in self._loaded:
            model = self._check_rows(self._sources["model"]().eval())
            placed = "device_map" in self._load_options or getattr(model, "is_quantized", False)
            self._loaded["model"] = self._packed(model if placed else model.to(self._device))
        return self._loaded["model"]

    def _packed(self, model):
        return pack_linears(model) if self._pack else model

    def _check_rows(self, model):
        rows = model.get_input_embeddings().weight.shape[0]
        if rows < self.vocabulary.vocab_size:
            raise ValueError(
                f"the tokenizer's codes end at id {self.vocabulary.vocab_size - 1}, but the model has {rows} rows"
            )
        return model

    def free(self, *names: str):
        """Forgets loaded parts, all or those named: "model", "encoder", "decoder", "detokenizer". They load again on
        demand; a part that was passed in as an object stays the caller's, without the cache of its compiled steps."""
        known = ("model", "encoder", "decoder", "detokenizer")
        for name in names or known:
            if name not in known:
                raise ValueError(f"parts are {', '.join(known)}, got {name!r}")
            source = self._sources["ta_tok" if name in ("encoder", "decoder") else name]
            if isinstance(part := self._loaded.get(name, source), nn.Module):
                KEPT_CACHES.pop(part, None)
            if isinstance(source, str | Path | RepoFolder) or (name == "model" and not isinstance(source, nn.Module)):
                self._loaded.pop(name, None)

    @property
    def encoder(self):
        """The half of TA-Tok that makes codes from pixels."""
        return self._ta_tok_half("encoder", "decoder")

    @property
    def decoder(self):
        """The half of TA-Tok that makes features from codes."""
        return self._ta_tok_half("decoder", "encoder")

    @property
    def image_processor(self):
        if "image_processor" not in self._loaded:
            source = self._source("ta_tok", "reading images")
            if isinstance(source, nn.Module):
                raise ValueError("ta_tok was passed as a model: pass image_processor= too")
            options = {"trust_remote_code": self._load_options.get("trust_remote_code")}
            self._loaded["image_processor"] = AutoImageProcessor.from_pretrained(self._fetch(source), **options)
        return self._loaded["image_processor"]

    @property
    def detokenizer(self):
        """What draws pixels from features."""
        if "detokenizer" not in self._loaded:
            source = self._source("detokenizer", "drawing images")
            if isinstance(source, str | Path | RepoFolder):
                self._loaded["detokenizer"] = self._load_detokenizer(self._fetch(source))
            elif hasattr(source, "detokenize"):
                self._loaded["detokenizer"] = source
            else:
                raise TypeError(f"a de-tokenizer needs a method detokenize(features), got {type(source).__name__}")
        return self._loaded["detokenizer"]

    def _source(self, name, purpose):
        source = self._sources[name]
        if source is None:
            raise ValueError(f"{purpose} needs {name}, which this repository has not: pass {name}= a folder or a model")
        return source

    def _fetch(self, source) -> Path:
        if isinstance(source, RepoFolder):
            return source.fetch()
        # Another repository: the revision is one of this.
        return local_folder(source, ["*"], [], **{**self._load_options.get("hub", {}), "revision": None})

    def _ta_tok_half(self, half, other):
        if half not in self._loaded:
            source = self._source("ta_tok", {"encoder": "reading images", "decoder": "drawing images"}[half])
            if isinstance(source, nn.Module):
                self._loaded[half] = source
            else:
                self._loaded[half] = self._load_ta_tok(**{f"has_{other}": False})
                if other in self._loaded:  # the codebook is the largest part of either half
                    self._loaded[half].quantizer = self._loaded[other].quantizer
        return self._loaded[half]

    def _load_ta_tok(self, **kwargs):
        options = self._part_options()
        model = AutoModel.from_pretrained(self._fetch(self._sources["ta_tok"]), **options, **kwargs).eval()
        return model if "device_map" in options else model.to(self.device)

    def _load_detokenizer(self, folder):
        options = self._part_options()
        if (folder / "model_index.json").is_file():
            from diffusers import DiffusionPipeline

            dtype = options.get("dtype")
            if isinstance(dtype, str):  # which the models of transformers take
                dtype = self.decoder.dtype if dtype == "auto" else getattr(torch, dtype)
            trust = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
            device = self.decoder.device if "device_map" in options else self.device
            return DiffusionPipeline.from_pretrained(folder, ta_tok=None, dtype=dtype, **trust).to(device)
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        if not hasattr(model, "detokenize"):
            raise ValueError(f"{folder} holds no de-tokenizer but a {type(model).__name__}")
        return self._packed(model if "device_map" in options else model.to(self.device))

    def _part_options(self):
        """What `from_pretrained` of a part gets: all but where the files come from."""
        return {name: value for name, value in self._load_options.items() if name != "hub"}

    def _check_detokenizer(self, guidance_scale, callback, options):
        """Refuses a de-tokenizer of another width, and options that it does not take, before anything is drawn."""
        detokenizer = self.detokenizer
        if guidance_scale is not None and not guidance_scale >= 1:
            raise ValueError(f"guidance_scale must be at least 1, which turns guidance off, got {guidance_scale}")
        if twice := options.keys() & watch_pixels(detokenizer, callback).keys():
            raise TypeError(f"callback uses {min(twice)} of the de-tokenizer: pass one of the two")
        width = getattr(detokenizer, "condition_size", None) or getattr(
            getattr(detokenizer, "config", None), "condition_size", None
        )
        if width not in (None, self.decoder.config.hidden_size):
            raise ValueError(
                f"the de-tokenizer draws from features of width {width}, but this TA-Tok makes "
                f"{self.decoder.config.hidden_size}"
            )
        if unknown := unknown_options(detokenizer, options):
            raise TypeError(f"{type(detokenizer).__name__} has no option {min(unknown)}")
