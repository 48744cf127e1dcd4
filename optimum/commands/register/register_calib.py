"""``optimum-cli export calib``: found by Optimum in this namespace folder.

Optimum reads this file whenever any of its commands starts, so it imports nothing heavy and never
raises: where Optimum is not as expected, it just registers nothing. The words of the command go
to ``lm-calib export`` as they were typed.
No ``__init__.py`` may ever stand beside it or above it.
"""

from __future__ import annotations

NAME = "calib"
HELP = "Prune or quantize a causal language model and write it as a Hugging Face folder (lm-calib)."


def _commands() -> list[object]:
    import argparse

    from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
    from optimum.commands.export.base import ExportCommand
    from optimum.commands.optimum_cli import OPTIMUM_CLI_ROOT_SUBCOMMANDS

    if ExportCommand not in OPTIMUM_CLI_ROOT_SUBCOMMANDS:
        return []

    class CalibExportCommand(BaseOptimumCLICommand):
        """Hand everything behind ``calib`` over to ``lm-calib export``."""

        COMMAND = CommandInfo(name=NAME, help=HELP)

        def __init__(self, subparsers, *args, **kwargs):  # type: ignore[no-untyped-def]
            try:
                if not kwargs.get("from_defaults_factory") and NAME in subparsers.choices:
                    # This file was found in two places, an installation and a source tree.
                    self.parser, self.subparsers = subparsers.choices[NAME], None
                    return
                super().__init__(subparsers, *args, **kwargs)
            except Exception:
                if kwargs.get("from_defaults_factory"):
                    raise  # the command is being run, so no other command suffers

        @staticmethod
        def parse_args(parser):  # type: ignore[no-untyped-def]
            """Make the parser take all words as they are, those of ``--help`` included."""

            def verbatim(words=None, namespace=None):  # type: ignore[no-untyped-def]
                found = argparse.Namespace() if namespace is None else namespace
                found.func = parser.get_default("func")
                found.calib_words = list(words or ())
                return found, []

            parser.parse_known_args = verbatim

        def run(self):  # type: ignore[no-untyped-def]
            """Run ``lm-calib export``, which ends the process with its own exit code."""
            import sys

            from lm_calib_plugin.cli import main

            words = ["export", *self.args.calib_words]
            sys.argv = ["lm-calib", *words]  # the command that the model card shows
            main(words)

    return [(CalibExportCommand, ExportCommand)]


try:
    REGISTER_COMMANDS = _commands()
except Exception:
    REGISTER_COMMANDS = []
