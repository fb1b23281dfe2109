"""Models of the family beside Huginn: grouped heads, other places of norms, biases, norms of q and k."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recurrent_depth.generation.config import Refill
from recurrent_depth.generation.exits import StateChange
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.configuration import RecurrentDepthConfig
from recurrent_depth.model.config import ModelConfig, RopeScaling
from recurrent_depth.model.flops import forward_flops
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.planning.activations import activation_bytes
from recurrent_depth.training.config import OptimizerConfig
from recurrent_depth.training.launch import train
from recurrent_depth.training.optimizer import build_optimizer, orthogonalised
from support import LLAMA_LIKE, decode, lively_model, losses, run_ranks, small_run

SHAPES = {
    "llama": LLAMA_LIKE,
    "olmo": {"block": "branch", "qk_norm": "full", "qk_bias": False, "ln_f_before_coda": False},
    "huginn": {},
}


@pytest.mark.parametrize("name", SHAPES)
def test_flops_equal_torchs_count(name):
    model = lively_model(**SHAPES[name])
    ids = torch.arange(20)[None]
    # Attention as products: torch does not count flash attention on a CPU.
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, num_steps=3)
    assert forward_flops(model.config, 20, 3, causal=False) == counter.get_total_flops()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("budget", [None, 1, 2])
@pytest.mark.parametrize("mode", [None, Refill(lanes=1)])
def test_exits_stop_tokens_alike_in_every_mode_and_alone(name, budget, mode):
    model = lively_model(**SHAPES[name])
    options = Decoding(max_new_tokens=5, num_steps=6, exit=StateChange(0.8), cache_budget=budget)
    prompts = [[5, 6, 7, 8], [11], [3, 9]]
    alone = [decode(model, [prompt], options) for prompt in prompts]
    together = decode(model, prompts, options, mode)
    assert len({steps for row in together.steps for steps in row[1:]}) > 1
    assert together.tokens == [result.tokens[0] for result in alone]


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(name):
    model = lively_model(**SHAPES[name])
    ids = torch.arange(12)[None]
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model(ids, num_steps=3, document_ids=documents, position_ids=positions).logits
    alone = torch.cat([model(part, num_steps=3).logits for part in ids.split([5, 7], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)


def test_muon_orthogonalises_q_k_and_v_of_grouped_heads_separately():
    model = RecurrentDepthModel(ModelConfig(n_embd=32, n_heads=4, n_kv_heads=2, qk_bias=False))
    model.initialise(0)
    weight = model.transformer.prelude[0].attn.Wqkv.weight
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    build_optimizer(model, OptimizerConfig(name="muon", lr=0.1, weight_decay=0.0, momentum=0.0)).step()
    expected = [0.1 * 0.2 * max(g.shape) ** 0.5 * orthogonalised(g) for g in weight.grad.split([32, 16, 16])]
    torch.testing.assert_close(before - weight.detach(), torch.cat(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_training_equals_one_process(tmp_path, optimizer):
    model = ModelConfig(
        n_embd=32, n_heads=2, intermediate_size=64, vocab_size=64, block_size=32, mean_recurrence=4,
        mean_backprop_depth=2, **LLAMA_LIKE,
    )  # fmt: skip
    options = OptimizerConfig(name=optimizer, lr=2e-3, warmup_steps=3)
    train(small_run(tmp_path / "one", model=model, optimizer=options))
    assert run_ranks(train, 2, small_run(tmp_path / "two", model=model, optimizer=options)) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_planned_activations_shrink_with_fewer_key_heads():
    sizes = [activation_bytes(ModelConfig(n_kv_heads=n, qk_bias=False), 2, 64, (0, 4)) for n in (1, 2, 4)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


@pytest.mark.parametrize("name", SHAPES)
def test_config_json_restores_the_shape(tmp_path, name):
    scaling = RopeScaling("llama3", 8.0, original_max_position_embeddings=32) if name == "llama" else None
    shape = ModelConfig(n_embd=32, n_heads=2, rotary_scaling=scaling, **SHAPES[name])
    RecurrentDepthConfig.from_model_config(shape).save_pretrained(tmp_path)
    assert RecurrentDepthConfig.from_pretrained(tmp_path).to_model_config() == shape


def test_config_json_of_huginn_has_no_field_of_other_models(tmp_path):
    RecurrentDepthConfig.from_model_config(ModelConfig()).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["block_class_name"] == "SandwichBlock"
    added = {"qkv_bias", "qk_norm", "rotary_scaling", "ln_f_before_coda", "n_kv_heads", "head_size", "block"}
    assert not added & set(stored)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_kv_heads": 3}, r"n_kv_heads is 3; it must divide n_heads, which is 4"),
        ({"n_kv_heads": 2}, r"n_kv_heads is 2 and qk_bias is true"),
        ({"head_size": 15}, r"must be even"),
        ({"qk_norm": "head"}, r"qk_norm is 'head' and qk_bias is true"),
        ({"embed_multiplier": 0.0}, r"embed_multiplier is 0.0; it must be a finite number above 0"),
        ({"initial_state_std": -1.0}, r"initial_state_std is -1.0"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, r"original_max_position_embeddings is None; llama3 needs"),
        ({"rope_type": "linear", "factor": 0.5}, r"factor is 0.5"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 9.0}, r"high_freq_factor is 4.0"),
    ],
)
def test_scalings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)
