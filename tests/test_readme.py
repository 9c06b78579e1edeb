"""README, README.zh and docs against the code: commands, options, inputs, metrics, links. Tables are complete both ways."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.pages import ROOT, leaf_commands, parser_of

from turbotriton.cli.tritonserver import ENGINE_FLAGS

READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = [" ".join(words) for words in leaf_commands()]
#: Page -> the command whose options its table lists, all of them.
OPTION_TABLES = {
    "bench.md": "bench",
    "plan.md": "plan",
    "gradio.md": "serve gradio",
    "openai.md": "serve api_server",
    "triton_client.md": "serve triton_client",
}
TRITONSERVER_FLAGS = {"--log-verbose", "--model-repository", "--load-model", "--disable-auto-complete-config"}  # passed through


def tables(text: str) -> Iterator[tuple[str, list[str]]]:
    """Of each table: its heading row, and the first column below it."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        heading, _, *rows = block.splitlines()
        yield heading, [row.split("|")[1].strip() for row in rows]


def column(text: str, entry: str) -> set[str]:
    """The names in backticks of the first column of the table that has `entry` there."""
    (found,) = [rows for _, rows in tables(text) if any(f"`{entry}`" in row for row in rows)]
    return {name for row in found for name in re.findall(r"`([^`]+)`", row)}


@pytest.fixture(params=READMES, ids=lambda path: path.name)
def readme(request: pytest.FixtureRequest) -> str:
    path: Path = request.param
    return path.read_text(encoding="utf-8")


def test_the_commands_table_has_every_command_and_no_other(readme: str) -> None:
    listed = column(readme, "turbotriton list")
    words = {re.sub(r"( [A-Z_:]+)+$", "", entry.removeprefix("turbotriton ")) for entry in listed}
    assert words == set(COMMANDS)


def test_no_table_names_anything_twice(readme: str) -> None:
    for heading, rows in tables(readme):
        named = [name for row in rows for name in re.findall(r"`[^`]+`|\]\([^)]+\)", row)] or rows
        assert len(set(named)) == len(named), f"{heading}: {sorted({name for name in named if named.count(name) > 1})}"


def test_the_documentation_table_has_every_page(readme: str) -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    (rows,) = [rows for _, rows in tables(readme) if any("(docs/tutorial.md)" in row for row in rows)]
    assert pages == {name for row in rows for name in re.findall(r"\(docs/([\w-]+\.md)\)", row)}


def test_the_engine_options_are_those_of_serve_tritonserver(readme: str) -> None:
    assert column(readme, "session_len") == set(ENGINE_FLAGS)


def test_the_text_doors_inputs_are_those_of_its_config(readme: str) -> None:
    config = (ROOT / "model_repository/text/config.pbtxt").read_text(encoding="utf-8")
    inputs = config[config.index("input [") : config.index("output [")]
    assert column(readme, "text_input") == set(re.findall(r'name: "([^"]+)"', inputs))


def test_the_metrics_named_exist(readme: str) -> None:
    source = (ROOT / "backend/tritonserver/metrics.py").read_text(encoding="utf-8")
    section = next(part for part in readme.split("\n## ") if "`turbotriton_*`" in part)
    named = set(re.findall(r"`([a-z0-9_]+)`", section))
    assert named
    assert not {name for name in named if name not in source}


def test_both_readmes_have_the_same_code_and_the_same_links() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in READMES)
    assert _blocks(english) == _blocks(chinese)
    named = [[sorted(re.findall(r"`([^`]+)`", row)) for row in rows] for _, rows in tables(english)]
    assert named == [[sorted(re.findall(r"`([^`]+)`", row)) for row in rows] for _, rows in tables(chinese)]
    links = [re.findall(r"\]\(([^)]+)\)", text) for text in (english, chinese)]
    assert links[0][1:] == links[1][1:]  # the first is to the other language
    assert english.count("\n## ") == chinese.count("\n## ")


def _blocks(text: str) -> list[str]:
    """Without comments, which are in the reader's language."""
    return [re.sub(r"\s+# .*", "", block) for block in re.findall(r"^```\w*\n.*?^```", text, re.MULTILINE | re.DOTALL)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    options = {command: set(parser_of(command)._option_string_actions) for command in COMMANDS}
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = "|".join(sorted((re.escape(command) for command in COMMANDS), key=len, reverse=True))
    for match in re.finditer(rf"turbotriton ({commands})\b([^`\n]*)", text):
        line = re.split(r"\s#|\s\|\s", match[2])[0]
        for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", re.sub(r"'[^']*'|\"[^\"]*\"", "", line)):
            assert option in options[match[1]] | TRITONSERVER_FLAGS, f"{page.name}: turbotriton {match[1]} has no {option}"


@pytest.mark.parametrize(("page", "command"), OPTION_TABLES.items())
def test_an_options_table_is_complete(page: str, command: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (rows,) = [rows for heading, rows in tables(text) if heading.startswith("| option |")]
    listed = {name for row in rows for name in re.findall(r"`(--[\w-]+)`", row)}
    assert listed == set(parser_of(command)._option_string_actions) - {"-h", "--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, target
