"""The text door's reading of a request: every field at both ends of its range and beyond, and nothing accepted that is not read."""

import json
from typing import Any

import numpy as np
import pytest
from tests.backend.tritonserver.fake_pb_utils import Request, strings

from turbotriton.client.text_door import DEFAULTS
from turbotriton.contract.errors import InvalidInputError
from turbotriton.demo import checkpoint_path
from turbotriton.text.chat_template import ChatTemplate
from turbotriton.text.detokenizer import TextTokenizer

INT32 = 2**31 - 1
NAN, INFINITY = float("nan"), float("inf")
TOKENIZER = TextTokenizer.load(checkpoint_path())
DTYPES: dict[str, Any] = {
    **dict.fromkeys(("max_tokens", "min_tokens", "top_k", "n", "num_logprobs", "priority", "deadline_ms"), np.int32),
    **dict.fromkeys(("temperature", "top_p", "min_p"), np.float32),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), np.float32),
    "seed": np.uint64,
    "stop_token_ids": np.int32,
    "input_ids": np.int32,
}


def tensor(name: str, value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if all(isinstance(item, str | bytes) for item in values) and values:
        return strings(*values)
    return np.array(values, dtype=DTYPES.get(name, np.bool_))


def read(*, template: bool = True, parameters: dict[str, Any] | None = None, **inputs: Any) -> Any:
    from turbotriton.backend.tritonserver.text_request import read_text_request

    if not {"text_input", "messages", "input_ids"} & inputs.keys():
        inputs["text_input"] = "hello"
    assert TOKENIZER.chat_template is not None
    chat = ChatTemplate(TOKENIZER.chat_template) if template else None
    return read_text_request(
        Request({name: tensor(name, value) for name, value in inputs.items()}, parameters or {}), TOKENIZER, chat
    )


def refused(match: str, **inputs: Any) -> None:
    with pytest.raises(InvalidInputError, match=match):
        read(**inputs)


#: field -> (values at the ends of its range, values beyond)
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "max_tokens": ([0, 1, INT32], [-1, -INT32]),
    "min_tokens": ([0, 5], [-1]),
    "temperature": ([0.0, 1e-4, 100.0], [-0.125, 100.5, NAN, INFINITY, -INFINITY]),
    "top_p": ([0.015625, 1.0], [0.0, -0.5, 1.0625, NAN, INFINITY]),
    "min_p": ([0.0, 1.0], [-0.125, 1.0625, NAN]),
    "top_k": ([-1, 0, 1, INT32], [-2]),
    "repetition_penalty": ([0.125, 1.0, 100.0], [0.0, -1.0, 100.5, NAN, INFINITY]),
    "presence_penalty": ([-2.0, 2.0], [-2.125, 2.125, NAN]),
    "frequency_penalty": ([-2.0, 2.0], [-2.125, 2.125, NAN]),
    "seed": ([0, 2**64 - 1], []),
    "n": ([1, 16], [0, 17, -1]),
    "num_logprobs": ([0, 1024], [-1, 1025]),
    "priority": ([-INT32, INT32], [-INT32 - 1]),
    "deadline_ms": ([1, 86_400_000], [0, -1, 86_400_001]),
}
#: field -> where its value is found
FOUND = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}


def value_of(request: Any, name: str) -> Any:
    if name == "n":
        return request.num_samples
    return getattr(request if name in ("priority", "deadline_ms") else request.sampling, FOUND.get(name, name))


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (good, _) in RANGES.items() for value in good])
def test_value_at_the_end_of_its_range_arrives(name: str, value: Any) -> None:
    wanted = max(value, 0) if name == "top_k" else value  # -1 is vLLM's "off"
    assert value_of(read(**{name: value}), name) == pytest.approx(wanted)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, bad) in RANGES.items() for value in bad])
def test_value_beyond_its_range_is_refused_by_name(name: str, value: Any) -> None:
    refused(rf"^{FOUND.get(name, name)} is |^{name} is ", **{name: value})


IN_JSON = [name for name in RANGES if name not in ("priority", "deadline_ms", "num_logprobs")]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in IN_JSON for value in RANGES[name][1]])
def test_the_json_has_the_same_ranges(name: str, value: Any) -> None:
    refused(rf"{FOUND.get(name, name)} is |{name} is ", sampling_parameters=json.dumps({name: value}))


@pytest.mark.parametrize("name", IN_JSON)
@pytest.mark.parametrize("text", ["true", '"1"', "[1]", "{}", "1" + "0" * 400])
def test_json_numbers_are_numbers(name: str, text: str) -> None:
    refused(rf"sampling_parameters: {name} is .*it must be", sampling_parameters=f'{{"{name}": {text}}}')


@pytest.mark.parametrize(("text", "is_good"), [("0", True), ("1024", True), ("-1", False), ("1025", False), ("true", False)])
def test_prompt_logprobs_are_asked_for_in_the_json(text: str, is_good: bool) -> None:
    sampling = f'{{"prompt_logprobs": {text}}}'
    if not is_good:
        refused("sampling_parameters: prompt_logprobs is .*it must be", sampling_parameters=sampling)
        return
    request = read(sampling_parameters=sampling)
    assert request.sampling.prompt_logprobs == int(text)
    assert request.returns == {"prompt_logprobs"}


def test_an_absurd_json_value_is_shortened_in_the_error() -> None:
    with pytest.raises(InvalidInputError) as caught:
        read(sampling_parameters=json.dumps({"top_p": "x" * 10_000}))
    assert len(str(caught.value)) < 200


def test_flat_tensors_win_over_the_json_and_null_is_absent() -> None:
    request = read(sampling_parameters='{"temperature": 0.5, "max_tokens": 7, "top_k": null}', max_tokens=3)
    assert (request.sampling.temperature, request.sampling.max_new_tokens, request.sampling.top_k) == (0.5, 3, 0)


def test_defaults_are_plain_sampling() -> None:
    request = read()
    sampling = request.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (None, 1.0, 1.0, 0)
    assert (sampling.seed, sampling.num_logprobs, sampling.ignore_eos) == (None, None, False)
    assert (request.num_samples, request.stream, request.exclude_input) == (1, False, True)
    assert (request.skip_special_tokens, request.returns, request.deadline_ms) == (True, frozenset(), None)


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_option_that_clients_leave_out_has_the_value_that_they_left_out(name: str) -> None:
    assert read(**{name: DEFAULTS[name]}) == read()


@pytest.mark.parametrize("values", [["a"] * 64, ["é", "\n"]])
def test_stop_words_arrive(values: list[str]) -> None:
    assert read(stop_words=values).stop_words == tuple(values)
    assert read(sampling_parameters=json.dumps({"stop": values})).stop_words == tuple(values)


def test_one_stop_word_in_json_may_be_a_string() -> None:
    assert read(sampling_parameters='{"stop": "END"}').stop_words == ("END",)


@pytest.mark.parametrize("name", ["stop_words", "bad_words"])
def test_word_lists_are_bounded_and_hold_no_empty_word(name: str) -> None:
    refused(rf"{name} has 65 entries; at most 64", **{name: ["a"] * 65})
    refused(rf"{name} contains an empty string", **{name: ["a", ""]})
    refused(rf"{name} is no UTF-8", **{name: [b"\xc3"]})


@pytest.mark.parametrize("name", ["stop", "bad_words"])
@pytest.mark.parametrize("half", ["\\ud800", "\\udfff"])
def test_half_a_character_in_json_is_refused(name: str, half: str) -> None:
    refused(r"sampling_parameters contains the lone surrogate", sampling_parameters=f'{{"{name}": ["a{half}"]}}')


def test_two_halves_in_json_are_one_character() -> None:
    assert read(sampling_parameters='{"stop": ["\\ud83d\\ude00"]}').stop_words == ("😀",)


def test_half_a_character_in_a_message_is_refused() -> None:
    refused("messages contains the lone surrogate", messages='[{"role": "user", "content": "\\ud800"}]')


def test_stop_token_ids() -> None:
    assert read(stop_token_ids=[0, 5]).sampling.stop_token_ids == (0, 5)
    refused("stop_token_ids contains -1", stop_token_ids=[4, -1])
    refused("stop_token_ids has 65 entries", stop_token_ids=list(range(65)))
    refused("stop_token_ids contains 2147483648", sampling_parameters='{"stop_token_ids": [2147483648]}')


def test_bad_words_are_banned_with_and_without_a_space_before() -> None:
    sequences = read(bad_words=["cat"]).sampling.bad_sequences
    assert set(sequences) == {tuple(TOKENIZER.encode(form, add_special_tokens=False)) for form in ("cat", " cat")}


def test_exactly_one_prompt() -> None:
    user = '[{"role": "user", "content": "Hi"}]'
    for given in (
        {"text_input": "a", "messages": user},
        {"text_input": "a", "input_ids": [4]},
        {"messages": user, "input_ids": [4]},
    ):
        refused(f"not {' and '.join(given)}", **given)


def test_no_prompt_is_refused() -> None:
    from turbotriton.backend.tritonserver.text_request import read_text_request

    with pytest.raises(InvalidInputError, match="not none"):
        read_text_request(Request({}), TOKENIZER, None)


def test_the_prompt_in_each_form() -> None:
    assert read(text_input="hello").prompt_text == "hello"
    assert read(text_input="hello").prompt_ids == tuple(TOKENIZER.encode("hello"))
    assert read(input_ids=[4, 5]).prompt_ids == (4, 5)
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    chat = read(messages='[{"role": "user", "content": "Hi"}]')
    assert (chat.prompt_ids, chat.prompt_text) == (tuple(TOKENIZER.encode(rendered, add_special_tokens=False)), "")


def test_empty_prompts_are_refused() -> None:
    refused("text_input is empty", text_input="")
    refused("input_ids is empty", input_ids=[])
    refused("messages must be a non-empty list", messages="[]")


def test_messages_without_a_chat_template_are_refused() -> None:
    refused("no chat template", messages='[{"role": "user", "content": "Hi"}]', template=False)


def test_several_samples_are_not_streamed() -> None:
    assert read(n=3).num_samples == 3
    refused("n is 3.*stream", n=3, stream=True)


@pytest.mark.parametrize("name", ["finish_reason", "num_input_tokens", "num_output_tokens", "logprobs", "cumulative_logprob"])
def test_outputs_are_returned_when_asked_for(name: str) -> None:
    assert read(**{f"return_{name}": True}).returns == {name}
    assert read(**{f"return_{name}": False}).returns == frozenset()


def test_logprobs_are_computed_for_whatever_shows_them() -> None:
    assert read(return_logprobs=True).sampling.num_logprobs == 0
    assert read(return_cumulative_logprob=True).sampling.num_logprobs == 0
    counted = read(num_logprobs=4)
    assert (counted.sampling.num_logprobs, counted.returns) == (4, {"logprobs"})


@pytest.mark.parametrize("name", ["best_of", "max_token", "Temperature", ""])
def test_unknown_names_are_refused(name: str) -> None:
    refused(f"'{name}' is no input", parameters={name: 1})
    refused(f"unknown key '{name}'", sampling_parameters=json.dumps({name: 1}))


def test_parameters_that_clients_and_the_server_add_are_read_over() -> None:
    added = {"sequence_id": 5, "sequence_start": True, "priority": 0, "triton_enable_empty_final_response": True}
    assert read(parameters=added).num_samples == 1


@pytest.mark.parametrize("text", ["{", "", "nul", "[1, 2]", "3", '"x"'])
def test_sampling_parameters_must_be_a_json_object(text: str) -> None:
    refused("sampling_parameters", sampling_parameters=text)


@pytest.mark.parametrize("name", ["ignore_eos", "skip_special_tokens", "include_stop_str_in_output"])
def test_json_flags_are_true_or_false(name: str) -> None:
    refused(f"{name} is 1; it must be true or false", sampling_parameters=f'{{"{name}": 1}}')
    assert read(sampling_parameters=f'{{"{name}": true}}')
