"""Thinking budgets and the decoding engine inside transformers' generate(), compared with the engine itself."""

import pytest
import torch
from transformers import AutoTokenizer

from recurrent_depth.generation.best_of import decode_best_of
from recurrent_depth.generation.config import BestOf, EngineOptions, Refill, Speculation, Thinking, Wavefront
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import OutputKL, StateChange
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.engine import Engine
from recurrent_depth.hf.forcing import BudgetForcing, thinking_budget
from recurrent_depth.hf.loading import wrap
from support import decode, lively_model

PROMPTS = [[5, 6, 7, 8, 9], [11, 40, 12], [3]]
BEGIN, WAIT = (40,), (42, 43)
BUDGETS = [ThinkingBudget(BEGIN, (41,), at_most=3), None, None]


@pytest.fixture(scope="module")
def inner():
    return lively_model()


@pytest.fixture(scope="module")
def model(inner):
    return wrap(inner).eval()


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(batch, sequences, stop):
    """Return the written tokens, without the padding after a stop."""
    rows = []
    for ids in sequences[:, batch["input_ids"].shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))
        rows.append(ids[:end])
    return rows


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "top_k": 20, "top_p": 0.95, "seed": 4}])
def test_budget_forcing_in_generate_equals_the_engine(inner, model, sampling):
    batch, stop = padded(PROMPTS), (13, 17)
    common = {"max_new_tokens": 20, "num_steps": 4}
    free = decode(inner, PROMPTS, Decoding(thinking=ThinkingBudget(BEGIN, (49,), at_most=19), **common, **sampling))
    end = free.tokens[0][3]  # the third thinking token of the first request becomes an end that comes too early
    budgets = [
        ThinkingBudget(BEGIN, (end,), WAIT, at_most=9, at_least=6, rounds=2),
        ThinkingBudget(BEGIN, (41,), at_most=2),
        None,
    ]
    expected = decode(inner, PROMPTS, Decoding(thinking=budgets, stop=stop, **common, **sampling)).tokens
    forcing = BudgetForcing(budgets, stop=stop, attention_mask=batch["attention_mask"], **sampling)
    sequences = model.generate(
        **batch, logits_processor=[forcing], pad_token_id=0, do_sample=bool(sampling), eos_token_id=list(stop), **common
    )
    assert new_tokens(batch, sequences, stop) == expected
    assert tuple(expected[0][3:5]) == WAIT
    assert expected[1].index(41) <= 2  # the prompt opens the thinking part itself
    assert expected[2][0] != 40


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_budget_forcing_refuses_beams_and_assistants(model, options):
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    forcing = BudgetForcing(ThinkingBudget((40,), (41,), at_most=20))
    with pytest.raises(ValueError, match="num_beams=1"):
        model.generate(
            ids, logits_processor=[forcing], max_new_tokens=12, do_sample=False, num_steps=2, eos_token_id=1,
            pad_token_id=0, **options,
        )  # fmt: skip


def test_budget_forcing_refuses_a_used_object_and_wrong_counts(model):
    batch = padded(PROMPTS)
    common = {"max_new_tokens": 3, "do_sample": False, "num_steps": 2}
    with pytest.raises(ValueError, match="2 values for 3"):
        model.generate(**batch, logits_processor=[BudgetForcing(BUDGETS[:2])], **common)
    forcing = BudgetForcing(BUDGETS)
    model.generate(**batch, logits_processor=[forcing], **common)
    with pytest.raises(ValueError, match="a new BudgetForcing"):
        model.generate(**batch, logits_processor=[forcing], **common)


def test_thinking_delimiters_must_be_one_token(chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    with pytest.raises(ValueError, match="must be one token"):
        thinking_budget(Thinking(end="so then"), tokenizer)
    budget = thinking_budget(Thinking(at_most=5, rounds=1), tokenizer)
    assert tokenizer.decode(list(budget.begin)) == "<|begin_think|>"
    assert tokenizer.decode(list(budget.wait)) == "Wait"


@pytest.mark.parametrize(
    ("engine", "plain"),
    [
        ({}, {}),
        ({"speculation": Speculation(2)}, {}),
        ({"wavefront": Wavefront(2)}, {}),
        ({"refill": Refill(2), "exit": "kl", "exit_threshold": 0.02}, {"exit": OutputKL(0.02)}),
        ({"exit": "state-change", "exit_threshold": 0.3}, {"exit": StateChange(0.3)}),
        ({"cache_budget": 1}, {"cache_budget": 1}),
    ],
)
def test_engine_inside_generate_equals_plain_generation(inner, model, engine, plain):
    batch = padded(PROMPTS)
    runner = Engine(EngineOptions(**engine))
    sequences = model.generate(
        **batch, custom_generate=runner, use_cache=False, max_new_tokens=12, num_steps=4, do_sample=False,
        eos_token_id=13, pad_token_id=0,
    )  # fmt: skip
    expected = decode(inner, PROMPTS, Decoding(max_new_tokens=12, num_steps=4, stop=(13,), **plain))
    assert new_tokens(batch, sequences, (13,)) == expected.tokens
    assert runner.result.cache_bytes > 0
    kept = runner.decoder
    again = model.generate(
        **batch, custom_generate=runner, use_cache=False, max_new_tokens=12, num_steps=4, do_sample=False,
        eos_token_id=13, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(again, sequences)
    assert runner.decoder is kept


def test_engine_inside_generate_chooses_among_samples(inner, model):
    batch, best_of = padded(PROMPTS), BestOf(3, "convergence", seed=5)
    runner = Engine(EngineOptions(best_of=best_of))
    sequences = model.generate(
        **batch, custom_generate=runner, use_cache=False, max_new_tokens=8, num_steps=2, do_sample=False,
        eos_token_id=13, pad_token_id=0,
    )  # fmt: skip
    options = Decoding(max_new_tokens=8, num_steps=2, stop=(13,))
    expected = decode_best_of(Decoder(inner), PROMPTS, options, best_of)
    assert new_tokens(batch, sequences, (13,)) == expected.tokens
    assert runner.result.chosen == expected.chosen
    assert set(expected.chosen) != {0}


def test_engine_inside_generate_honours_sampling_stopping_and_streaming(inner, model):
    seen = []

    def fifth(input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 7])

    runner = Engine(EngineOptions(seed=3), on_token=lambda request, token: seen.append(token))
    sequences = model.generate(
        torch.tensor([[5, 6]]), custom_generate=runner, use_cache=False, max_new_tokens=12, num_steps=4,
        do_sample=True, temperature=0.9, top_k=0, stopping_criteria=[fifth],
    )  # fmt: skip
    expected = decode(inner, [[5, 6]], Decoding(max_new_tokens=5, num_steps=4, temperature=0.9, seed=3)).tokens[0]
    assert sequences[0, 2:].tolist() == expected
    assert seen == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=1"),
        ({"repetition_penalty": 1.2}, "RepetitionPenalty"),
        ({"state_seed": 3}, "leave state_seed out"),
    ],
)
def test_engine_inside_generate_refuses_unsupported_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5]]), custom_generate=Engine(), use_cache=False, max_new_tokens=2, **options)
