"""Tables of malformed requests: each names what its error must name. Sent by test_doors_malformed.py."""

import json
from typing import Any

from .raw_grpc import Input, infer_request

NAN, INFINITY = float("nan"), float("inf")
GOOD = {"text_input": "hello", "max_tokens": 2, "temperature": 0.0}
USER = {"role": "user", "content": "Hello!"}


def sampling(text: str) -> dict[str, Any]:
    return {"text_input": "hello", "sampling_parameters": text}


def messages(value: Any) -> dict[str, Any]:
    return {"messages": value if isinstance(value, str) else json.dumps(value)}


#: name -> (JSON body of POST /generate on the text door, what the error must name)
TEXT_HTTP: dict[str, tuple[dict[str, Any] | bytes, tuple[str, ...]]] = {
    "no prompt": ({"max_tokens": 2}, ("text_input", "messages", "input_ids", "none")),
    "text and messages": ({"text_input": "a", **messages([USER])}, ("exactly one", "text_input and messages")),
    "text and ids": ({"text_input": "a", "input_ids": [40]}, ("exactly one", "text_input and input_ids")),
    "all three": ({"text_input": "a", "input_ids": [4], **messages([USER])}, ("text_input and messages and input_ids",)),
    "empty text": ({"text_input": ""}, ("text_input is empty",)),
    "over-long text": ({"text_input": "a b " * 4000}, ("session_len is 2048", "too long")),
    "huge text": ({"text_input": "a" * (8 * 2**20 + 1)}, ("text_input", "8388609 bytes", "8388608")),
    "empty ids": ({"input_ids": []}, ("input_ids is empty",)),
    "negative id": ({"input_ids": [40, -7]}, ("-7", "vocabulary of 512")),
    "id beyond the vocabulary": ({"input_ids": [512]}, ("512", "vocabulary")),
    "messages that are no JSON": (messages("[{"), ("messages", "no JSON")),
    "messages that are an object": (messages({"role": "user"}), ("messages", "list")),
    "no message": (messages([]), ("messages", "non-empty")),
    "message that is a string": (messages(["hi"]), ("messages[0]",)),
    "unknown role": (messages([USER, {"role": "wizard", "content": "x"}]), ("messages[1].role", "wizard")),
    "message without content": (messages([{"role": "user"}]), ("messages[0].content",)),
    "content that is a list": (messages([{"role": "user", "content": [1]}]), ("messages[0].content",)),
    "deeply nested messages": (messages("[" * 100_000), ("messages", "no JSON")),
    "lone surrogate in a message": (messages([{"role": "user", "content": "\ud800"}]), ("messages", "\\ud800")),
    "unknown input": ({**GOOD, "best_of": 2}, ("best_of",)),
    "misspelt input": ({**GOOD, "max_token": 2}, ("max_token",)),
    "max_tokens negative": ({**GOOD, "max_tokens": -1}, ("max_tokens is -1",)),
    "min_tokens negative": ({**GOOD, "min_tokens": -1}, ("min_tokens is -1",)),
    "min_tokens above max_tokens": ({**GOOD, "min_tokens": 3}, ("min", "3", "2")),
    "temperature negative": ({**GOOD, "temperature": -0.5}, ("temperature is -0.5",)),
    "temperature huge": ({**GOOD, "temperature": 1e30}, ("temperature is 1", "100")),
    "temperature beyond FP32": ({**GOOD, "temperature": 1e300}, ("temperature is inf",)),
    "top_p zero": ({**GOOD, "top_p": 0.0}, ("top_p is 0.0",)),
    "top_p above one": ({**GOOD, "top_p": 1.5}, ("top_p is 1.5",)),
    "min_p above one": ({**GOOD, "min_p": 1.5}, ("min_p is 1.5",)),
    "min_p negative": ({**GOOD, "min_p": -0.5}, ("min_p is -0.5",)),
    "top_k below -1": ({**GOOD, "top_k": -2}, ("top_k is -2",)),
    "repetition_penalty zero": ({**GOOD, "repetition_penalty": 0.0}, ("repetition_penalty is 0.0",)),
    "presence_penalty": ({**GOOD, "presence_penalty": 2.5}, ("presence_penalty is 2.5",)),
    "frequency_penalty": ({**GOOD, "frequency_penalty": -2.5}, ("frequency_penalty is -2.5",)),
    "empty stop word": ({**GOOD, "stop_words": ["a", ""]}, ("stop_words", "empty")),
    "too many stop words": ({**GOOD, "stop_words": ["a"] * 65}, ("stop_words has 65", "64")),
    "empty bad word": ({**GOOD, "bad_words": [""]}, ("bad_words", "empty")),
    "stop id negative": ({**GOOD, "stop_token_ids": [-1]}, ("stop_token_ids contains -1",)),
    "n zero": ({**GOOD, "n": 0}, ("n is 0",)),
    "n huge": ({**GOOD, "n": 17}, ("n is 17", "16")),
    "n streamed": ({**GOOD, "n": 2, "stream": True}, ("n is 2", "stream")),
    "num_logprobs huge": ({**GOOD, "num_logprobs": 5000}, ("num_logprobs is 5000", "1024")),
    "deadline zero": ({**GOOD, "deadline_ms": 0}, ("deadline_ms is 0",)),
    "deadline negative": ({**GOOD, "deadline_ms": -5}, ("deadline_ms is -5",)),
    "priority below its range": ({**GOOD, "priority": -(2**31)}, ("priority is -2147483648",)),
    "stop without an id": ({"stop": True}, ("stop", "id")),
    "sampling that is no JSON": (sampling("{"), ("sampling_parameters", "no JSON")),
    "sampling that is a list": (sampling("[1]"), ("sampling_parameters", "object")),
    "sampling with an unknown key": (sampling('{"best_of": 2}'), ("sampling_parameters", "best_of")),
    "sampling with NaN": (sampling('{"temperature": NaN}'), ("temperature", "nan", "finite")),
    "sampling with a number of 400 digits": (sampling('{"temperature": 1%s}' % ("0" * 400)), ("temperature", "finite")),
    "sampling with a number of 5000 digits": (sampling('{"top_k": 1%s}' % ("0" * 5000)), ("sampling_parameters",)),
    "sampling with a string": (sampling('{"top_p": "x"}'), ("top_p", "'x'")),
    "sampling with true for a number": (sampling('{"max_tokens": true}'), ("max_tokens", "True")),
    "sampling with a fraction": (sampling('{"top_k": 1.5}'), ("top_k", "1.5")),
    "sampling with words that are numbers": (sampling('{"stop": [1]}'), ("stop", "strings")),
    "sampling with ids that are words": (sampling('{"stop_token_ids": ["a"]}'), ("stop_token_ids", "ids")),
    "sampling with a lone surrogate": (sampling('{"bad_words": ["\\ud800"]}'), ("sampling_parameters", "\\ud800")),
    "sampling with a lone surrogate to stop at": (sampling('{"stop": "\\udfff"}'), ("sampling_parameters", "\\udfff")),
    "body that is not UTF-8": (b'{"text_input": "\xff\xfe"}', ("UTF-8",)),
}

#: What tritonserver's own JSON reader refuses: (body, status, its words). It also cuts an INT32 of more than 32 bits, unseen by us.
SERVER_HTTP: dict[str, tuple[dict[str, Any] | bytes, int, str]] = {
    "body that is no JSON": (b'{"text_input": ', 500, "failed to parse the request JSON"),
    "body that is a list": (b"[1]", 500, "non-object"),
    "empty body": (b"", 500, "document is empty"),
    "text that is a number": ({"text_input": 7}, 500, "non-string as string"),
    "text that is null": ({"text_input": None}, 500, "non-string as string"),
    "text that is an object": ({"text_input": {"a": 1}}, 500, "non-string as string"),
    "two texts": ({"text_input": ["a", "b"]}, 400, "input 'text_input'"),
    "ids that are text": ({"input_ids": ["x"]}, 500, "non-signed-integer"),
    "count that is text": ({**GOOD, "max_tokens": "two"}, 500, "non-signed-integer"),
    "count that is a fraction": ({**GOOD, "max_tokens": 1.5}, 500, "non-signed-integer"),
    "two counts": ({**GOOD, "max_tokens": [1, 2]}, 400, "input 'max_tokens'"),
    "seed negative": ({**GOOD, "seed": -1}, 500, "non-unsigned-integer"),
    "seed beyond 64 bits": ({**GOOD, "seed": 2**64}, 500, "non-unsigned-integer"),
    "flag that is text": ({**GOOD, "stream": "yes"}, 500, "non-boolean"),
}


def tensors(*inputs: tuple[str, str, list[int], list[Any]], **rest: Any) -> dict[str, Any]:
    """The JSON body of POST /infer."""
    named = ("name", "datatype", "shape", "data")
    return {"inputs": [dict(zip(named, item, strict=True)) for item in inputs], **rest}


def generate_turn(**changed: Any) -> dict[str, Any]:
    return {"input_ids": [40], "input_lengths": 1, "request_output_len": 2, **changed}


IDS = ("TOKENS_BATCH", "UINT32", [1, 1, 2], [40, 41])
SKIP = ("skip_special_tokens", "INT32", [1, 1], [1])
#: (path below /v2/models, JSON body, status, what the error must name)
OTHER_HTTP: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "unknown model": ("nobody/generate", GOOD, 404, "nobody"),
    "unknown version": ("demo/versions/7/generate", GOOD, 404, "version 7"),
    "text door without generate": ("demo/infer", tensors(("text_input", "BYTES", [1], ["a"])), 501, "decoupled"),
    "turn without generate": ("turbomind/infer", tensors(("input_ids", "UINT32", [1, 1], [40])), 501, "decoupled"),
    "turn length": ("turbomind/generate", generate_turn(input_lengths=2), 400, "input_lengths is 2"),
    "turn of an unknown session": ("turbomind/generate", generate_turn(START=0, CORRID=9), 400, "failure:  1 (session 9"),
    "turn with an unknown key": ("turbomind/generate", generate_turn(top_k=1), 400, "'top_k'"),
    "turn id beyond the vocabulary": ("turbomind/generate", generate_turn(input_ids=[9999]), 400, "9999"),
    "query that is a number": ("preprocessing/infer", tensors(("QUERY", "BYTES", [1, 1], [7])), 500, "non-string as string"),
    "query of another shape": ("preprocessing/infer", tensors(("QUERY", "BYTES", [1, 2], ["a"])), 400, "'QUERY'"),
    "query of another type": ("preprocessing/infer", tensors(("QUERY", "FP32", [1, 1], [1.0])), 400, "'QUERY' data-type"),
    "query of no type": ("preprocessing/infer", tensors(("QUERY", "TEXT", [1, 1], ["a"])), 400, "QUERY"),
    "query empty": ("preprocessing/infer", tensors(("QUERY", "BYTES", [1, 0], [])), 400, "QUERY is empty"),
    "query with a parameter": (
        "preprocessing/infer",
        tensors(("QUERY", "BYTES", [1, 1], ["a"]), parameters={"lang": "en"}),
        400,
        "'lang'",
    ),
    "query without inputs": ("preprocessing/infer", {}, 500, "'inputs'"),
    "tokens without an offset": ("postprocessing/infer", tensors(IDS), 400, "'sequence_length'"),
    "tokens offset": (
        "postprocessing/infer",
        tensors(IDS, ("sequence_length", "UINT32", [1, 1], [3]), SKIP),
        400,
        "sequence_length is 3",
    ),
    "tokens negative": (
        "postprocessing/infer",
        tensors((*IDS[:3], [40, -1]), ("sequence_length", "UINT32", [1, 1], [0]), SKIP),
        500,
        "non-unsigned-integer",
    ),
}


def one(name: str, datatype: str, value: Any, shape: tuple[int, ...] = (1, 1)) -> Input:
    return Input(name, datatype, shape, [value])


TEXT = one("text_input", "BYTES", b"hello", (1,))


def text(*inputs: Input, **parameters: Any) -> Any:
    return infer_request("demo", [TEXT, *inputs], "bad", **parameters)


def text_number(name: str, datatype: str, value: Any) -> Any:
    return text(one(name, datatype, value, (1,)))


def turn(*inputs: Input, ids: tuple[int, ...] = (40, 41), drop: str = "", **parameters: Any) -> Any:
    """A good turn of its own session, with `inputs` in the place of those of the same name, without `drop`."""
    whole = {
        "input_ids": Input("input_ids", "UINT32", [1, len(ids)], ids),
        "input_lengths": one("input_lengths", "UINT32", len(ids)),
        "request_output_len": one("request_output_len", "UINT32", 2),
        "CORRID": one("CORRID", "UINT64", 77),
    } | {item.name: item for item in inputs}
    whole.pop(drop, None)
    return infer_request("turbomind", list(whole.values()), "bad", **parameters)


def turn_number(name: str, datatype: str, value: Any) -> Any:
    return turn(one(name, datatype, value))


def word_list(name: str, *rows: int, shape: tuple[int, ...]) -> Any:
    return turn(Input(name, "INT32", shape, rows))


#: name -> (a request on a stream of its own, what the error must name)
STREAMED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "text: unknown model": (infer_request("nobody", [TEXT]), ("nobody",)),
    "text: no input": (infer_request("demo", []), ("text_input", "none")),
    "text: wrong type of the text": (infer_request("demo", [Input("text_input", "INT32", [1], [7])]), ("text_input", "INT32")),
    "text: wrong type of a number": (text_number("temperature", "INT32", 1), ("temperature", "INT32")),
    "text: integer of 64 bits": (text_number("max_tokens", "INT64", 1), ("max_tokens", "INT64")),
    "text: two dimensions": (text(one("max_tokens", "INT32", 1)), ("max_tokens", "[1,1]")),
    "text: two values": (text(Input("max_tokens", "INT32", [2], [1, 2])), ("max_tokens", "[2]")),
    "text: no value": (text(Input("max_tokens", "INT32", [0], [])), ("max_tokens", "[0]")),
    "text: fewer bytes than the shape": (text(Input("max_tokens", "INT32", [1], [], raw=b"\1\0")), ("max_tokens",)),
    "text: more bytes than the shape": (text(Input("max_tokens", "INT32", [1], [1, 2])), ("max_tokens",)),
    "text: string length beyond the message": (
        infer_request("demo", [Input("text_input", "BYTES", [1], [], raw=b"\xff\xff\0\0abc")]),
        ("text_input",),
    ),
    "text: negative dimension": (text(Input("max_tokens", "INT32", [-1], [1])), ("max_tokens",)),
    "text: unknown tensor": (text(one("best_of", "INT32", 2, (1,))), ("best_of",)),
    "text: unknown parameter": (text(best_of=2), ("best_of",)),
    "text: not UTF-8": (infer_request("demo", [one("text_input", "BYTES", b"\xff\xfe", (1,))]), ("text_input", "UTF-8")),
    "text: stop word not UTF-8": (text(one("stop_words", "BYTES", b"\xc3", (1,))), ("stop_words", "UTF-8")),
    "text: temperature NaN": (text_number("temperature", "FP32", NAN), ("temperature is nan",)),
    "text: temperature infinite": (text_number("temperature", "FP32", INFINITY), ("temperature is inf",)),
    "text: top_p NaN": (text_number("top_p", "FP32", NAN), ("top_p is nan",)),
    "text: penalty minus infinity": (text_number("presence_penalty", "FP32", -INFINITY), ("presence_penalty is -inf",)),
    "text: deadline negative": (text_number("deadline_ms", "INT32", -1), ("deadline_ms is -1",)),
    "text: id negative": (infer_request("demo", [Input("input_ids", "INT32", [2], [40, -1])]), ("-1", "vocabulary")),
    "text: id huge": (infer_request("demo", [Input("input_ids", "INT32", [1], [2**31 - 1])]), ("2147483647", "vocabulary")),
    "text: over-long ids": (infer_request("demo", [Input("input_ids", "INT32", [2049], [40] * 2049)]), ("2049", "session_len")),
    "text: n streamed": (text(one("n", "INT32", 2, (1,)), one("stream", "BOOL", True, (1,))), ("n is 2", "stream")),
    "turn: no ids": (turn(drop="input_ids"), ("input_ids missing",)),
    "turn: no length": (turn(drop="input_lengths"), ("input_lengths missing",)),
    "turn: no count": (turn(drop="request_output_len"), ("request_output_len missing",)),
    "turn: ids of the wrong type": (turn(Input("input_ids", "INT32", [1, 2], [40, 41])), ("input_ids", "INT32")),
    "turn: no batch dimension": (turn(Input("input_ids", "UINT32", [2], [40, 41])), ("input_ids",)),
    "turn: a batch of two": (turn(Input("input_ids", "UINT32", [2, 2], [40] * 4)), ("input_ids",)),
    "turn: length beyond the ids": (turn_number("input_lengths", "UINT32", 3), ("input_lengths is 3", "2 ids")),
    "turn: two counts": (turn(Input("request_output_len", "UINT32", [1, 2], [1, 2])), ("request_output_len has 2",)),
    "turn: id beyond the vocabulary": (turn(ids=(40, 512)), ("512", "vocabulary")),
    "turn: id huge": (turn(ids=(2**32 - 1,)), ("4294967295", "vocabulary")),
    "turn: no token at all": (turn(ids=()), ("no token",)),
    "turn: over-long": (turn(ids=(40,) * 2049), ("failure:  6 ", "2049")),
    "turn: unknown session": (turn(one("START", "INT32", 0)), ("failure:  1 ", "session 77")),
    "turn: START and STOP": (turn(one("STOP", "INT32", 1)), ("failure:  1 ", "STOP")),
    "turn: STOP of an unknown session": (turn(one("START", "INT32", 0), one("STOP", "INT32", 1)), ("failure:  1 ",)),
    "turn: START is 2": (turn_number("START", "INT32", 2), ("START is 2",)),
    "turn: END is negative": (turn_number("END", "INT32", -1), ("END is -1",)),
    "turn: STOP is huge": (turn_number("STOP", "INT32", 2**31 - 1), ("STOP is 2147483647",)),
    "turn: CORRID of 32 bits": (turn_number("CORRID", "UINT32", 1), ("CORRID", "UINT32")),
    "turn: beams": (turn_number("beam_width", "UINT32", 4), ("beam_width is 4",)),
    "turn: embeddings": (turn(Input("input_embeddings", "INT8", [1, 4], [1] * 4)), ("input_embeddings",)),
    "turn: temperature NaN": (turn_number("temperature", "FP32", NAN), ("temperature is nan",)),
    "turn: temperature negative": (turn_number("temperature", "FP32", -1.0), ("temperature is -1.0",)),
    "turn: top_p infinite": (turn_number("runtime_top_p", "FP32", INFINITY), ("runtime_top_p is inf",)),
    "turn: penalty zero": (turn_number("repetition_penalty", "FP32", 0.0), ("repetition_penalty is 0.0",)),
    "turn: penalty huge": (turn_number("repetition_penalty", "FP32", 1e30), ("repetition_penalty is 1",)),
    "turn: words in one row": (word_list("stop_words_list", 5, 1, shape=(1, 1, 2)), ("stop_words_list",)),
    "turn: words of 33 columns": (word_list("bad_words_list", *[5] * 66, shape=(1, 2, 33)), ("bad_words_list", "33", "32")),
    "turn: word offset beyond the ids": (word_list("stop_words_list", 5, 6, 1, 3, shape=(1, 2, 2)), ("stop_words_list", "3")),
    "turn: word offsets that fall": (word_list("stop_words_list", 5, 6, 2, 1, shape=(1, 2, 2)), ("stop_words_list", "1 after 2")),
    "turn: word offset below -1": (word_list("bad_words_list", 5, 6, -2, 2, shape=(1, 2, 2)), ("bad_words_list", "-2")),
    "turn: word id negative": (word_list("bad_words_list", -5, 1, shape=(1, 2, 1)), ("bad_words_list", "-5")),
    "turn: unknown tensor": (turn_number("min_length", "INT32", 1), ("min_length",)),
    "turn: unknown parameter": (turn(num_beams=2), ("num_beams",)),
    "turn: empty shape": (turn(Input("CORRID", "UINT64", [], [1])), ("CORRID",)),
}


def tokens(*inputs: Input) -> Any:
    whole = {
        "TOKENS_BATCH": Input("TOKENS_BATCH", "UINT32", [1, 1, 2], [40, 41]),
        "sequence_length": one("sequence_length", "UINT32", 0),
        "skip_special_tokens": one("skip_special_tokens", "INT32", 1),
    } | {item.name: item for item in inputs}
    return infer_request("postprocessing", list(whole.values()))


def query(*values: bytes, shape: tuple[int, ...] = (1, 1)) -> Any:
    return infer_request("preprocessing", [Input("QUERY", "BYTES", shape, values)])


#: name -> (a unary request, what the error must name); all are INVALID_ARGUMENT
UNARY: dict[str, tuple[Any, tuple[str, ...]]] = {
    "query: not UTF-8": (query(b"\xff"), ("QUERY", "UTF-8")),
    "query: none": (query(shape=(1, 0)), ("QUERY", "empty")),
    "query: huge": (query(b"a" * (8 * 2**20 + 1)), ("QUERY", "8388609")),
    "query: a batch of two": (query(b"a", b"b", shape=(2, 1)), ("batch-size", "preprocessing")),
    "query: no batch dimension": (query(b"a", shape=(1,)), ("QUERY",)),
    "query: wrong type": (infer_request("preprocessing", [Input("QUERY", "UINT32", [1, 1], [1])]), ("QUERY", "UINT32")),
    "query: missing": (infer_request("preprocessing", []), ("preprocessing",)),
    "query: unknown tensor": (
        infer_request("preprocessing", [one("QUERY", "BYTES", b"a"), one("LANGUAGE", "BYTES", b"en")]),
        ("LANGUAGE",),
    ),
    "tokens: offset beyond the ids": (tokens(one("sequence_length", "UINT32", 3)), ("sequence_length is 3", "2 ids")),
    "tokens: offset huge": (tokens(one("sequence_length", "UINT32", 2**32 - 1)), ("sequence_length is 4294967295",)),
    "tokens: two offsets": (tokens(Input("sequence_length", "UINT32", [1, 2], [0, 1])), ("sequence_length has 2",)),
    "tokens: two skip flags": (tokens(Input("skip_special_tokens", "INT32", [1, 2], [0, 1])), ("skip_special_tokens has 2",)),
    "tokens: skip flag of 7": (tokens(one("skip_special_tokens", "INT32", 7)), ("skip_special_tokens is 7",)),
    "tokens: ids of the wrong type": (tokens(Input("TOKENS_BATCH", "INT32", [1, 1, 1], [-1])), ("TOKENS_BATCH", "INT32")),
    "text door without a stream": (text(), ("decoupled",)),
}
