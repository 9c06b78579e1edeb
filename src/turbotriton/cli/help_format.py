"""How `--help` looks: an option's type in place of its name again, and its default where it has one."""

import argparse
from pathlib import Path
from typing import Any

__all__ = ["CommandParser"]

_TYPES: dict[object, str] = {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT", None: "TEXT"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_flag = action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction)
        if is_flag or action.default in (None, []) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _TYPES.get(action.type) or super()._get_default_metavar_for_optional(action)


class CommandParser(argparse.ArgumentParser):
    """Its sub-commands are of this class too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **options})
