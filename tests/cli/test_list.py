"""`turbotriton list` and `-v`, as processes."""

import re

from tests.cli.process import turbotriton

import turbotriton as package
from turbotriton.contract.chat_templates import find_template


def test_prints_the_template_names_one_a_line() -> None:
    done = turbotriton("list")
    names = done.stdout.splitlines()
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(names) == 31
    assert {"llama3", "qwen", "internlm2", "codellama", "internvl-zh-hermes2"} <= set(names)
    assert all(find_template(name) for name in names)


def test_version_and_a_reader_that_leaves() -> None:
    assert turbotriton("-v").stdout == f"turbotriton {package.__version__}\n"
    assert turbotriton("--version").stdout == turbotriton("-v").stdout


def test_no_command_is_a_usage_error_that_lists_them() -> None:
    done = turbotriton()
    assert done.returncode == 2
    assert "COMMAND" in done.stderr
    listed = turbotriton("--help").stdout
    for command in ("chat", "convert", "serve", "list", "check_env", "demo"):
        assert re.search(rf"^ +{command} ", listed, re.MULTILINE), command
