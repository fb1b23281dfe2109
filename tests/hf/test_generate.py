"""Generation through transformers' generate(), in fp64: equal tokens with any cache, batch or decoding strategy."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache, TextStreamer

import recurrent_depth.hf  # noqa: F401

FIXTURE = Path(__file__).parents[1] / "fixtures" / "huginn_tiny"
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [3]]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float64)


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 1},  # 5.4 looks for an end of text
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
    ],
    ids=lambda options: ",".join(options),
)
def test_cached_generation_equals_uncached(model, options):
    batch = left_padded(PROMPTS[:1] if "prompt_lookup_num_tokens" in options else PROMPTS)
    common = {"max_new_tokens": 12, "do_sample": False, "num_steps": 5}
    torch.manual_seed(0)
    cached = model.generate(**batch, **(common | options))
    plain = {k: v for k, v in options.items() if k not in ("cache_implementation", "prompt_lookup_num_tokens")}
    torch.manual_seed(0)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **(common | plain)))


@pytest.mark.slow
def test_static_cache_works_with_compile(model):
    batch = left_padded(PROMPTS)
    options = {"max_new_tokens": 6, "do_sample": False, "num_steps": 2}
    dynamic = model.generate(**batch, **options)
    cache = StaticCache(
        config=AutoModelForCausalLM.from_pretrained(FIXTURE, num_steps=2).config,
        max_cache_len=batch["input_ids"].shape[1] + 6,
    )
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(6):
        logits = compiled(
            ids[:, -positions.shape[1] :],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            num_steps=2,
        ).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    assert torch.equal(ids, dynamic)


def test_generation_continues_from_a_returned_cache(model):
    options = {"do_sample": False, "num_steps": 4}
    ids = torch.tensor([PROMPTS[0]])
    first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **options)
    longer = torch.cat([first.sequences, torch.tensor([[17, 18]])], dim=1)
    continued = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=5, **options)
    assert torch.equal(continued, model.generate(longer, max_new_tokens=5, **options))


def test_cache_offers_the_last_entries_of_shallower_tokens(model):
    """Brute force: at iteration i, the keys and values of a token of depth d are those of iteration min(i, d - 1)."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    depths = [2, 4, 1]
    cache = DynamicCache()
    for piece, depth in zip(ids.split(2, dim=1), depths, strict=True):
        logits = model(piece, num_steps=depth, past_key_values=cache).logits
    outer, core = 2, 2
    assert len(cache.layers) == outer + core * max(depths)
    for slot, layer in enumerate(cache.layers):
        assert layer.keys.shape[2] == 6
        if slot < outer:
            continue
        step, offset = divmod(slot - outer, core)
        for piece, depth in enumerate(depths):
            source = cache.layers[outer + core * min(step, depth - 1) + offset]
            columns = slice(2 * piece, 2 * piece + 2)
            assert torch.equal(layer.keys[:, :, columns], source.keys[:, :, columns])
            assert torch.equal(layer.values[:, :, columns], source.values[:, :, columns])
    assert torch.isfinite(logits).all()


def test_static_cache_with_too_few_layers_is_an_error(model):
    cache = StaticCache(config=model.config, max_cache_len=8)  # mean_recurrence is 4
    with pytest.raises(ValueError, match="made for 4 core iterations"):
        model(torch.tensor([[1, 2]]), past_key_values=cache, num_steps=5)


def test_num_steps_comes_from_call_generation_config_or_model_config(model):
    ids = torch.tensor([PROMPTS[0]])
    two = model.generate(ids, num_steps=2, max_new_tokens=12, do_sample=False)
    by_config = GenerationConfig(num_steps=2, max_new_tokens=12, do_sample=False)
    assert torch.equal(two, model.generate(ids, generation_config=by_config))
    fixed = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float64, num_steps=2)
    assert torch.equal(two, fixed.generate(ids, max_new_tokens=12, do_sample=False))
    assert not torch.equal(two, model.generate(ids, max_new_tokens=12, do_sample=False))
    with pytest.raises(ValueError, match="at least 1"):
        model.generate(ids, num_steps=-1, max_new_tokens=2)
    with pytest.raises(ValueError, match="block_size 64"):
        model.generate(ids, max_new_tokens=100)


def test_state_seed_does_not_depend_on_row_and_padding(model):
    options = {"max_new_tokens": 8, "do_sample": False, "num_steps": 2, "output_logits": True}
    options |= {"return_dict_in_generate": True, "state_seed": 3}
    together = model.generate(**left_padded(PROMPTS), **options)
    zero = model.generate(**left_padded(PROMPTS), **(options | {"state_seed": None}))
    assert not torch.allclose(together.logits[0], zero.logits[0])
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), **options)
        torch.testing.assert_close(together.logits[0][row], alone.logits[0][0])
        assert together.sequences[row, -8:].tolist() == alone.sequences[0, -8:].tolist()
    whole = model(together.sequences[:1], num_steps=2, state_seed=3).logits[0, -2]
    torch.testing.assert_close(whole, together.logits[-1][0].to(whole), rtol=1e-6, atol=1e-6)  # generate keeps fp32


def test_hidden_states_are_ordered_by_iteration_and_layer(model):
    ids = torch.tensor([PROMPTS[0]])
    output = model(ids, num_steps=3, output_hidden_states=True)
    assert len(output.hidden_states) == 1 + 1 + 3 * 2 + 1  # embeddings, prelude, iterations x layers, coda
    states = model.core_states(output.hidden_states)
    assert [len(layers) for layers in states] == [2, 2, 2]
    for step in (1, 2, 3):
        shallower = model(ids, num_steps=step)
        torch.testing.assert_close(states[step - 1][-1], shallower.last_state, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.decode_state(states[step - 1][-1]), shallower.logits, rtol=1e-10, atol=1e-10)


def test_streaming_writes_the_generated_tokens(model):
    class Digits:
        def decode(self, ids, **kwargs):
            return "".join(f"<{int(i)}>" for i in ids)

    pieces = []

    class Recorder(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    written = model.generate(
        torch.tensor([PROMPTS[0]]), streamer=Recorder(Digits(), skip_prompt=True), max_new_tokens=6, do_sample=False
    )
    assert "".join(pieces) == Digits().decode(written[0, 5:])


def test_forward_needs_exactly_one_kind_of_input(model):
    ids = torch.tensor([PROMPTS[0]])
    embedded = model.transformer.embed(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embedded)


def test_bf16_model_keeps_the_rotary_table_in_fp32(model):
    half = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.freqs_cis.dtype == torch.float32
    assert torch.equal(half.freqs_cis, model.freqs_cis.float())
    assert model.bfloat16().freqs_cis.dtype == model.double().freqs_cis.dtype


def test_pipeline_generates_from_chat_messages(chat_folder):
    from transformers import AutoTokenizer, pipeline

    write = pipeline("text-generation", model=str(chat_folder))
    messages = [{"role": "user", "content": "how many apples?"}]
    answer = write(messages, num_steps=2, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]
    tokenizer, model = AutoTokenizer.from_pretrained(chat_folder), AutoModelForCausalLM.from_pretrained(chat_folder)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, num_steps=2, max_new_tokens=8, do_sample=False)
    assert answer["role"] == "assistant"
    assert answer["content"] == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
