"""The protocol of the server, tested with the stock openai package."""

import concurrent.futures
import json
import urllib.request

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from recurrent_depth.generation.config import EngineOptions
from recurrent_depth.hf.engine import Engine
from recurrent_depth.serving.answer import Answer
from recurrent_depth.serving.config import Limits, ServeConfig
from servers import ask, metric, running, wait_until
from support import ANSWER, QUESTION

MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def expected(folder, num_steps, tokens=12, prompt=None):
    """Return the text that plain transformers generates."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if prompt is None:
        inputs = tokenizer.apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_steps=num_steps)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat(client, stream=False, **options):
    options = {"model": "small", "messages": MESSAGES, "max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(**options, stream=stream)


def streamed(client, **options):
    """Return text, finish reason and usage of a stream."""
    text, reason, usage = "", None, None
    for event in chat(client, stream=True, **options):
        usage = event.usage or usage
        if event.choices:
            text += event.choices[0].delta.content or ""
            reason = event.choices[0].finish_reason or reason
    return text, reason, usage


@pytest.mark.parametrize("num_steps", [1, 6])
def test_chat_takes_the_depth_of_the_request(client, chat_folder, num_steps):
    depth = {"extra_body": {"num_steps": num_steps}}
    whole = chat(client, **depth)
    assert whole.choices[0].message.content == expected(chat_folder, num_steps)
    assert streamed(client, **depth)[0] == whole.choices[0].message.content


def test_server_stops_tokens_by_the_gate_of_the_model(gated_folder, chat_folder):
    tokenizer, model = AutoTokenizer.from_pretrained(gated_folder), AutoModelForCausalLM.from_pretrained(gated_folder)
    options = {"exit": "gate", "exit_threshold": 0.5}
    inputs = tokenizer("the quick", return_tensors="pt")
    given = {"num_steps": 8, "max_new_tokens": 12, "do_sample": False, "use_cache": False}
    engine = Engine(EngineOptions(exit_prompt=False, **options))
    ids = model.generate(**inputs, custom_generate=engine, **given)[0, inputs["input_ids"].shape[1] :]
    assert min(engine.result.steps[0]) < 8
    with running(gated_folder, served_name="small", **options) as (url, _):
        answer = ask(url, num_steps=8, max_tokens=12)[1]
    assert answer["choices"][0]["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    with pytest.raises(ValueError, match="the model has no exit gate"), running(chat_folder, **options):
        pass


def test_depths_of_requests_differ_and_the_default_is_the_models(client, chat_folder):
    texts = [chat(client, extra_body={"num_steps": r}).choices[0].message.content for r in (1, 6)]
    assert texts[0] != texts[1]
    assert chat(client).choices[0].message.content == expected(chat_folder, 4)


@pytest.mark.parametrize("as_ids", [False, True])
def test_completions_continue_a_prompt(client, chat_folder, as_ids):
    prompt = AutoTokenizer.from_pretrained(chat_folder)("the quick")["input_ids"] if as_ids else "the quick"
    options = {"model": "small", "prompt": prompt, "max_tokens": 12, "temperature": 0, "extra_body": {"num_steps": 3}}
    whole = client.completions.create(**options)
    assert whole.choices[0].text == expected(chat_folder, 3, prompt="the quick")
    pieces = [event.choices[0].text for event in client.completions.create(**options, stream=True) if event.choices]
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 6


def test_usage_counts_tokens_whole_and_streamed(client, chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    prompt = len(tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"])
    whole = chat(client)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 12)
    assert whole.usage.total_tokens == prompt + 12
    assert whole.choices[0].finish_reason == "length"
    _, reason, usage = streamed(client, stream_options={"include_usage": True})
    assert reason == "length"
    assert usage == whole.usage
    assert streamed(client)[2] is None


def test_stop_texts_end_an_answer_and_are_not_returned(client, chat_folder):
    text = expected(chat_folder, 4)
    stop = text[5:8]
    kept = text[: text.find(stop)]
    whole = chat(client, stop=[stop, "never written"])
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (kept, "stop")
    assert whole.usage.completion_tokens < 12
    assert streamed(client, stop=stop)[:2] == (kept, "stop")


def test_temperature_and_seed_are_honoured(client):
    def text(**options):
        return chat(client, max_tokens=16, **options).choices[0].message.content

    greedy, warm = text(), text(temperature=1.5, seed=1)
    assert text(temperature=1.5, seed=1) == warm
    assert len({text(temperature=1.5, seed=seed) for seed in (-(2**40), -3, -2, 2, 3, 4, 2**40)}) > 3
    assert len({text(temperature=1.5) for _ in range(4)}) > 1
    assert text(temperature=1.5, top_p=1e-6) == greedy
    assert text(temperature=1e-300) == greedy
    assert text(temperature=1.5, extra_body={"top_k": 1}) == greedy


def test_default_temperature_is_openais(client):
    options = {"model": "small", "messages": MESSAGES, "max_tokens": 16}
    plain = client.chat.completions.create(**options, seed=7).choices[0].message.content
    assert plain == chat(client, max_tokens=16, temperature=1, seed=7).choices[0].message.content


def test_equal_requests_get_equal_texts_among_others(client, chat_folder):
    depths = (1, 2, 3, 4)
    alone = [expected(chat_folder, r, tokens=10 + r) for r in depths]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(chat, client, max_tokens=10 + r, extra_body={"num_steps": r}) for r in depths * 3]
        texts = [job.result().choices[0].message.content for job in jobs]
    assert texts == alone * 3


def test_without_max_tokens_the_rest_of_the_context_is_allowed(answering_folder):
    with running(answering_folder) as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        name = client.models.list().data[0].id
        answer = client.chat.completions.create(model=name, messages=MESSAGES, temperature=0)
        assert answer.choices[0].message.content == ANSWER
        assert answer.choices[0].finish_reason == "stop"
    with running(answering_folder, limits=Limits(new_tokens=30)) as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        rest = client.completions.create(model=name, prompt="the quick", temperature=0)
        assert rest.usage.completion_tokens <= 30


def test_models_lists_the_served_model_alone(client, chat_folder):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    for other in ("gpt-4", str(chat_folder), "../" + chat_folder.name):
        with pytest.raises(NotFoundError, match="the served model is 'small'"):
            client.models.retrieve(other)


def test_served_name_is_the_folders(chat_folder):
    with running(chat_folder) as (url, _):
        assert [m.id for m in OpenAI(base_url=f"{url}/v1", api_key="none").models.list()] == [chat_folder.name]


def test_health_and_metrics(server, client):
    with urllib.request.urlopen(f"{server}/health") as response:
        assert json.load(response) == {"status": "ok"}

    names = "generated_tokens_total", 'responses_total{status="200"}'
    before = [metric(server, name) for name in names]
    chat(client)
    wait_until(lambda: metric(server, "requests_in_progress") == 0)
    after = [metric(server, name) for name in names]
    assert after[0] == before[0] + 12
    assert after[1] > before[1]


def test_protocol_is_described_by_the_server(server):
    status, description = ask(server, "/openapi.json", method="GET")
    assert status == 200
    for request in ("ChatRequest", "CompletionRequest"):
        fields = description["components"]["schemas"][request]["properties"]
        assert "Core iterations" in fields["num_steps"]["description"]


def test_messages_may_be_lists_of_text_parts(client, chat_folder):
    parts = [{"type": "text", "text": QUESTION[:7]}, {"type": "text", "text": QUESTION[7:]}]
    answer = chat(client, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == expected(chat_folder, 4)


def test_stream_begins_before_the_answer_is_complete(client, server):
    stream = chat(client, stream=True, max_tokens=60)
    assert next(event for event in stream if event.choices and event.choices[0].delta.content)
    assert metric(server, "requests_in_progress") == 1
    assert len(list(stream)) > 20


def test_fields_that_ask_for_nothing_are_accepted(client):
    chat(client, n=1, frequency_penalty=0, presence_penalty=0, user="me", logprobs=False, tools=[])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"n": 2}, "does not implement"),
        ({"frequency_penalty": 0.5}, "does not implement"),
        ({"logprobs": True}, "does not implement"),
        ({"response_format": {"type": "json_object"}}, "does not implement"),
        ({"extra_body": {"num_step": 4}}, "unknown field 'num_step'"),
        ({"extra_body": {"generation_config": "{}"}}, "unknown field 'generation_config'"),
        ({"max_completion_tokens": 5}, "differ"),
    ],
)
def test_fields_that_are_not_honoured_are_refused(client, field, message):
    with pytest.raises(BadRequestError, match=message):
        chat(client, **field)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 20])
def test_answer_holds_back_what_may_become_a_stop_text(size):
    text, stops = "one END of two, EN, then the END!", ["END!", "never"]
    answer = Answer(lambda ids: "".join(map(chr, ids)), stops)
    sent = "".join(answer.push(ord(letter)) for letter in text[:size])
    held = max(n for stop in stops for n in range(len(stop)) if text[:size].endswith(stop[:n]))
    assert sent == text[: size - held]
    rest = "".join(answer.push(ord(letter)) for letter in text[size:])
    assert answer.stopped
    assert sent + rest + answer.finish() == "one END of two, EN, then the "


def test_answer_keeps_the_beginning_of_a_stop_text_that_is_not_completed():
    answer = Answer(lambda ids: "".join(map(chr, ids)), ["END!"])
    assert "".join(answer.push(ord(letter)) for letter in "the EN") == "the "
    assert answer.finish() == "EN"
    assert not answer.stopped


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"port": -1}, "port"),
        ({"port": 99999}, "port"),
        ({"host": ""}, "host"),
        ({"model": ""}, "model"),
        ({"served_name": ""}, "served_name"),
        ({"api_key": ""}, "api_key"),
    ],
)
def test_serve_options_that_cannot_work_are_refused(options, field):
    with pytest.raises(ValueError, match=f"^{field} is"):
        ServeConfig(**({"model": "m"} | options))


@pytest.mark.parametrize("field", Limits.__dataclass_fields__)
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_limits_that_cannot_work_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^limits.{field} is"):
        Limits(**{field: value})
