"""`tar-hf merge`: a trained adapter and its base to one repository."""

from pathlib import Path


def add_parser(commands):
    parser = commands.add_parser(
        "merge",
        help="put a LoRA adapter and its base together as one repository",
        description="Writes the model that an adapter and its base make together: a language model, or a whole Tar "
        "repository where the base is one.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder that `train llm` wrote, or a Hub id")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make; it must not exist")
    parser.add_argument("--base", metavar="REPO", help="folder or Hub id of the base, if it has moved since")
    parser.set_defaults(run=_merge)


def _merge(arguments):
    try:
        from tar_hf.training.lora import merge_adapter
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] == "tar_hf":
            raise
        raise ValueError(f"merging needs {error.name}: pip install 'tar-hf[train]'") from error

    merge_adapter(arguments.adapter, arguments.output, arguments.base)
    print(f"{arguments.adapter} -> {arguments.output}")
