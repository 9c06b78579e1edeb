"""/v1/encode: text to token ids, by the `preprocessing` door of a server behind this one."""

from typing import Any

from turbotriton.client.grpc_stream import AsyncClient
from turbotriton.client.kserve import strings
from turbotriton.text.chat_template import ChatTemplate

from .errors import ApiError
from .fleet import Fleet
from .schema import EncodeRequest

__all__ = ["encode"]


async def encode(fleet: Fleet, request: EncodeRequest) -> dict[str, Any]:
    """{input_ids, length}, lists of both where the input is a list. Raises ApiError, TurbotritonError."""
    client = fleet.any_client()
    texts = [request.input] if isinstance(request.input, str) else request.input
    if not texts or "" in texts:
        raise ApiError(400, "input is empty; send at least one character", param="input")
    if request.do_preprocess:
        template = await _chat_template(client)
        texts = [template.render([{"role": "user", "content": text}]) for text in texts]
    encoded = [await _ids(client, text, request.add_bos) for text in texts]
    if isinstance(request.input, str):
        return {"input_ids": encoded[0], "length": len(encoded[0])}
    return {"input_ids": encoded, "length": [len(ids) for ids in encoded]}


async def _ids(client: AsyncClient, text: str, add_bos: bool) -> list[int]:
    ids = await _tokenize(client, text)
    bos = (await _tokenize(client, "<BOS>"))[0]
    return ids[1:] if not add_bos and ids and ids[0] == bos else ids


async def _tokenize(client: AsyncClient, text: str) -> list[int]:
    outputs = await client.infer("preprocessing", {"QUERY": strings([text]).reshape(1, 1)})
    length = int(outputs["REQUEST_INPUT_LEN"].ravel()[0])
    return [int(token) for token in outputs["INPUT_ID"].reshape(-1)[:length]]


async def _chat_template(client: AsyncClient) -> ChatTemplate:
    parameters = (await client.model_config("turbomind")).parameters
    source = parameters["chat_template"].string_value if "chat_template" in parameters else ""
    if not source:
        raise ApiError(400, "this model has no chat template; leave do_preprocess out", param="do_preprocess")
    return ChatTemplate(source)
