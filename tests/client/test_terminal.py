"""The terminal client as a person uses it: a real pseudo terminal, the fake server behind."""

import contextlib
import os
import subprocess
import sys
import time

import pytest
from tests.client.fake_server import FakeTriton
from tests.client.terminal_driver import CTRL_C, CTRL_D, TerminalProgram

from turbotriton.cli.running_server import held_ports


def start(fake, *options):
    return TerminalProgram(["serve", "triton_client", fake.url, "--cap", "completion", *options])


def run_piped(fake, text, *options, cap="completion"):
    return subprocess.run(
        [sys.executable, "-m", "turbotriton", "serve", "triton_client", fake.url, "--cap", cap, *options],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_question_answer_count_and_speed_then_exit_ends_the_session(fake):
    with start(fake) as terminal:
        terminal.expect(r"fakey at .*session \d+.*/help.*>>> ")
        terminal.type("hello\r")
        terminal.expect(r"echo:HELLO\n\[10 tokens, [\d.]+ tokens/s, first token after [\d.]+ s; sent 6, kept 0 on the server\]")
        terminal.expect(">>> ")
        terminal.type("exit\r")
        assert terminal.wait() == 0
    assert fake.sessions == {}


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(fake):
    with start(fake) as terminal:
        terminal.expect(">>> ")
        fake.hold_after(8)
        terminal.type("x" * 300 + "\r")
        terminal.expect("echo:XXX")
        terminal.type(CTRL_C)
        terminal.expect(r"\[cancelled, 8 tokens.*>>> ")
        fake.go_on()
        terminal.type("again\r")
        terminal.expect(r"\[\d+ tokens.*kept \d\d\d+ on the server\].*>>> ")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
    assert fake.of("turbomind")[-2].inputs["START"].item() == 0


def test_ctrl_c_at_the_prompt_clears_the_line_and_stays(fake):
    with start(fake) as terminal:
        terminal.expect(">>> ")
        terminal.type("half a que")
        terminal.expect("half a que")
        for _ in range(20):  # as a person would, again: CPython's readline loop can miss a signal while it draws a key
            time.sleep(0.3)
            terminal.type(CTRL_C)
            with contextlib.suppress(AssertionError):
                terminal.expect(">>> ", timeout_s=3)
                break
        terminal.type("hello\r")
        terminal.expect("echo:HELLO\n")


def test_end_starts_a_new_conversation(fake):
    with start(fake) as terminal:
        terminal.expect(">>> ")
        terminal.type("one\r")
        terminal.expect("echo:ONE.*>>> ")
        terminal.type("end\r")
        terminal.expect("has ended.*>>> ")
        assert fake.sessions == {}
        terminal.type("two\r")
        terminal.expect(r"kept 0 on the server.*>>> ")


def test_help_and_unknown_commands(fake):
    with start(fake) as terminal:
        terminal.expect(">>> ")
        terminal.type("/help\r")
        terminal.expect("Ctrl-C.*exit.*>>> ")
        terminal.type("/halp\r")
        terminal.expect("No command /halp.*>>> ")
    assert fake.of("turbomind") == []


def test_backslash_continues_a_question(fake):
    with start(fake) as terminal:
        terminal.expect(">>> ")
        terminal.type("one\\\r")
        terminal.expect(r"\.\.\. ")
        terminal.type("two\r")
        terminal.expect("echo:ONE\nTWO")


def test_multiline_sends_at_a_blank_line_and_still_knows_commands(fake):
    with start(fake, "--multiline") as terminal:
        terminal.expect(">>> ")
        terminal.type("one\r")
        terminal.expect(r"\.\.\. ")
        terminal.type("exit\r")  # inside a question it is text
        terminal.expect(r"\.\.\. ")
        terminal.type("\r")
        terminal.expect("echo:ONE\nEXIT.*>>> ")
        terminal.type("/multi\r")
        terminal.expect("Enter sends now.*>>> ")
        terminal.type("exit\r")
        assert terminal.wait() == 0


def test_the_terminal_survives_a_server_that_errs(fake):
    with start(fake) as terminal:
        terminal.expect(">>> ")
        fake.fail_stream_with = "TurboMind execute failure:  3"
        terminal.type("one\r")
        terminal.expect("error: session .* is answering another request.*>>> ")
        terminal.type("two\r")
        terminal.expect("echo:TWO")


def test_text_appears_while_it_is_generated_unless_no_stream(fake):
    for options, is_streaming in (((), True), (("--no-stream",), False)):
        fake.hold_after(6)
        with start(fake, *options) as terminal:
            terminal.expect(">>> ")
            terminal.type("abcdefghijklmnopqrst\r")
            if is_streaming:
                terminal.expect("echo:A")
            else:
                with pytest.raises(AssertionError, match="did not appear"):
                    terminal.expect("echo", timeout_s=2)
            fake.go_on()
            terminal.expect(("" if is_streaming else "echo:A") + "BCDEFGHIJKLMNOPQRST.*tokens/s")


def test_input_that_is_no_terminal_is_one_question_a_line(fake):
    done = run_piped(fake, "one\ntwo\n")
    assert (done.returncode, done.stdout) == (0, "echo:ONE\necho:ONEECHO:ONETWO\n")
    assert "tokens/s" in done.stderr
    assert fake.sessions == {}


def test_chat_renders_the_served_template_and_keeps_the_history_on_the_server(fake):
    done = run_piped(fake, "one\ntwo\n", "--system", "Be brief.", cap="chat")
    assert (done.returncode, done.stdout) == (0, "echo:ONE\necho:TWO\n")
    first, second = fake.of("turbomind")[:2]
    assert first.text == "<s><system>Be brief.<|end|>\n<user>one<|end|>\n<assistant>"
    assert second.text == first.text + "echo:ONE<|end|>\n<user>two<|end|>\n<assistant>"
    assert second.inputs["START"].item() == 0


def test_once_asks_one_question_and_leaves(fake):
    done = run_piped(fake, "", "--once", "what?")
    assert (done.returncode, done.stdout) == (0, "echo:WHAT?\n")
    assert fake.sessions == {}


def test_options_reach_the_server(fake):
    done = run_piped(
        fake,
        "",
        *("--once", "x", "--session-id", "99", "--max-tokens", "3", "--temperature", "0.5", "--top-p", "0.25"),
        *("--top-k", "9", "--repetition-penalty", "1.5", "--seed", "11"),
    )
    assert done.stdout == "ech\n"
    inputs = fake.of("turbomind")[0].inputs
    names = ("CORRID", "request_output_len", "temperature", "runtime_top_p", "runtime_top_k", "repetition_penalty", "random_seed")
    assert [inputs[name].item() for name in names] == [99, 3, 0.5, 0.25, 9, 1.5, 11]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--session-id", "0"), "session id is 0"),
        (("--system", "Be brief."), "--system"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(fake, options, message):
    done = run_piped(fake, "", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_server_that_is_away_is_one_line_and_exit_1():
    with held_ports(1) as (port,):
        with FakeTriton(port=port) as fake:
            pass
        done = run_piped(fake, "hello\n")
    assert done.returncode == 1
    assert f"no tritonserver answers at {fake.url}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_model_without_chat_template_names_the_remedy():
    with FakeTriton(chat_template=None) as fake:
        done = run_piped(fake, "hello\n", cap="chat")
    assert done.returncode == 2
    assert "--cap completion" in done.stderr
