"""The command `turbotriton`.

Each sub-command is one module with `add_parser(subparsers)`; nothing heavy is imported before it is needed.
"""
