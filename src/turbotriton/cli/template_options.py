"""Options that choose or change a chat template, with LMDeploy's names."""

import argparse
import dataclasses

from turbotriton.contract.chat_templates import CAPABILITIES, ChatTemplateConfig, read_template_config

__all__ = ["add_template_options", "template_config"]


def add_template_options(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    group = parser.add_argument_group("chat template", "default: the checkpoint's own, else by the model's name or path")
    group.add_argument("--chat-template", help="a template as JSON: a file or the text itself")
    group.add_argument("--meta-instruction", help="system prompt of conversations that bring none")
    group.add_argument("--cap", choices=CAPABILITIES, help="what becomes of a question (default: the template's, chat)")
    return group


def template_config(args: argparse.Namespace) -> ChatTemplateConfig | None:
    """None where no option was given. Raises ConfigError."""
    given = {"meta_instruction": args.meta_instruction, "capability": args.cap}
    if args.chat_template is None and not any(value is not None for value in given.values()):
        return None
    config = ChatTemplateConfig() if args.chat_template is None else read_template_config(args.chat_template)
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
