"""The decoding engine behind lm-eval's generation tasks."""

from collections import Counter

import pytest
from lm_eval.api.instance import Instance

from recurrent_depth.evaluation.harness import RecurrentLM
from recurrent_depth.generation.config import EngineOptions, Thinking
from recurrent_depth.generation.decoding import decode
from recurrent_depth.hf.engine import decoding
from recurrent_depth.hf.loading import load_model, unwrap

CONTEXTS = ["the quick", "how many apples are there?", "7"]


@pytest.fixture(scope="module")
def lm(chat_folder):
    model, tokenizer = load_model(chat_folder)
    lm = RecurrentLM(pretrained=model.double(), backend="causal", tokenizer=tokenizer, batch_size=2)
    lm.num_steps, lm.spent = 3, Counter()
    return lm


def ask(lm, **options):
    options = {"until": [], "max_gen_toks": 24, "do_sample": False} | options
    requests = [Instance("generate_until", {}, (context, options), i) for i, context in enumerate(CONTEXTS)]
    return lm.generate_until(requests, disable_tqdm=True)


def test_answers_are_read_behind_the_thinking_part_and_stop_texts_count_there(lm):
    limits = {"at_most": 6, "at_least": 4, "rounds": 1, "wait": "e"}
    options = {f"think_{name}": value for name, value in limits.items()}
    lm.spent = Counter()
    answers = ask(lm, **options)
    engine = EngineOptions(num_steps=3, thinking=Thinking(**limits))
    expected = decoding(engine, lm.tokenizer, max_new_tokens=24, stop=(lm.eot_token_id,))
    end = expected.thinking.end[0]
    thoughts = []
    for context, answer in zip(CONTEXTS, answers, strict=True):
        tokens = decode(unwrap(lm.model), [lm.tok_encode(context)], expected).tokens[0]
        thoughts.append(lm.tokenizer.decode(tokens[: tokens.index(end)]))
        assert tokens.index(end) <= 7
        assert answer == lm.tok_decode(tokens[tokens.index(end) + 1 :]).lstrip()
    assert lm.spent["tokens"] <= 24 * 3
    assert lm.spent["core_steps"] > 3 * lm.spent["tokens"]
    stop = next(char for char in answers[0][2:] if char in thoughts[0] and char not in answers[0][:2])
    assert ask(lm, **options, until=[stop])[0] == answers[0].partition(stop)[0]


def test_without_engine_options_transformers_writes_and_exits_can_be_asked_for(lm):
    plain = ask(lm)
    assert ask(lm, exit="state-change", exit_threshold=0.0) == plain
    lm.spent = Counter()
    ask(lm, exit="state-change", exit_threshold=9.0, min_steps=2)
    prompts = sum(len(lm.tok_encode(context)) for context in CONTEXTS)
    assert lm.spent["core_steps"] == 2 * (lm.spent["tokens"] + prompts - len(CONTEXTS))


def test_a_random_initial_state_is_refused(lm):
    lm.state_seed = 1
    try:
        with pytest.raises(ValueError, match="drop state_seeds"):
            ask(lm, exit="kl")
    finally:
        lm.state_seed = None
