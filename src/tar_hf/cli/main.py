"""The `tar-hf` command: thin commands over library calls. Heavy imports wait until a command runs."""

import argparse
import logging
import os
import signal
import sys

from tar_hf._version import __version__
from tar_hf.cli import assemble, codes, convert, describe, evaluate, generate, merge, pretokenize, push, train

# Where torchao is installed, importing diffusers makes these warn of parts of it that nothing here uses.
CHATTY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


class CommandParser(argparse.ArgumentParser):
    """A command's parser: positional arguments may stand behind options too, and errors show the command's usage."""

    _reading = False

    def parse_known_args(self, args, namespace=None):
        # argparse cannot do so where a positional is a command, and calls this method where it can.
        if self._subparsers is not None or self._reading:
            return super().parse_known_args(args, namespace)
        plain = "--" in args  # which intermixing may lose
        read = super().parse_known_args if plain else self.parse_known_intermixed_args
        self._reading = True
        try:
            namespace, unknown = read(args, namespace)
        finally:
            self._reading = False
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tar-hf", description="Tar: images as a dialect of language, on Hugging Face."
    )
    parser.add_argument("--version", action="version", version=f"tar-hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    generate.add_parser(commands)
    describe.add_parser(commands)
    codes.add_parsers(commands)
    evaluate.add_parser(commands)
    convert.add_parser(commands)
    assemble.add_parser(commands)
    push.add_parser(commands)
    pretokenize.add_parser(commands)
    train.add_parser(commands)
    merge.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Exit status: 0, 1 for a check that failed, 2 for wrong input (one line on stderr), 130 after
    an interrupt."""
    arguments = build_parser().parse_args(argv)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written folders are removed then too
    try:
        status = arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("TAR_HF_DEBUG"):
            raise
        print(f"tar-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
