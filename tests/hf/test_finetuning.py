"""Fine-tuning with stock tools: transformers' Trainer, TRL and PEFT."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from recurrent_depth.hf.finetuning import DepthCallback, fix_depth
from recurrent_depth.model.recurrence import sample_depth
from support import run_without_our_package


def rows(n=24, width=12):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(40, 80, (n, width), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def run_trainer(folder, out, resume=None, callbacks=True, **changes):
    """Return the losses of six training steps of two micro-steps, and the depths that the core ran."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    depths = []
    iterate = model.transformer.iterate
    model.transformer.iterate = lambda s, e, steps, *rest: (depths.append(steps), iterate(s, e, steps, *rest))[1]
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "seed": 5}
    args = TrainingArguments(
        str(out), logging_steps=1, save_steps=3, report_to=[], per_device_train_batch_size=2, use_cpu=True,
        disable_tqdm=True, logging_first_step=True, **(options | changes),
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=[DepthCallback()] if callbacks else [])
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], depths, model


def test_depth_callback_repeats_depths_after_checkpointing_and_resume(chat_folder, tmp_path):
    plain, depths, model = run_trainer(chat_folder, tmp_path / "a")
    config = model.config.to_model_config()
    assert depths == [sample_depth(config, seed=5, step=s, micro_step=m) for s in range(6) for m in range(2)]
    assert plain[-1] < plain[0]
    recomputed, _, _ = run_trainer(chat_folder, tmp_path / "b", gradient_checkpointing=True)
    assert recomputed == pytest.approx(plain, rel=1e-4)
    resumed, later, _ = run_trainer(chat_folder, tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-3"))
    assert later == depths[6:]
    assert resumed == pytest.approx(plain, rel=1e-4)


def test_depth_without_a_callback_follows_the_number_of_passes(chat_folder, tmp_path):
    _, depths, model = run_trainer(chat_folder, tmp_path, callbacks=False, max_steps=2)
    config = model.config.to_model_config()
    assert depths == [sample_depth(config, seed=0, step=s, micro_step=0) for s in range(4)]


def test_gradient_checkpointing_gives_the_same_gradients(chat_folder):
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.tensor(rows()[:2]["input_ids"])
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("num_steps", "pair"), [(6, (2, 4)), (3, (0, 3))])
def test_fixed_depth_backpropagates_through_the_last_iterations_only(chat_folder, num_steps, pair):
    ids = torch.tensor(rows()[:2]["input_ids"])
    gradients = []
    for fixed, given in ((num_steps, None), (None, pair), (None, num_steps)):
        model = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float64, mean_backprop_depth=4).train()
        fix_depth(model, num_steps)  # the initial state is zero, so that the passes differ only in their gradient
        model.config.num_steps = fixed
        model(ids, labels=ids, num_steps=given).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-10, atol=1e-12, msg=name)
    whole = "transformer.adapter.weight"
    assert torch.allclose(gradients[0][whole], gradients[2][whole], rtol=1e-6) == (num_steps <= 4)


def test_training_mode_without_gradient_is_deterministic(chat_folder):
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    ids = torch.tensor(rows()[:2]["input_ids"])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        written = model.generate(ids, max_new_tokens=8, do_sample=False)
        model.train()
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), written)
        assert not torch.equal(model(ids, state_seed=1).logits, expected)
    assert model.clock.step == 0  # these passes are not training passes
    assert not torch.equal(model(ids).logits, expected)


def test_grpo_with_fixed_depth_has_zero_divergence_from_itself(answering_folder, tmp_path):
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(answering_folder)
    fix_depth(model, 4)
    args = GRPOConfig(
        str(tmp_path), max_steps=1, beta=0.1, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=8, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["how many", "there are", "the quick", "a lazy dog"]}),
        processing_class=AutoTokenizer.from_pretrained(answering_folder),
        peft_config=LoraConfig(r=4, target_modules=["adapter", "Wqkv"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "kl" in entry)
    assert abs(first["kl"]) < 1e-9
    assert first["completions/mean_length"] > 1


@pytest.mark.slow
def test_merged_lora_folder_loads_where_our_package_is_absent(chat_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(chat_folder), LoraConfig(r=4, target_modules=["adapter", "Wqkv"])
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    ids = torch.arange(40, 52)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    run_without_our_package(
        f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(40, 52)[None]).logits, {str(tmp_path / "logits.pt")!r})
""",
        tmp_path,
    )
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, rtol=1e-4, atol=1e-4)


def test_trl_sft_trains_lora_on_the_adapter(chat_folder, tmp_path):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    conversation = [
        {"role": "user", "content": "how many apples are there?"},
        {"role": "assistant", "content": "there are 7 apples."},
    ]
    args = SFTConfig(
        str(tmp_path), max_steps=8, learning_rate=5e-2, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        per_device_train_batch_size=2, logging_steps=1, save_strategy="no", assistant_only_loss=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(chat_folder),
        args,
        train_dataset=Dataset.from_dict({"messages": [conversation] * 16}),
        processing_class=AutoTokenizer.from_pretrained(chat_folder),
        peft_config=LoraConfig(r=4, target_modules=["adapter", "Wqkv"], task_type="CAUSAL_LM"),
        callbacks=[DepthCallback()],
    )
    trainer.train()
    trained = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trained[-1] < trained[0] - 0.1
    moved = {name: p.abs().max().item() for name, p in trainer.model.named_parameters() if "lora_B" in name}
    assert all(value > 0 for value in moved.values())
    assert any(".adapter." in name for name in moved)

    ids = torch.arange(40, 52)[None]
    model = trainer.model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        for name, p in model.named_parameters():
            if "lora_B" in name and ".adapter." in name:
                p.zero_()
        assert not torch.allclose(model(input_ids=ids).logits, adapted)
        merged = model.merge_and_unload()(input_ids=ids).logits
        torch.testing.assert_close(merged, model(input_ids=ids).logits)
