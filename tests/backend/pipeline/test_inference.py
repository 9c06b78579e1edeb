"""What a pipeline answers: one prompt, many, streamed, with asyncio; LMDeploy's calls run as its tutorial has them."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.backend.pipeline.fake_model import QuickRunner, answer_to, fake_pipeline

import turbotriton
from turbotriton import GenerationConfig, Pipeline, Response
from turbotriton.contract.errors import ConfigError, EngineDiedError, InvalidInputError

GREEDY = GenerationConfig(top_k=1, max_new_tokens=32)
QUESTION = "What is 2 + 3?"


def tokens(count: int, **fields: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=count, ignore_eos=True, **fields)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def runner() -> QuickRunner:
    return QuickRunner(num_blocks=512, block_size=4)


@pytest.fixture
def fake(runner: QuickRunner) -> Iterator[Pipeline]:
    with fake_pipeline(runner) as made:
        yield made


# -- the bundled model ------------------------------------------------------------------------------------------------


def test_one_question_gets_one_response(pipe: Pipeline) -> None:
    response = pipe(QUESTION, gen_config=GREEDY)
    assert isinstance(response, Response)
    assert "5" in response.text
    assert response.finish_reason == "stop"
    assert response.generate_token_len == len(response.token_ids)
    assert pipe.model.tokenizer.decode(response.token_ids) == response.text
    assert response.input_token_len == len(pipe.model.prompt_format.encode_prompt(QUESTION))


def test_a_text_is_a_conversation_of_one_message(pipe: Pipeline) -> None:
    one = pipe(QUESTION, gen_config=GREEDY)
    conversation = pipe([{"role": "user", "content": QUESTION}], gen_config=GREEDY)
    assert isinstance(conversation, Response)
    assert conversation == one


def test_without_do_preprocess_the_text_goes_as_it_is(pipe: Pipeline) -> None:
    raw = pipe("<|im_start|>user\n" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n", gen_config=GREEDY, do_preprocess=False)
    assert raw == pipe(QUESTION, gen_config=GREEDY)


def test_a_turn_knows_those_before_it(pipe: Pipeline) -> None:
    session = pipe.chat("What is 2 + 3?", gen_config=GREEDY)
    assert session.response is not None
    first = session.response.text
    session = pipe.chat("Spell cat.", session=session, gen_config=GREEDY)
    assert [question for question, _ in session.history] == ["What is 2 + 3?", "Spell cat."]
    messages = [
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Spell cat."},
    ]
    assert session.response == pipe(messages, gen_config=GREEDY)
    session.close()
    with pytest.raises(InvalidInputError, match="closed"):
        pipe.chat("again", session=session)


def test_logprobs_name_the_drawn_token(pipe: Pipeline) -> None:
    response = pipe(QUESTION, gen_config=GenerationConfig(top_k=1, max_new_tokens=4, logprobs=2))
    assert isinstance(response, Response)
    assert response.logprobs is not None
    for token_id, step in zip(response.token_ids, response.logprobs, strict=True):
        assert max(step, key=lambda key: step[key]) == token_id
        assert len(step) == 2


# -- the fake model: every answer is known ----------------------------------------------------------------------------


def test_a_batch_answers_in_the_prompts_order(fake: Pipeline) -> None:
    prompts = [f"w{i} w{i + 1}" for i in range(30)]
    responses = fake(prompts, gen_config=[tokens(1 + i % 7) for i in range(30)])
    assert isinstance(responses, list)
    assert [response.session_id for response in responses] == list(range(30))
    assert [response.text for response in responses] == [answer_to(prompt, 1 + i % 7) for i, prompt in enumerate(prompts)]
    assert {response.finish_reason for response in responses} == {"length"}


def test_one_element_lists_answer_as_lists_and_empty_ones_too(fake: Pipeline) -> None:
    assert isinstance(fake(["w1"], gen_config=tokens(1)), list)
    assert fake([], gen_config=tokens(1)) == []


def test_streamed_deltas_join_to_the_whole_answers(fake: Pipeline) -> None:
    texts = ["", "", ""]
    ended = []
    for delta in fake.stream_infer(["w1", "w2", "w3"], tokens(6)):
        texts[delta.session_id] += delta.text
        if delta.finish_reason is not None:
            ended.append((delta.session_id, delta.generate_token_len))
    assert texts == [answer_to(f"w{i}", 6) for i in (1, 2, 3)]
    assert sorted(ended) == [(0, 6), (1, 6), (2, 6)]


def test_ten_thousand_prompts_of_an_iterator_keep_the_engine_full_and_memory_bounded() -> None:
    batch, count, length = 128, 10_000, 8
    runner = QuickRunner(4096, 16)
    read = done = most_open = 0

    def prompts() -> Iterator[str]:
        nonlocal read, most_open
        for i in range(count):
            read += 1
            most_open = max(most_open, read - done)
            yield f"w{i % 900} w{i // 900}"

    def wait_for_a_batch() -> None:
        """Only a pipeline that feeds ahead of its answers gets past this; without it a busy machine would starve the feeding thread."""
        wait_until(lambda: read >= min(count, sum(runner.rows_of_steps) // length + batch))

    runner.before_step = wait_for_a_batch
    with fake_pipeline(runner, max_batch_size=batch) as fake:
        for response in fake.iter_infer(prompts(), tokens(length)):
            done += 1
            assert response.generate_token_len == length
    assert done == count
    assert most_open <= 2 * batch + 1
    fewest_steps = count * length / batch
    assert len(runner.rows_of_steps) < 1.15 * fewest_steps


def test_a_stop_word_ends_the_answer_before_it_and_the_engine_forgets_the_request(fake: Pipeline) -> None:
    words = answer_to("w7", 40).split()
    response = fake("w7", gen_config=tokens(40, stop_words=[" ".join(words[4:6])]))
    assert isinstance(response, Response)
    assert response.text == " ".join(words[:4]) + " "
    assert response.finish_reason == "stop"
    wait_until(lambda: fake.model.engine.stats.num_running == 0)


def test_leaving_a_stream_cancels_what_is_in_flight(runner: QuickRunner, fake: Pipeline) -> None:
    runner.step_s = 0.01
    stream = fake.stream_infer((f"w{i}" for i in itertools.count()), tokens(50))
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    window = 2 * fake.model.engine.info.max_batch_size
    wait_until(lambda: fake.model.engine.stats.requests_total.get("cancelled") == window)
    assert not fake.model.engine._sinks
    steps = len(runner.rows_of_steps)
    time.sleep(0.05)
    assert sum(runner.rows_of_steps[steps:]) == 0


def test_a_prompt_that_leaves_no_room_is_answered_empty_and_the_others_run(fake: Pipeline) -> None:
    responses = fake([" ".join(["w1"] * 64), "w2"], gen_config=tokens(3))
    assert isinstance(responses, list)
    assert responses[0] == Response("", 0, 64, 0, "length")
    assert responses[1].text == answer_to("w2", 3)


def test_threads_share_a_pipeline(fake: Pipeline) -> None:
    found: dict[int, object] = {}

    def ask(i: int) -> None:
        found[i] = fake([f"w{i}", f"w{i + 10}"], gen_config=tokens(5))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(6):
        assert [response.text for response in found[i]] == [answer_to(f"w{i}", 5), answer_to(f"w{i + 10}", 5)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (3, {}, "prompts is a int"),
        ([3], {}, r"prompts\[0\] is a int"),
        ([("text", "image")], {}, "images"),
        (["w1", ""], {}, r"prompts\[1\] is empty"),
        ([{"role": "nobody", "content": "x"}], {}, "role is 'nobody'"),
        ("w1", {"adapter_name": "x"}, "adapter_name is 'x'"),
        ("w1", {"top_p": 1.5}, "top_p is 1.5"),
        ([{"role": "user", "content": "w1"}], {"do_preprocess": False}, "do_preprocess is False"),
        (["w1", "w2"], {"gen_config": [GREEDY]}, "gen_config has 1 entries"),
    ],
)
def test_wrong_calls_are_refused_by_name_and_the_pipeline_goes_on(
    fake: Pipeline, prompts: Any, options: Any, message: str
) -> None:
    with pytest.raises((InvalidInputError, ConfigError), match=message):
        fake(prompts, **options)
    answer = fake("w5", gen_config=tokens(2))
    assert isinstance(answer, Response)
    assert answer.text == answer_to("w5", 2)


def test_an_engine_that_fails_ends_the_call_and_those_after_it(runner: QuickRunner, fake: Pipeline) -> None:
    def break_down() -> None:
        raise RuntimeError("the device is gone")

    runner.before_step = break_down
    for _ in range(2):
        with pytest.raises(EngineDiedError, match="internal error"):
            fake("w1", gen_config=tokens(2))


def test_a_closed_pipeline_says_so(runner: QuickRunner) -> None:
    with fake_pipeline(runner) as fake:
        pass
    fake.close()
    with pytest.raises(EngineDiedError, match="closed"):
        fake("w1", gen_config=tokens(2))


def test_a_session_keeps_a_cancelled_answer_as_far_as_it_came(runner: QuickRunner, fake: Pipeline) -> None:
    runner.step_s = 0.05
    session = fake.session()
    pieces = []
    for delta in session.ask("w1", tokens(60)):
        pieces.append(delta.text)
        if len(pieces) == 3:
            session.cancel()
    assert session.is_cancelled
    (turn,) = session.history
    assert turn == ("w1", "".join(pieces))
    assert answer_to("w1", 60).startswith(turn[1])
    assert len(turn[1].split()) < 60


# -- asyncio ----------------------------------------------------------------------------------------------------------


def test_async_calls_answer_as_the_others_do(fake: Pipeline) -> None:
    async def run() -> tuple[Any, str, list[Response]]:
        batch = await fake.async_infer(["w1", "w2"], tokens(4))
        streamed = "".join([delta.text async for delta in fake.async_stream_infer("w3", tokens(4))])
        whole = [response async for response in fake.generate("w4", 9, tokens(4), stream_response=False)]
        return batch, streamed, whole

    batch, streamed, whole = asyncio.run(run())
    assert [response.text for response in batch] == [answer_to("w1", 4), answer_to("w2", 4)]
    assert streamed == answer_to("w3", 4)
    assert [(response.text, response.session_id) for response in whole] == [(answer_to("w4", 4), 9)]


def test_many_coroutines_share_a_pipeline(fake: Pipeline) -> None:
    async def run() -> list[Any]:
        return await asyncio.gather(*(fake.async_infer(f"w{i}", tokens(5)) for i in range(40)))

    assert [response.text for response in asyncio.run(run())] == [answer_to(f"w{i}", 5) for i in range(40)]


def test_cancelling_the_task_cancels_its_requests(runner: QuickRunner, fake: Pipeline) -> None:
    runner.step_s = 0.05

    async def run() -> None:
        task = asyncio.create_task(fake.async_infer([f"w{i}" for i in range(8)], tokens(60)))
        while not runner.rows_of_steps:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    wait_until(lambda: not fake.model.engine._sinks)


def test_importing_the_package_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, turbotriton; turbotriton.__version__; print(sorted({'torch', 'tokenizers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert set(turbotriton.__all__) >= {"pipeline", "GenerationConfig", "TurbomindEngineConfig", "PytorchEngineConfig"}
