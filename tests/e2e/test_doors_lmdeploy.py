"""The LMDeploy doors as LMDeploy's own client speaks to them: raw protobuf messages, its input order, half-closed streams."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from tests.throttle import in_parts, throttled
from tritonclient.grpc import service_pb2

from .engine import PATIENCE_S, cancelling
from .metrics import metric, settled, wait_idle
from .processes import engine_pid
from .raw_grpc import TIMEOUT_S, Input, RawServer, Stream, infer_request, outputs_of
from .server import TritonServer

pytestmark = pytest.mark.e2e

PROMPT = "<|im_start|>user\nCount from 1 to 5.<|im_end|>\n<|im_start|>assistant\n"
SESSION_LEN = 2048


def turn(
    session_id: int,
    ids: Sequence[int],
    num_new_tokens: int,
    *,
    step: int = 0,
    start: bool = False,
    end: bool = False,
    stop: bool = False,
    seed: int | None = None,
    top_k: int | None = 1,
    temperature: float = 0.8,
    stop_words: Sequence[Sequence[int]] = (),
    bad_words: Sequence[Sequence[int]] = (),
    request_id: str = "1-1",
) -> Any:
    """One request as LMDeploy's client lists it."""

    def one(name: str, datatype: str, value: Any) -> Input:
        return Input(name, datatype, [1, 1], [value])

    inputs = [
        Input("input_ids", "UINT32", [1, len(ids)], ids),
        one("input_lengths", "UINT32", len(ids)),
        one("request_output_len", "UINT32", num_new_tokens),
        one("runtime_top_p", "FP32", 1.0),
        one("temperature", "FP32", temperature),
        one("repetition_penalty", "FP32", 1.0),
        one("step", "INT32", step),
    ]
    if top_k is not None:
        inputs.append(one("runtime_top_k", "UINT32", top_k))
    inputs += [words(name, listed) for name, listed in (("stop_words_list", stop_words), ("bad_words_list", bad_words)) if listed]
    inputs += [
        one("session_len", "UINT32", SESSION_LEN),
        one("START", "INT32", int(start)),
        one("END", "INT32", int(end)),
        one("CORRID", "UINT64", session_id),
        one("STOP", "INT32", int(stop)),
    ]
    if start:
        inputs.append(one("random_seed", "UINT64", 7 if seed is None else seed))
    named = {"sequence_id": session_id} if 0 < session_id < 2**63 else {}
    return infer_request("turbomind", inputs, request_id, **named, sequence_start=start, sequence_end=end)


def words(name: str, listed: Sequence[Sequence[int]]) -> Input:
    """[1, 2, n]: all ids one after the other; where each word ends, padded with -1."""
    ids = [token_id for word in listed for token_id in word]
    ends = [sum(map(len, listed[: i + 1])) for i in range(len(listed))]
    return Input(name, "INT32", [1, 2, len(ids)], [*ids, *ends, *[-1] * (len(ids) - len(ends))])


@dataclass(frozen=True)
class Answer:
    """sequences: the whole sequence at each response."""

    sequences: list[list[int]]

    @property
    def ids(self) -> list[int]:
        return self.sequences[-1]


def read(stream: Stream) -> Answer:
    """Until the server closes; every response is cumulative and well-formed."""
    sequences: list[list[int]] = []
    for response in stream:
        assert not response.error_message, response.error_message
        outputs = outputs_of(response.infer_response)
        if not outputs:
            continue  # tritonserver's empty last response
        output_ids, length = outputs["output_ids"], outputs["sequence_length"]
        assert output_ids.shape[:2] == [1, 1]
        assert length.shape == [1, 1]
        sequence = output_ids.values[: length.values[0]]
        assert len(sequence) == length.values[0]
        if sequences:
            assert sequence[: len(sequences[-1])] == sequences[-1]
        sequences.append(sequence)
    assert sequences, "the stream ended without a response"
    return Answer(sequences)


class Doors:
    def __init__(self, raw: RawServer) -> None:
        self.raw = raw
        self.bos = self.encode("<BOS>")[0]
        self.eos = self.encode("<EOS>")[0]
        self.prompt = self.encode(PROMPT)

    def encode(self, text: str) -> list[int]:
        outputs = self.raw.infer("preprocessing", Input("QUERY", "BYTES", [1, 1], [text.encode()]))
        (length,) = outputs["REQUEST_INPUT_LEN"].values
        assert outputs["REQUEST_INPUT_LEN"].shape == [1, 1]
        assert outputs["INPUT_ID"].shape == [1, length]
        return outputs["INPUT_ID"].values

    def decode(self, ids: Sequence[int], offset: int = 0, *, skip_special_tokens: bool = True) -> str:
        outputs = self.raw.infer(
            "postprocessing",
            Input("TOKENS_BATCH", "UINT32", [1, 1, len(ids)], ids),
            Input("sequence_length", "UINT32", [1, 1], [offset]),
            Input("skip_special_tokens", "INT32", [1, 1], [int(skip_special_tokens)]),
        )
        assert outputs["OUTPUT"].shape == [1]
        return bytes(outputs["OUTPUT"].values[0]).decode()

    def ask(self, *args: Any, **kwargs: Any) -> list[int]:
        return read(self.raw.stream(turn(*args, **kwargs))).ids

    def error(self, *args: Any, **kwargs: Any) -> str:
        return self.raw.refusal(turn(*args, **kwargs))

    def end(self, session_id: int) -> None:
        """As the client ends a session."""
        self.ask(session_id, [1], 0, end=True, request_id="")


@pytest.fixture(scope="module")
def doors(demo_server: TritonServer) -> Iterator[Doors]:
    with RawServer(demo_server.grpc_url) as raw:
        yield Doors(raw)
    wait_idle(demo_server)


def code(number: int) -> str:
    return f"TurboMind execute failure:  {number} "


def test_model_config_names_the_template(doors: Doors) -> None:
    config = doors.raw.stub.ModelConfig(service_pb2.ModelConfigRequest(name="turbomind"), timeout=TIMEOUT_S).config
    assert config.parameters["model_name"].string_value == "demo"
    assert config.max_batch_size == 1
    assert config.model_transaction_policy.decoupled


def test_special_queries_give_the_ids_and_the_empty_text_gives_one(doors: Doors) -> None:
    assert (doors.bos, doors.eos) == (0, 2)
    assert len(doors.encode("<BOS>")) == 1
    assert len(doors.encode("")) >= 1
    assert doors.decode([doors.eos], skip_special_tokens=False) == "<|im_end|>"
    assert doors.decode([doors.eos]) == ""


def test_text_survives_both_tokenizer_doors_also_from_an_offset(doors: Doors) -> None:
    text = "How do you spell 'cherry'? äöü 😀"
    ids = doors.encode(text)
    assert doors.decode(ids) == text
    half = doors.decode(ids, 4)
    assert doors.decode(ids[:4]) + half == text


def test_a_turn_streams_the_cumulative_sequence_until_eos_and_then_closes(doors: Doors, demo_server: TritonServer) -> None:
    sequences = in_parts(
        engine_pid(demo_server), lambda: read(doors.raw.stream(turn(1, doors.prompt, 200, start=True))).sequences
    )
    answer = Answer(sequences)
    assert answer.ids[: len(doors.prompt)] == doors.prompt
    assert answer.ids[-1] == doors.eos
    assert "1 2 3 4 5" in doors.decode(answer.ids, len(doors.prompt)).replace(",", "")
    doors.end(1)


@pytest.mark.parametrize("count", [1, 2, 33])
def test_exactly_the_asked_number_of_tokens_is_made_when_eos_is_banned(doors: Doors, count: int) -> None:
    ids = doors.ask(2, doors.prompt, count, start=True, end=True, bad_words=[[doors.eos]])
    assert len(ids) == len(doors.prompt) + count
    assert doors.eos not in ids[len(doors.prompt) :]


def test_no_token_asked_prefills_and_answers_with_the_length(doors: Doors, demo_server: TritonServer) -> None:
    before = settled(demo_server, "turbotriton_generation_tokens_total")
    answer = read(doors.raw.stream(turn(3, doors.prompt, 0, start=True)))
    assert answer.sequences == [doors.prompt]
    assert settled(demo_server, "turbotriton_generation_tokens_total") == before
    assert len(doors.ask(3, [], 4, step=len(doors.prompt))) == len(doors.prompt) + 4
    doors.end(3)


def test_a_stop_word_of_two_tokens_ends_the_answer_and_stays_in_it(doors: Doors) -> None:
    free = doors.ask(4, doors.prompt, 12, start=True, end=True, bad_words=[[doors.eos]])
    made = free[len(doors.prompt) :]
    assert len(set(made)) >= 6
    stopped = doors.ask(4, doors.prompt, 12, start=True, end=True, stop_words=[[400, 401, 402], made[3:5]])
    assert stopped == free[: len(doors.prompt) + 5]


def test_step_drops_the_final_eos_before_the_next_turn(doors: Doors) -> None:
    first = doors.ask(5, doors.prompt, 200, start=True)
    assert first[-1] == doors.eos
    step = len(first) - 1
    more = doors.encode("<|im_end|>\n<|im_start|>user\nCount from 2 to 6.<|im_end|>\n<|im_start|>assistant\n")
    second = doors.ask(5, more, 200, step=step)
    assert second[: step + len(more)] == first[:step] + more
    assert doors.ask(6, first[:step] + more, 200, start=True, end=True) == second, "server history equals the whole prompt"
    doors.end(5)


def test_a_step_beyond_the_stored_length_is_ignored(doors: Doors) -> None:
    first = doors.ask(7, doors.prompt, 3, start=True)
    assert doors.ask(7, [40], 1, step=len(first) + 50)[:-1] == [*first, 40]
    doors.end(7)


def test_a_later_turn_computes_only_what_the_prefix_cache_lacks(doors: Doors, demo_server: TritonServer) -> None:
    prompt = doors.encode("<|im_start|>user\n" + "cache " * 60 + "<|im_end|>\n<|im_start|>assistant\n")
    first = doors.ask(8, prompt, 8, start=True, bad_words=[[doors.eos]])
    before = settled(demo_server, "turbotriton_computed_tokens_total")
    doors.ask(8, [50, 51], 1, step=len(first))
    computed = settled(demo_server, "turbotriton_computed_tokens_total") - before
    assert 2 <= computed <= 2 + 64 + 1, "the tokens after the last full block of 64"
    doors.end(8)


def test_cancel_on_a_second_stream_ends_the_first_normally_and_keeps_the_session(doors: Doors, demo_server: TritonServer) -> None:
    seen = threading.Event()
    lengths: list[int] = []
    errors: list[str] = []

    def follow() -> None:
        for response in doors.raw.stream(turn(9, doors.prompt, 1500, start=True, bad_words=[[doors.eos]])):
            if response.error_message:
                errors.append(response.error_message)
            outputs = outputs_of(response.infer_response)
            lengths.extend(outputs["sequence_length"].values if outputs else [])
            seen.set()

    reader = threading.Thread(target=follow)
    with cancelling(demo_server), throttled(engine_pid(demo_server), share=0.02):
        reader.start()
        assert seen.wait(PATIENCE_S)
        assert code(3) in doors.error(9, [40], 1), "a second turn while the first runs is busy"
        cancelled = list(doors.raw.stream(turn(9, [], 0, stop=True)))
        assert not any(response.error_message for response in cancelled)
    reader.join(PATIENCE_S)
    assert not reader.is_alive()
    assert not errors
    assert lengths == sorted(lengths)
    assert len(doors.prompt) < lengths[-1] < len(doors.prompt) + 1500
    assert code(4) in doors.error(9, [], 0, stop=True), "nothing runs any more"
    resumed = doors.ask(9, [40, 41], 2, step=lengths[-1], bad_words=[[doors.eos]])
    assert len(resumed) == lengths[-1] + 2 + 2
    doors.end(9)
    wait_idle(demo_server)


def test_end_erases_the_session(doors: Doors) -> None:
    ids = doors.ask(10, doors.prompt, 2, start=True)
    responses = read(doors.raw.stream(turn(10, [1], 0, step=len(ids), end=True, request_id="")))
    assert responses.ids[: len(ids)] == ids
    assert code(1) in doors.error(10, [40], 1)
    assert code(1) in doors.error(10, [1], 0, end=True)


def test_stop_with_end_erases_an_idle_session(doors: Doors) -> None:
    doors.ask(11, doors.prompt, 2, start=True)
    doors.ask(11, [], 0, stop=True, end=True)
    assert code(1) in doors.error(11, [40], 1)


def test_stop_with_end_erases_a_running_session(doors: Doors, demo_server: TritonServer) -> None:
    with cancelling(demo_server), throttled(engine_pid(demo_server), share=0.02):
        stream = iter(doors.raw.stream(turn(12, doors.prompt, 1500, start=True, bad_words=[[doors.eos]])))
        next(stream)
        doors.ask(12, [], 0, stop=True, end=True)
    assert not any(response.error_message for response in stream)
    assert code(1) in doors.error(12, [40], 1)


def test_start_of_a_known_session_replaces_it(doors: Doors) -> None:
    doors.ask(13, doors.prompt, 5, start=True)
    assert doors.ask(13, [40, 41], 1, start=True)[:2] == [40, 41]
    doors.end(13)


def test_resume_rebuilds_a_session_from_its_whole_history(doors: Doors) -> None:
    kept = doors.ask(14, doors.prompt, 6, start=True, bad_words=[[doors.eos]])
    expected = doors.ask(14, [40, 41], 6, step=len(kept), end=True)
    assert doors.ask(14, kept, 0, start=True) == kept
    assert doors.ask(14, [40, 41], 6, step=len(kept), end=True) == expected


def test_unknown_session_is_code_1(doors: Doors) -> None:
    assert code(1) in doors.error(999_999, [40], 1)
    assert code(1) in doors.error(999_999, [], 0, stop=True)


def test_start_and_stop_together_is_code_1(doors: Doors) -> None:
    assert code(1) in doors.error(15, doors.prompt, 1, start=True, stop=True)


def test_more_than_session_len_is_code_6_and_leaves_the_session(doors: Doors) -> None:
    ids = doors.ask(16, doors.prompt, 2, start=True, bad_words=[[doors.eos]])
    assert code(6) in doors.error(16, [40] * (SESSION_LEN - 10), 1, step=len(ids))
    assert code(6) in doors.error(17, [40] * (SESSION_LEN + 1), 1, start=True)
    assert doors.ask(16, [40], 1, step=len(ids))[:-1] == [*ids, 40]
    doors.end(16)


def test_a_count_beyond_session_len_is_clamped_to_it(doors: Doors) -> None:
    prompt = [40] * (SESSION_LEN - 6)
    ids = doors.ask(18, prompt, 100_000, start=True, end=True, bad_words=[[doors.eos]])
    assert len(ids) == SESSION_LEN


@pytest.mark.parametrize("session_id", [0, 2**32 + 5, 140_245_678_901_234, 2**64 - 1])
def test_session_ids_have_64_bits(doors: Doors, session_id: int) -> None:
    ids = doors.ask(session_id, doors.prompt, 2, start=True)
    if session_id >= 2**32:
        assert code(1) in doors.error(session_id % 2**32 + 2**33, [40], 1), "the low half alone is another session"
    assert doors.ask(session_id, [40], 1, step=len(ids))[:-1] == [*ids, 40]
    doors.end(session_id)


def test_the_same_seed_at_the_start_draws_the_same_answer(doors: Doors) -> None:
    hot = {"start": True, "end": True, "top_k": 0, "temperature": 30.0, "bad_words": [[doors.eos]]}
    one, same, other = (doors.ask(19, doors.prompt, 12, seed=seed, **hot) for seed in (5, 5, 6))
    assert one == same != other


def test_top_k_may_be_absent(doors: Doors) -> None:
    greedy = doors.ask(20, doors.prompt, 8, start=True, end=True)
    assert doors.ask(20, doors.prompt, 8, start=True, end=True, top_k=None, temperature=0.0) == greedy


def test_only_the_three_required_inputs_start_and_end_a_session(doors: Doors) -> None:
    """START and END default to 1, STOP and CORRID to 0."""
    inputs = turn(0, doors.prompt, 3).inputs[:3]
    request = service_pb2.ModelInferRequest(model_name="turbomind", inputs=inputs)
    request.raw_input_contents.extend(turn(0, doors.prompt, 3).raw_input_contents[:3])
    ids = read(doors.raw.stream(request)).ids
    assert ids[: len(doors.prompt)] == doors.prompt
    assert code(1) in doors.error(0, [40], 1)


def test_a_refused_turn_leaves_the_history_as_it_was(doors: Doors) -> None:
    ids = doors.ask(21, doors.prompt, 3, start=True, bad_words=[[doors.eos]])
    assert "70000" in doors.error(21, [70_000], 1, step=len(ids))
    assert doors.ask(21, [40], 1, step=SESSION_LEN)[:-1] == [*ids, 40]
    doors.end(21)


def test_nothing_runs_after_all_that(doors: Doors, demo_server: TritonServer) -> None:
    wait_idle(demo_server)
    assert metric(demo_server, "turbotriton_requests_waiting") == 0
    assert doors.ask(22, doors.prompt, 1, start=True, end=True)
