"""The terminal client on a pseudo terminal, against a real tritonserver over the LMDeploy doors."""

import os
import re
import subprocess
import sys

import pytest
from tests.client.terminal_driver import CTRL_C, CTRL_D, TerminalProgram
from tests.throttle import throttled

from turbotriton.client import Client

from .engine import PATIENCE_S, cancelling, wait_until
from .metrics import metric, settled, wait_idle
from .processes import LONG_STORY, engine_pid
from .server import TritonServer

pytestmark = pytest.mark.e2e

STATS = r"\[(?:cancelled, )?(\d+) tokens, [\d.]+ tokens/s.*?sent (\d+), kept (\d+) on the server\]"
#: Longer than one KV block (64 tokens) with any tokenizer.
LONG_QUESTION = "Please add the following numbers for me, one after the other, and tell me the sum of them all: " + " + ".join(
    str(number) for number in range(1, 50)
)


def start(server: TritonServer, *options: str) -> TerminalProgram:
    return TerminalProgram(["serve", "triton_client", server.grpc_url, *options])


def test_the_terminals_greedy_answer_equals_the_text_doors(demo_server: TritonServer) -> None:
    question = "Count from 1 to 5."
    with Client(demo_server.grpc_url) as client:
        expected = client.generate(messages=[{"role": "user", "content": question}], max_tokens=64, temperature=0).text
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "turbotriton",
            "serve",
            "triton_client",
            demo_server.grpc_url,
            "--once",
            question,
            "--max-tokens",
            "64",
        ],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + "\n"
    assert re.search(STATS, done.stderr)


def test_second_turn_computes_only_what_follows_the_last_full_block(demo_server: TritonServer) -> None:
    block_size = 64
    with start(demo_server, "--max-tokens", "40") as terminal:
        terminal.expect(">>> ")
        terminal.type(LONG_QUESTION + "\r")
        terminal.expect(STATS)
        terminal.expect(">>> ")
        prompt = settled(demo_server, "turbotriton_prompt_tokens_total")
        hits = settled(demo_server, "turbotriton_prefix_cache_hit_tokens_total")
        terminal.type("And once more?\r")
        sent, kept = (int(number) for number in terminal.expect(STATS).groups()[1:])
        terminal.expect(">>> ")
        assert kept > block_size
        assert 0 < sent < kept
        new_prompt = settled(demo_server, "turbotriton_prompt_tokens_total") - prompt
        new_hits = settled(demo_server, "turbotriton_prefix_cache_hit_tokens_total") - hits
        assert new_prompt == kept + sent
        assert kept - new_hits <= block_size  # the last kept token may be a block's last and not yet computed
        assert new_hits % block_size == 0
        terminal.type("exit\r")
        assert terminal.wait() == 0
    wait_idle(demo_server)


def test_ctrl_c_stops_the_answer_at_the_engine_and_the_conversation_goes_on(demo_server: TritonServer) -> None:
    with start(demo_server) as terminal:
        terminal.expect(">>> ")
        for _ in range(2):
            with cancelling(demo_server), throttled(engine_pid(demo_server)):
                terminal.type(LONG_STORY + "\r")
                wait_until(lambda: metric(demo_server, "turbotriton_requests_running") == 1, "the answer running")
                terminal.type(CTRL_C)
                kept = int(terminal.expect(r"\[cancelled, .* kept (\d+) on the server\]").group(1))
            wait_idle(demo_server)
            terminal.expect(">>> ")
        assert kept > 0
        terminal.type(CTRL_D)
        assert terminal.wait() == 0


def test_end_forgets_the_conversation_on_the_server(demo_server: TritonServer) -> None:
    with start(demo_server, "--max-tokens", "8", "--session-id", "4242") as terminal:
        terminal.expect(">>> ")
        terminal.type("Hello\r")
        terminal.expect(STATS)
        terminal.expect(">>> ")
        terminal.type("end\r")
        terminal.expect("has ended.*>>> ")
        terminal.type("Hello\r")
        assert terminal.expect(STATS).group(3) == "0"


def test_piped_questions_share_one_conversation(demo_server: TritonServer) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "turbotriton", "serve", "triton_client", demo_server.grpc_url, "--max-tokens", "16"],
        input="Hello\nCount from 1 to 3.\n",
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    kept = [int(found[2]) for found in re.findall(STATS, done.stderr)]
    assert kept[0] == 0
    assert kept[1] > 0
