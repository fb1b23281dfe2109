"""Folders in the format of released retrofitted models (arXiv 2511.07384), against a reference written here.

The reference is written from the description of that format: half-split RoPE, two norms per block, ln_f after the coda
alone, and the adapter on [state; e].
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dense_models import dense_folder
from recurrent_depth.cli import main
from recurrent_depth.hf.conversion.command import convert
from recurrent_depth.hf.loading import ModelError, load_model
from recurrent_depth.options import ConvertConfig

H, V, P, R, C = 4, 96, 1, 2, 1
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def write_folder(folder, kind, spelling="rope_theta", K=12, G=2):
    """Write a random model with the keys and the config.json of a released folder; return weights and config."""
    generator = torch.Generator().manual_seed(0)
    D, inner = 48, 80

    def random(*shape, scale=0.3):
        return scale * torch.randn(shape, generator=generator)

    state = {"transformer.wte.weight": random(V, D), "lm_head.weight": random(V, D)}
    state["transformer.adapter.weight"] = random(D, 2 * D, scale=0.1)
    state["transformer.ln_f.weight"] = 1 + random(D)
    for part, count in (("prelude", P), ("core_block", R), ("coda", C)):
        for i in range(count):
            name = f"transformer.{part}.{i}"
            state |= {f"{name}.norm_{n}.weight": 1 + random(D) for n in (1, 2)}
            state[f"{name}.attn.Wqkv.weight"] = random((H + 2 * G) * K, D, scale=0.2)
            state[f"{name}.attn.proj.weight"] = random(D, H * K, scale=0.2)
            state[f"{name}.mlp.fc.weight"] = random(2 * inner, D, scale=0.2)
            state[f"{name}.mlp.proj.weight"] = random(D, inner, scale=0.2)
            if kind == "olmo":
                state[f"{name}.attn.q_norm.weight"] = 1 + random(H * K)
                state[f"{name}.attn.k_norm.weight"] = 1 + random(G * K)
    theta = {"rope_theta": 10000.0, "rope_scaling": None if kind == "olmo" else LLAMA3}
    if spelling == "rope_parameters":
        theta = {"rope_parameters": {"rope_theta": 10000.0, **(theta["rope_scaling"] or {"rope_type": "default"})}}
    config = {
        "model_type": "huginn_raven", "architectures": ["RavenForCausalLM"], "block_class_name": "SandwichBlock",
        "auto_map": {"AutoConfig": "raven_config_minimal.RavenConfig"}, "n_embd": D, "n_heads": H, "head_dim": K,
        "num_key_value_heads": G, "intermediate_size": inner, "n_layers": P + R + C, "n_layers_in_prelude": P,
        "n_layers_in_recurrent_block": R, "n_layers_in_coda": C, "norm_eps": 1e-5, "vocab_size": V,
        "padded_vocab_size": V, "tie_embeddings": False, "tie_word_embeddings": False, "qk_bias": False,
        "max_position_embeddings": 64, "block_size": 4096, "mean_recurrence": 32, "mean_backprop_depth": 8,
        "rope_base": 500000, "effective_expected_depth": 132, "state_init": "like-init",
        "sampling_scheme": "poisson-lognormal-filling",
        "init_values": {"std": 0.008703882797784892, "out_proj": 0.0005356869554443541, "embed_scale": 1.0},
        **theta,
    }  # fmt: skip
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return state, config


def reference(state, config, ids, num_steps, s0):
    """Return the logits by the description of the released code, in the dtype of the weights."""
    K, G, eps = config["head_dim"], config["num_key_value_heads"], config["norm_eps"]
    inverse = 10000.0 ** -(torch.arange(0, K, 2).double() / K)
    if config.get("rope_scaling"):
        scaling = config["rope_scaling"]
        length = scaling["original_max_position_embeddings"] * inverse / (2 * torch.pi)
        smooth = ((length - scaling["low_freq_factor"]) / 3).clamp(0, 1)
        inverse = inverse * (smooth + (1 - smooth) / scaling["factor"])
    angles = torch.outer(torch.arange(ids.shape[1]).double(), inverse)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * state[name]

    def rotate(x):
        half = torch.cat([-x[..., K // 2 :], x[..., : K // 2]], dim=-1)
        return x * cos + half * sin

    def attention(x, name):
        q, k, v = F.linear(x, state[f"{name}.Wqkv.weight"]).split([H * K, G * K, G * K], dim=-1)
        if f"{name}.q_norm.weight" in state:
            q, k = norm(q, f"{name}.q_norm.weight"), norm(k, f"{name}.k_norm.weight")
        q, k, v = (y.unflatten(-1, (-1, K)).transpose(1, 2) for y in (q, k, v))
        k, v = (y.repeat_interleave(H // G, dim=1) for y in (rotate(k), v))
        scores = rotate(q) @ k.transpose(-1, -2) / K**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), state[f"{name}.proj.weight"])

    def mlp(x, name):
        gate, up = F.linear(x, state[f"{name}.fc.weight"]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, state[f"{name}.proj.weight"])

    def block(x, name):
        if f"{name}.attn.q_norm.weight" in state:
            x = x + norm(attention(x, f"{name}.attn"), f"{name}.norm_1.weight")
            return x + norm(mlp(x, f"{name}.mlp"), f"{name}.norm_2.weight")
        x = x + attention(norm(x, f"{name}.norm_1.weight"), f"{name}.attn")
        return x + mlp(norm(x, f"{name}.norm_2.weight"), f"{name}.mlp")

    e = state["transformer.wte.weight"][ids]
    for i in range(P):
        e = block(e, f"transformer.prelude.{i}")
    s = s0
    for _ in range(num_steps):
        s = F.linear(torch.cat([s, e], dim=-1), state["transformer.adapter.weight"])
        for i in range(R):
            s = block(s, f"transformer.core_block.{i}")
    for i in range(C):
        s = block(s, f"transformer.coda.{i}")
    return F.linear(norm(s, "transformer.ln_f.weight"), state["lm_head.weight"])


@pytest.mark.parametrize(
    ("kind", "spelling", "heads"),
    [
        ("llama", "rope_theta", {}),
        ("llama", "rope_parameters", {"K": 16, "G": 1}),
        ("olmo", "rope_theta", {"G": 4}),
        ("olmo", "rope_parameters", {}),
    ],
)
@torch.no_grad()
def test_released_folder_has_the_logits_of_the_reference(tmp_path, kind, spelling, heads):
    state, config = write_folder(tmp_path / "released", kind, spelling, **heads)
    if spelling == "rope_parameters" and kind == "llama":
        config["rope_scaling"] = LLAMA3
    model, _ = load_model(tmp_path / "released", torch.float64)
    double = {name: p.double() for name, p in state.items()}
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(V, (2, 40), generator=generator)
    s0 = torch.randn(2, 40, 48, generator=generator, dtype=torch.float64) * 0.0087
    for num_steps in (1, 4):
        expected = reference(double, config, ids, num_steps, s0)
        found = model(ids, num_steps=num_steps, input_states=s0).logits
        assert ((found - expected).abs().max() / expected.abs().max()).item() < 5e-6  # the rotary table is fp32
    assert model.model_config.state_std == pytest.approx(0.0087039, rel=1e-4)
    assert model.model_config.embed_scale == 1.0


@pytest.mark.parametrize("change", ["lacks", "has more"])
def test_folder_whose_weights_do_not_fit_is_refused(tmp_path, change):
    state, _ = write_folder(tmp_path / "released", "llama")
    if change == "lacks":
        del state["transformer.coda.0.norm_2.weight"]
    else:
        state["transformer.coda.0.attn.Wqkv.bias"] = torch.zeros(96)
    save_file(state, tmp_path / "released" / "model.safetensors")
    with pytest.raises(ModelError, match=r"transformer\.coda\.0"):
        load_model(tmp_path / "released")


def test_transformers_alone_refuses_the_folder_with_the_fix(tmp_path):
    write_folder(tmp_path / "released", "llama")
    with pytest.raises(ValueError, match="recurrent-depth export --model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "released")


@torch.no_grad()
def test_released_folder_exports_to_our_format(tmp_path):
    write_folder(tmp_path / "released", "olmo")
    assert main(["export", "--model", str(tmp_path / "released"), "--out", str(tmp_path / "out")]) == 0
    first, again = load_model(tmp_path / "released")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None]
    assert again(ids, num_steps=3).logits.equal(first(ids, num_steps=3).logits)
    assert again.model_config == first.model_config


@pytest.mark.parametrize("name", ["llama", "llama3", "olmo2"])
@torch.no_grad()
def test_converted_model_round_trips_through_the_released_format(tmp_path, name):
    source = dense_folder(tmp_path / "dense", name)
    folder = convert(ConvertConfig(str(source), str(tmp_path / "converted"), prelude=P, core=R, coda=3, init="random"))
    options = ["--format", "retrofit", "--out", str(tmp_path / "out")]
    assert main(["export", "--model", str(folder), *options]) == 0
    model, again = load_model(folder)[0], load_model(tmp_path / "out")[0]
    ids = torch.arange(4, 60)[None]
    assert again(ids, num_steps=3).logits.equal(model(ids, num_steps=3).logits)
    state = load_file(tmp_path / "out" / "model.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(source).model.layers[0].self_attn
    rows = dense.q_proj.weight.shape[0]
    assert state["transformer.prelude.0.attn.Wqkv.weight"][:rows].equal(dense.q_proj.weight)  # half-split again
    assert "lm_head.weight" in state


def test_model_that_the_released_format_cannot_hold_is_refused(tmp_path, capsys):
    source = dense_folder(tmp_path / "dense", "qwen3")
    folder = convert(ConvertConfig(str(source), str(tmp_path / "converted"), prelude=2, core=2, coda=2))
    options = ["--format", "retrofit", "--out", str(tmp_path / "out")]
    assert main(["export", "--model", str(folder), *options]) == 1
    assert "export this model with --format huginn" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
