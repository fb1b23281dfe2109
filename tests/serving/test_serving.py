"""The server and the chat, tried with the openai package."""

import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

import recurrent_depth.hf  # noqa: F401
from recurrent_depth.serving.chat import _free_port

pytestmark = pytest.mark.slow
MESSAGES = [{"role": "user", "content": "how many apples are there?"}]


@pytest.fixture(scope="module")
def server(chat_folder):
    port = _free_port()
    command = [sys.executable, "-m", "recurrent_depth.cli", "serve", "--model", str(chat_folder), "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu"], env=os.environ | {"HF_HUB_OFFLINE": "1"})
    url = f"http://localhost:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.2)
    yield url
    process.terminate()
    process.wait(timeout=20)


def expected(folder, num_steps):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False, num_steps=num_steps)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chat_completions_with_steps_per_request(server, chat_folder):
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    answers = []
    for num_steps in (1, 6):
        body = {"generation_config": json.dumps({"num_steps": num_steps, "max_new_tokens": 12, "do_sample": False})}
        common = {"model": str(chat_folder), "messages": MESSAGES, "extra_body": body}
        whole = client.chat.completions.create(**common).choices[0].message.content
        pieces = [
            event.choices[0].delta.content or ""
            for event in client.chat.completions.create(**common, stream=True)
            if event.choices
        ]
        assert whole == "".join(pieces) == expected(chat_folder, num_steps)
        answers.append(whole)
    assert answers[0] != answers[1]


@pytest.mark.parametrize("own_server", [False, True])
def test_chat_on_a_terminal(server, chat_folder, own_server):
    command = [sys.executable, "-m", "recurrent_depth.cli", "chat", "--model", str(chat_folder)]
    options = ["--num-steps", "6", "--max-new-tokens", "12"]
    options += ["--device", "cpu"] if own_server else ["--url", f"{server}/v1"]
    done = subprocess.run(
        [*command, *options],
        input=MESSAGES[0]["content"] + "\n",
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert expected(chat_folder, 6).strip() in done.stdout
