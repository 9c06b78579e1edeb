"""Tool calls in the text of each family: cut anywhere, the pieces give what the whole text gives."""

import json
from typing import Any

import pytest
from tests.client.openai.scripted import ScriptedFleet, events, post

from turbotriton.client.openai.errors import ApiError
from turbotriton.client.openai.tools import TOOL_FORMATS, ToolCallParser, find_tool_format, forced_call_schema

ONE = '{"name": "add", "arguments": {"a": 1, "b": "x } \\" <é"}}'
TWO = '{"name": "stop", "arguments": {}}'
ADD, STOP = ("add", {"a": 1, "b": 'x } " <é'}), ("stop", {})
#: family, text -> content, calls
TEXTS: list[tuple[str, str, str, list[Any]]] = [
    ("qwen", f"I will.\n<tool_call>\n{ONE}\n</tool_call>", "I will.\n", [ADD]),
    ("qwen", f"<tool_call>{ONE}</tool_call>\n<tool_call>{TWO}</tool_call>", "\n", [ADD, STOP]),
    ("qwen", f"<tool_call>{ONE}", "", [ADD]),  # its end token is the call's end
    ("qwen", "2 < 3 and <tool", "2 < 3 and <tool", []),
    ("qwen", "<tool_call>{no json</tool_call> after", "<tool_call>{no json</tool_call> after", []),
    ("qwen", '<tool_call>{"nom": 1}</tool_call>', '<tool_call>{"nom": 1}</tool_call>', []),
    ("mistral", f"[TOOL_CALLS] [{ONE}, {TWO}]</s>", "", [ADD, STOP]),
    ("mistral", f"Well [1]. [TOOL_CALLS][{TWO}]", "Well [1]. ", [STOP]),
    ("mistral", "just [TOOL text", "just [TOOL text", []),
    ("llama3", ONE.replace("arguments", "parameters"), "", [ADD]),
    ("llama3", f"<|python_tag|>{ONE}; {TWO}<|eom_id|>", "", [ADD, STOP]),
    ("llama3", f"The call is {ONE}", f"The call is {ONE}", []),
    ("llama3", '{"a": 1}', '{"a": 1}', []),
    ("internlm2", f"Let me.<|action_start|><|plugin|>{ONE}<|action_end|>", "Let me.", [ADD]),
    ("internlm2", f"<|action_start|><|plugin|>{TWO}<|action_end|><|im_end|>", "", [STOP]),
    ("internlm2", "Hello </s> there</s>", "Hello </s> there", []),
    ("qwen", "Hello</s>", "Hello</s>", []),
    ("internlm2", "<|action_start|> nothing", "<|action_start|> nothing", []),
]
FORCED: list[tuple[str, str, list[Any]]] = [
    (ONE, "", [ADD]),
    ('{ "name" :\n "add",\n  "arguments" : {"a": [1, {"b": []}]} }', "", [("add", {"a": [1, {"b": []}]})]),
    (f"{TWO}<|im_end|>", "", [STOP]),
    ('{"name": "say \\"it\\"", "arguments": {"s": "\\\\"}}', "", [('say "it"', {"s": "\\"})]),
    ('{"name": "n", "arguments": 5}', "", [("n", 5)]),
    ('{"name": "ad', '{"name": "ad', []),  # cut before it was a call
]


def parse(parser: ToolCallParser, pieces: list[str]) -> tuple[str, list[Any]]:
    """-> content, calls, joined as a client joins deltas."""
    content, calls = "", []
    for text, deltas in [*(parser.push(piece) for piece in pieces), parser.flush()]:
        content += text
        for delta in deltas:
            if "id" in delta:
                assert delta["index"] == len(calls)
                assert delta["id"].startswith("call_")
                assert delta["type"] == "function"
                calls.append([delta["function"]["name"], delta["function"]["arguments"]])
            else:
                calls[delta["index"]][1] += delta["function"]["arguments"]
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


def cuts(text: str) -> list[list[str]]:
    """Whole, sign by sign, and in two at every position."""
    return [[text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))]


@pytest.mark.parametrize(("family", "text", "content", "calls"), TEXTS)
def test_text_cut_anywhere_gives_the_same_calls_and_content(family: str, text: str, content: str, calls: list[Any]) -> None:
    for pieces in cuts(text):
        assert parse(ToolCallParser(TOOL_FORMATS[family]), pieces) == (content, calls), pieces


@pytest.mark.parametrize(("text", "content", "calls"), FORCED)
def test_forced_call_cut_anywhere_is_the_same(text: str, content: str, calls: list[Any]) -> None:
    for pieces in cuts(text):
        assert parse(ToolCallParser(TOOL_FORMATS["qwen"], is_forced=True), pieces) == (content, calls), pieces


def test_forced_call_is_given_on_before_it_is_complete() -> None:
    parser = ToolCallParser(TOOL_FORMATS["qwen"], is_forced=True)
    _, deltas = parser.push('{"name": "add", "arguments": {"a": ')
    assert [delta["function"].get("name") for delta in deltas] == ["add", None]
    assert parser.push("12")[1][0]["function"]["arguments"] == "12"


def test_content_is_held_no_longer_than_it_may_begin_a_call() -> None:
    parser = ToolCallParser(TOOL_FORMATS["qwen"])
    assert parser.push("a <tool")[0] == "a "
    assert parser.push("box> b")[0] == "<toolbox> b"


def test_calls_beyond_the_most_are_dropped() -> None:
    text = f"<tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call>"
    assert parse(ToolCallParser(TOOL_FORMATS["qwen"], max_calls=1), [text]) == ("", [ADD])
    assert parse(ToolCallParser(TOOL_FORMATS["mistral"], max_calls=1), [f"[TOOL_CALLS][{ONE},{TWO}]"]) == ("", [ADD])


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{% if tools %}<tool_call>{{ tools }}{% endif %}<|im_start|>", "qwen"),
        ("{% if tools %}{% endif %}[TOOL_CALLS]", "mistral"),
        ("<|start_header_id|>{{ tools }}", "llama3"),
        ("{{ tools }}<|plugin|><|im_start|>", "internlm2"),
        ("<|im_start|>", None),
        ("{{ tools }}", None),
        (None, None),
    ],
)
def test_family_is_found_by_its_template(template: str | None, family: str | None) -> None:
    found = find_tool_format(template)
    assert (found and found.name) == family


def test_schema_of_a_forced_call() -> None:
    add, stop = {"name": "add", "parameters": {"type": "object", "title": "A"}}, {"name": "stop"}
    both = forced_call_schema([add, stop], "required")["anyOf"]
    assert [one["properties"]["name"] for one in both] == [{"const": "add"}, {"const": "stop"}]
    assert [one["properties"]["arguments"] for one in both] == [add["parameters"], {"type": "object"}]
    named = forced_call_schema([add, stop], {"type": "function", "function": {"name": "stop"}})
    assert named["properties"]["name"] == {"const": "stop"}
    for choice in ({"function": {"name": "fly"}}, {"function": "add"}, {}):
        with pytest.raises(ApiError, match="not among tools"):
            forced_call_schema([add], choice)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
BODY = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS}


def test_calls_of_a_chat_whole_and_streamed() -> None:
    pieces = ["I w", "ill. <tool", f"_call>{ONE}</to", "ol_call>"]
    choice = post("chat/completions", BODY, ScriptedFleet(pieces)).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I will.", "tool_calls")
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ADD
    chunks = [event["choices"][0] for event in events(post("chat/completions", BODY | {"stream": True}, ScriptedFleet(pieces)))]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "I will. "
    (streamed,) = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
    assert streamed["index"] == 0
    assert streamed["function"] == call["function"]
    assert chunks[-1]["finish_reason"] == "tool_calls"


def test_forced_call_asks_for_its_schema_and_tools_reach_the_template() -> None:
    fleet = ScriptedFleet([ONE])
    choice = post("chat/completions", BODY | {"tool_choice": "required", "logit_bias": {"5": 1}}, fleet).json()["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
    _, _, options = fleet.asked[0]
    assert options["chat_template_kwargs"] == {"tools": TOOLS}
    assert options["sampling_parameters"]["logit_bias"] == {"5": 1}
    assert options["sampling_parameters"]["guided"]["json_schema"]["properties"]["name"] == {"const": "add"}


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function"}],
        [{"type": "magic", "function": {"name": "x"}}],
        [{"type": "function", "function": {"name": ""}}],
        [5],
    ],
)
def test_tool_that_is_none_is_refused(tools: Any) -> None:
    reply = post("chat/completions", BODY | {"tools": tools})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("tools.0")


def test_model_whose_template_has_no_tools_refuses_them() -> None:
    reply = post("chat/completions", BODY, ScriptedFleet(template="<|im_start|>"))
    assert reply.status_code == 400
    assert "leave tools out" in reply.json()["error"]["message"]
    assert post("chat/completions", BODY, ScriptedFleet(template="<|im_start|>"), tool_call_parser="qwen").status_code == 200
