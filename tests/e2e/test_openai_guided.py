"""response_format, guided_... and tools through OpenAI's own client: the demo model is small, the constraint does the work."""

import asyncio
import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from tests.throttle import in_parts
from tokenizers import Tokenizer

from turbotriton.cli.main import main
from turbotriton.demo import checkpoint_path

from .openai_server import api_server
from .processes import engine_pid
from .server import TritonServer

pytestmark = pytest.mark.e2e

HELLO: list[Any] = [{"role": "user", "content": "Hello! Who are you?"}]
ASK: dict[str, Any] = {"model": "helper", "messages": HELLO, "max_tokens": 200, "temperature": 1.2, "seed": 7}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TEXTS = {"type": "object", "properties": {"text": {"enum": ['a "quoted" \\ {brace', "b"]}}, "required": ["text"]}
NOTE: Any = {"type": "function", "function": {"name": "note", "parameters": TEXTS | {"additionalProperties": False}}}
STRICT_WEATHER: Any = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
#: The demo model's own template, and the tools as Qwen's templates write them.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\nAnswer with <tool_call>' + tools | tojson + '</tool_call><|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class City(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=10)
    kind: Literal["town", "capital"]
    founded: int = pydantic.Field(ge=1, le=2000)
    twins: list[Literal["Bonn", "Lyon"]] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The demo model with a template that knows tools, under the name helper."""
    checkpoint, workspace = (tmp_path_factory.mktemp("tools") / name for name in ("checkpoint", "workspace"))
    shutil.copytree(checkpoint_path(), checkpoint)
    settings = checkpoint / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    assert main(["convert", "helper", str(checkpoint), "--dst-path", str(workspace), "--doors", "text"]) == 0
    with TritonServer(Path(workspace) / "model_repository") as made:
        yield made


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[openai.OpenAI]:
    with (
        api_server(server.grpc_url) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def test_json_schema_gives_what_pydantic_reads(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(response_format=City, **ASK)
    assert isinstance(answer.choices[0].message.parsed, City)
    assert answer.choices[0].finish_reason == "stop"
    many = client.chat.completions.create(
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": City.model_json_schema()}}, n=3, **ASK
    )
    cities = [City.model_validate_json(choice.message.content or "") for choice in many.choices]
    assert len({city.model_dump_json() for city in cities}) > 1


def test_streamed_json_schema_is_the_same(client: openai.OpenAI, server: TritonServer) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": City.model_json_schema()}}
    whole = client.chat.completions.create(response_format=form, **ASK).choices[0].message.content
    stream = functools.partial(client.chat.completions.create, response_format=form, stream=True, **ASK)
    chunks = in_parts(engine_pid(server), lambda: list(stream()), 4)  # the role, two pieces at least, the reason
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    """The bias ends strings and the object, which the model alone hardly does."""
    ids = [Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json")).token_to_id(sign) for sign in ('"', "}", ":")]
    many = client.chat.completions.create(
        response_format={"type": "json_object"}, n=4, logit_bias={str(token): 5 for token in ids}, **ASK | {"max_tokens": 500}
    )
    answers = [choice.message.content or "" for choice in many.choices if choice.finish_reason == "stop"]
    assert answers
    assert all(isinstance(json.loads(answer), dict) for answer in answers)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"response_format": {"type": "regex", "regex": "[0-9]{3}-[a-f]"}}, "[0-9]{3}-[a-f]"),
        ({"guided_regex": "[0-9]{3}-[a-f]"}, "[0-9]{3}-[a-f]"),
        ({"guided_choice": ["spring", "autumn"]}, "spring|autumn"),
        ({"response_format": {"type": "choice", "choice": ["spring", "autumn"]}}, "spring|autumn"),
        ({"guided_grammar": 'start: "x" /[0-9]/ start?'}, "(x[0-9])+"),
        ({"guided_json": {"const": 42}}, "42"),
    ],
)
def test_extra_body_guides_chat_and_completions(client: openai.OpenAI, extra: Any, pattern: str) -> None:
    chat = client.chat.completions.create(extra_body=extra, **ASK)
    assert re.fullmatch(pattern, chat.choices[0].message.content or "")
    if "response_format" not in extra:
        answer = client.completions.create(model="helper", prompt="Once", extra_body=extra, max_tokens=200, seed=7)
        text = answer.choices[0].text
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"guided_regex": "(["},
        {"guided_regex": "a", "guided_choice": ["b"]},
        {"guided_regex": "a", "ignore_eos": True},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_followed_is_a_bad_request(client: openai.OpenAI, wrong: Any, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(extra_body=wrong, stream=stream, **ASK)


def test_named_call_has_arguments_that_fit(client: openai.OpenAI) -> None:
    chosen: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(tools=[NOTE, WEATHER], tool_choice=chosen, **ASK)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    assert (call.function.name, set(arguments)) == ("get_weather", {"city", "days"})
    assert 1 <= arguments["days"] <= 9


@pytest.mark.parametrize("tools", [[WEATHER], [NOTE], [WEATHER, NOTE]], ids=["weather", "note", "either"])
def test_streamed_call_begins_with_its_name_and_grows_to_the_whole_one(
    client: openai.OpenAI, server: TritonServer, tools: Any
) -> None:
    whole = client.chat.completions.create(tools=tools, tool_choice="required", **ASK).choices[0].message.tool_calls or []
    stream = functools.partial(client.chat.completions.create, tools=tools, tool_choice="required", stream=True, **ASK)
    chunks = in_parts(engine_pid(server), lambda: list(stream()), 4)
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert pieces[0].id
    assert pieces[0].function is not None
    assert pieces[0].function.name == whole[0].function.name  # type: ignore[union-attr]
    assert all(piece.id is None for piece in pieces[1:])
    assert len(pieces) > 1
    arguments = "".join(piece.function.arguments or "" for piece in pieces if piece.function)
    assert arguments == whole[0].function.arguments  # type: ignore[union-attr]
    assert isinstance(json.loads(arguments), dict)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_official_stream_helper_follows_the_call(client: openai.OpenAI) -> None:
    async def run() -> Any:
        async with (
            openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none") as asynchronous,
            asynchronous.chat.completions.stream(tools=[STRICT_WEATHER], tool_choice="required", **ASK) as stream,
        ):
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    (call,) = asyncio.run(run()).choices[0].message.tool_calls
    assert call.function.parsed_arguments["days"] in range(1, 10)


def test_template_gets_the_tools_and_a_conversation_with_results_goes_on(client: openai.OpenAI) -> None:
    def num_prompt_tokens(**more: Any) -> int:
        usage = client.chat.completions.create(**ASK | {"max_tokens": 1} | more).usage
        assert usage is not None
        return usage.prompt_tokens

    assert num_prompt_tokens(tools=[WEATHER]) > num_prompt_tokens() == num_prompt_tokens(tools=[WEATHER], tool_choice="none")
    with pytest.raises(openai.BadRequestError, match="'fly'"):
        client.chat.completions.create(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "fly"}}, **ASK)
