"""One client process of bench_serving.py: streams of its own to a door, started at a given moment; what came when.

    stdin   {"url", "door", "model", "vocab", "lengths": [[prompt, new], ...], "seed", "mine": [index, ...]}, a line each
    stdout  {"ready": true} when the messages are built
    stdin   {"at": monotonic seconds}
    stdout  {"records": [[index, first_s, last_s, num_tokens, num_responses], ...], "cpu_s", "wall_s"}, times since `at`

The prompts are those of bench_engine.py: every process draws all and sends its share.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from turbotriton.client.kserve import build_request, channel_options, make_stub, read_values
from turbotriton.client.text_door import build_generate_request, read_delta

__all__ = ["draw_prompts"]

FIRST_ID = 3  # below it are special tokens


def draw_prompts(lengths: Sequence[Sequence[int]], vocab: int, seed: int) -> list[list[int]]:
    """As bench_engine.run draws them."""
    draw = random.Random(seed)
    return [draw.choices(range(FIRST_ID, vocab), k=prompt) for prompt, _ in lengths]


def text_message(model: str, index: int, prompt: list[int], new: int) -> Any:
    sampling = {"max_tokens": new, "temperature": 0.0, "ignore_eos": True}
    return build_generate_request(model, None, None, prompt, stream=True, request_id=str(index), sampling=sampling)


def turbomind_message(model: str, index: int, prompt: list[int], new: int) -> Any:
    def one(value: int, dtype: type[np.generic]) -> Any:
        return np.array([[value]], dtype=dtype)

    tensors = {
        "input_ids": np.array([prompt], dtype=np.uint32),
        "input_lengths": one(len(prompt), np.uint32),
        "request_output_len": one(new, np.uint32),
        "runtime_top_k": one(1, np.uint32),
        "START": one(1, np.int32),
        "END": one(1, np.int32),
        "CORRID": one(index + 1, np.uint64),
        "STOP": one(0, np.int32),
    }
    return build_request(model, tensors, request_id=str(index))


def count_text(response: service_pb2.ModelStreamInferResponse, _prompt: int) -> int:
    """Tokens of the answer so far; -1 where a response has none."""
    delta = read_delta(response)
    return -1 if delta is None else delta.num_output_tokens


def count_turbomind(response: service_pb2.ModelStreamInferResponse, prompt: int) -> int:
    if response.error_message:
        raise RuntimeError(response.error_message)
    values = read_values(response.infer_response)
    return int(values["sequence_length"][0]) - prompt if values else -1


MESSAGES = {"text": text_message, "turbomind": turbomind_message}
COUNTS = {"text": count_text, "turbomind": count_turbomind}


async def stream(stub: Any, message: Any, count: Any, prompt: int, index: int, at: float) -> list[float]:
    first, last, tokens, responses = 0.0, 0.0, 0, 0
    call = stub.ModelStreamInfer(iter([message]))
    while (response := await call.read()) is not grpc.aio.EOF:
        found = count(response, prompt)
        if found <= tokens:
            continue
        last = time.monotonic() - at
        first = first or last
        tokens, responses = found, responses + 1
    return [index, first, last, tokens, responses]


async def load(stub: Any, order: dict[str, Any]) -> dict[str, Any]:
    prompts = draw_prompts(order["lengths"], order["vocab"], order["seed"])
    make, count = MESSAGES[order["door"]], COUNTS[order["door"]]
    mine = [(index, make(order["model"], index, prompts[index], order["lengths"][index][1])) for index in order["mine"]]
    print('{"ready": true}', flush=True)
    at = float(json.loads(await asyncio.to_thread(sys.stdin.readline))["at"])
    await asyncio.sleep(max(0.0, at - time.monotonic()))
    cpu, begun = time.process_time(), time.monotonic()
    streams = [stream(stub, message, count, order["lengths"][index][0], index, at) for index, message in mine]
    records = await asyncio.gather(*streams)
    return {"records": records, "cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - begun}


async def serve() -> None:
    channel, url = None, None
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        if url != order["url"]:
            url = order["url"]
            channel = grpc.aio.insecure_channel(url, options=channel_options(url))
        try:
            answer = await load(make_stub(channel), order)
        except Exception as error:  # noqa: BLE001  the parent says it, and calls the run void
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    if channel is not None:
        await channel.close()


if __name__ == "__main__":
    asyncio.run(serve())
