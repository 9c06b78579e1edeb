"""ChatSession and the LMDeploy doors' messages against the fake server."""

import threading
import time

import jinja2
import pytest
from tests.client.fake_server import CHAT_TEMPLATE, END, FakeTriton, decode, encode

from turbotriton.client.session import ChatSession
from turbotriton.client.turbomind_door import ChatSampling, TurbomindDoor
from turbotriton.contract.errors import InvalidInputError, ServerError, UnavailableError


def render(messages):
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    return template.render(messages=messages, bos_token="<s>", add_generation_prompt=True)


def make_session(fake, *, session_id=7, render=render, **options):
    door = TurbomindDoor(fake.url)
    return ChatSession(door, door.served_model(), session_id, render=render, **options)


def ask(session, question):
    return "".join(session.ask(question))


def test_served_model_tells_name_template_and_special_tokens(fake):
    model = TurbomindDoor(fake.url).served_model()
    assert model == ("fakey", CHAT_TEMPLATE, 1, "<s>", 2, "</s>")


def test_inputs_travel_in_lmdeploys_order_types_and_shapes(fake):
    session = make_session(fake, sampling=ChatSampling(seed=5))
    ask(session, "hi")
    seen = fake.of("turbomind")[0]
    assert [(name, tensor.dtype.name) for name, tensor in seen.inputs.items()] == [
        ("input_ids", "uint32"),
        ("input_lengths", "uint32"),
        ("request_output_len", "uint32"),
        ("runtime_top_p", "float32"),
        ("temperature", "float32"),
        ("repetition_penalty", "float32"),
        ("step", "int32"),
        ("runtime_top_k", "uint32"),
        ("START", "int32"),
        ("END", "int32"),
        ("CORRID", "uint64"),
        ("STOP", "int32"),
        ("random_seed", "uint64"),
    ]
    assert seen.id == "7-1"
    assert seen.parameters == {"sequence_id": 7, "sequence_start": True, "sequence_end": False}


def test_second_turn_sends_only_what_the_session_lacks(fake):
    session = make_session(fake)
    assert ask(session, "one") == "echo:ONE"
    assert ask(session, "two") == "echo:TWO"
    first, second = fake.of("turbomind")
    prompt = "<s><user>one<|end|>\n<assistant>"
    assert first.text == prompt
    assert second.inputs["step"].item() == len(encode(prompt + "echo:ONE", add_bos=False))  # EOS is not kept
    assert decode(second.inputs["input_ids"][0], skip_special_tokens=False) == "<|end|>\n<user>two<|end|>\n<assistant>"
    assert second.text == render([*session.messages[:2], {"role": "user", "content": "two"}])
    assert second.inputs["START"].item() == 0
    assert session.last_turn.num_kept_tokens == second.inputs["step"].item()


def test_bos_is_sent_once_and_never_inside_the_conversation(fake):
    session = make_session(fake)
    ask(session, "one")
    ask(session, "two")
    first, second = (seen.inputs["input_ids"][0].tolist() for seen in fake.of("turbomind"))
    assert first[0] == 1
    assert first.count(1) == 1
    assert second.count(1) == 0
    assert second[0] == END


def test_a_template_without_bos_sends_none_although_preprocessing_adds_it(fake):
    session = make_session(fake, render=lambda messages: messages[-1]["content"])
    ask(session, "one")
    assert 1 not in fake.of("turbomind")[0].inputs["input_ids"]


def test_a_tokenizer_without_bos_works():
    with FakeTriton(has_bos=False) as fake:
        session = make_session(fake, render=None)
        assert ask(session, "one") == "echo:ONE"
        session.end()


def test_a_template_that_rewrites_history_starts_the_session_again(fake):
    session = make_session(fake, render=lambda messages: f"{len(messages)}<user>{messages[-1]['content']}<|end|>")
    ask(session, "one")
    assert ask(session, "two") == "echo:TWO"
    assert fake.of("turbomind")[1].inputs["START"].item() == 1
    assert fake.of("turbomind")[1].inputs["step"].item() == 0


def test_a_session_that_the_server_lost_is_started_again_with_the_whole_history(fake):
    session = make_session(fake)
    ask(session, "one")
    fake.sessions.clear()
    assert ask(session, "two") == "echo:TWO"
    lost, again = fake.of("turbomind")[1:]
    assert (lost.inputs["START"].item(), again.inputs["START"].item()) == (0, 1)
    assert "echo:ONE" in again.text


def test_completion_sends_the_raw_text_and_continues_it(fake):
    session = make_session(fake, render=None, sampling=ChatSampling(max_tokens=4))
    assert ask(session, "one") == "echo"
    ask(session, " more")
    assert [seen.text for seen in fake.of("turbomind")] == ["<s>one", "<s>oneecho more"]


def test_pieces_are_whole_characters(fake):
    session = make_session(fake)
    pieces = list(session.ask("naïve 日本 🙂"))
    assert "".join(pieces) == "echo:NAÏVE 日本 🙂"
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_answer_cut_inside_a_character_keeps_only_whole_ones_on_the_server(fake):
    session = make_session(fake, sampling=ChatSampling(max_tokens=6))
    assert ask(session, "日本").startswith("echo:")
    kept = len(encode("<s><user>日本<|end|>\n<assistant>echo:", add_bos=False))
    ask(session, "x")
    assert fake.of("turbomind")[1].inputs["START"].item() == 0
    assert fake.of("turbomind")[1].inputs["step"].item() == kept


def test_cancel_goes_over_a_second_stream_and_the_conversation_goes_on(fake):
    fake.hold_after(8)
    session = make_session(fake)
    pieces = session.ask("x" * 200)
    text = next(pieces)
    while len(text) < 8:
        text += next(pieces)
    threading.Thread(target=session.cancel).start()
    text += "".join(pieces)
    assert text == "echo:XXX"
    assert session.last_turn.is_cancelled
    stop = next(seen for seen in fake.of("turbomind") if seen.inputs["STOP"].item())
    assert stop.inputs["input_ids"].shape == (1, 0)
    assert stop.id == "7-1"
    assert session.messages[-1] == {"role": "assistant", "content": text}
    fake.go_on()
    assert ask(session, "next") == "echo:NEXT"
    last = fake.of("turbomind")[-1]
    assert last.inputs["START"].item() == 0
    assert text in last.text


def test_cancel_without_a_running_answer_sends_nothing(fake):
    session = make_session(fake)
    ask(session, "one")
    num_seen = len(fake.seen)
    session.cancel()
    assert len(fake.seen) == num_seen


def test_end_frees_the_session_and_the_next_question_starts_a_new_one(fake):
    session = make_session(fake, system="Be brief.")
    ask(session, "one")
    assert fake.of("turbomind")[0].text.startswith("<s><system>Be brief.<|end|>")
    session.end()
    assert fake.sessions == {}
    ask(session, "two")
    assert "one" not in fake.of("turbomind")[-1].text
    assert "Be brief." in fake.of("turbomind")[-1].text


def test_after_an_error_the_conversation_is_as_before(fake):
    session = make_session(fake)
    ask(session, "one")
    fake.fail_stream_with = "TurboMind execute failure:  3"
    with pytest.raises(UnavailableError, match="another --session-id"):
        ask(session, "two")
    assert len(session.messages) == 2
    assert ask(session, "three") == "echo:THREE"
    assert "two" not in fake.of("turbomind")[-1].text


@pytest.mark.parametrize(("code", "error", "message"), [(6, InvalidInputError, "session_len"), (5, ServerError, "failure:  5")])
def test_lmdeploys_error_codes_are_explained(fake, code, error, message):
    fake.fail_stream_with = f"TurboMind execute failure:  {code}"
    with pytest.raises(error, match=message):
        ask(make_session(fake), "x")


def test_sixty_three_bit_session_ids_arrive_whole(fake):
    ask(make_session(fake, session_id=2**63 - 1), "x")
    assert fake.of("turbomind")[0].inputs["CORRID"].item() == 2**63 - 1


@pytest.mark.parametrize("session_id", [0, -1, 2**63])
def test_session_ids_out_of_range_are_refused(fake, session_id):
    with pytest.raises(InvalidInputError, match="session id"):
        make_session(fake, session_id=session_id)


def test_stats_count_time_and_tokens(fake):
    fake.token_delay_s = 0.01
    session = make_session(fake)
    before = time.monotonic()
    ask(session, "hello")
    stats = session.last_turn
    assert stats.num_output_tokens == len("echo:HELLO")
    assert 0 < stats.first_token_s < stats.total_s <= time.monotonic() - before
    assert 0 < stats.tokens_per_s < 150


def test_no_turbomind_model_is_explained():
    with FakeTriton(models=("chatty",)) as fake, pytest.raises(InvalidInputError, match="--doors text"):
        TurbomindDoor(fake.url).served_model()
