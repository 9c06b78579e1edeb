"""What a pipeline over the bundled model answers: single, batch, streamed."""

from turbotriton import GenerationConfig, Pipeline, Response

GREEDY = GenerationConfig(top_k=1, max_new_tokens=32)


def test_one_question_gets_one_response(pipe: Pipeline) -> None:
    response = pipe("What is 2 + 3?", gen_config=GREEDY)
    assert isinstance(response, Response)
    assert response.text == "2 + 3 = 5."
    assert response.finish_reason == "stop"
    assert response.generate_token_len == len(response.token_ids)
    assert response.input_token_len == 16


def test_a_batch_answers_in_the_prompts_order(pipe: Pipeline) -> None:
    responses = pipe(["What is 2 + 3?", "Spell cat.", [{"role": "user", "content": "What is 2 + 3?"}]], gen_config=GREEDY)
    assert isinstance(responses, list)
    assert [response.text for response in responses] == ["2 + 3 = 5.", "c-a-t.", "2 + 3 = 5."]
    assert [response.session_id for response in responses] == [0, 1, 2]


def test_streamed_deltas_join_to_the_whole_answer(pipe: Pipeline) -> None:
    texts = {0: "", 1: ""}
    for delta in pipe.stream_infer(["What is 2 + 3?", "Spell cat."], GREEDY):
        texts[delta.session_id] += delta.text
        last = delta
    assert texts == {0: "2 + 3 = 5.", 1: "c-a-t."}
    assert last.finish_reason == "stop"
