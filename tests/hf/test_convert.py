"""`recurrent-depth convert` on tiny random models of every supported architecture, against transformers itself."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, GemmaForCausalLM, MistralConfig

from dense_models import DENSE, LAYERS, VOCABULARY, dense_folder, dense_model
from recurrent_depth.cli import main
from recurrent_depth.generation.config import Refill, Speculation, Wavefront
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.conversion.command import convert
from recurrent_depth.hf.conversion.dense import check_supported
from recurrent_depth.hf.loading import ModelError, load_model
from recurrent_depth.options import ConvertConfig

QUICK = ("llama", "qwen3", "olmo2")
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in DENSE]
ALL = {"prelude": 2, "core": 2, "coda": 2}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Return a function that converts an architecture once and returns (dense model, converted model, folder)."""
    folders = {}

    def get(name, **options):
        key = (name, *sorted(options.items()))
        if key not in folders:
            root = tmp_path_factory.mktemp("converted")
            source = dense_folder(root / "dense", name)
            folders[key] = root, convert(ConvertConfig(str(source), str(root / "out"), **ALL | options))
        root, out = folders[key]
        dense = AutoModelForCausalLM.from_pretrained(root / "dense").eval()
        return dense, load_model(out)[0], out

    return get


def tokens(B=2, T=24, seed=0):
    return torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_one_iteration_equals_the_dense_model(converted, name):
    dense, model, _ = converted(name)
    ids = tokens(T=100)
    assert relative(model(ids, num_steps=1).logits, dense(ids).logits) < 1e-5
    changed = model(ids, num_steps=3).logits
    assert relative(changed, dense(ids).logits) > 1e-3  # more iterations do change the result


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_the_dense_model(converted, name):
    dense, model, _ = converted(name)
    ids = tokens(T=9)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = dense.generate(ids, **options)
    assert model.generate(ids, num_steps=1, **options).equal(expected)
    result = Decoder(model).generate(ids.tolist(), Decoding(num_steps=1, max_new_tokens=12))
    assert [[*row, *new] for row, new in zip(ids.tolist(), result.tokens, strict=True)] == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cached_and_padded_generation_equals_plain_passes(converted, name):
    _, model, _ = converted(name)
    model = model.double()
    ids = tokens(B=1, T=11)
    grown = ids
    for _ in range(6):
        grown = torch.cat([grown, model(grown, num_steps=3).logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_steps": 3}
    assert model.generate(ids, **options).equal(grown)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(16) >= 5).long()[None]
    assert model.generate(padded, attention_mask=mask, **options)[:, 5:].equal(grown)
    prompts = [ids[0].tolist(), ids[0, :4].tolist()]
    for mode in (None, Speculation(steps=1, tokens=3), Wavefront(steps=1), Refill(lanes=1)):
        result = Decoder(model, mode).generate(prompts, Decoding(num_steps=3, max_new_tokens=6))
        assert [*prompts[0], *result.tokens[0]] == grown[0].tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementations_agree_for_grouped_heads(converted, attention):
    _, model, folder = converted("llama")
    other = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    ids = tokens()
    assert relative(other(ids, num_steps=2).logits, model(ids, num_steps=2).logits) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
@torch.no_grad()
def test_input_only_adapter_equals_the_dense_model_at_any_depth(converted, name):
    dense, model, _ = converted(name, init="input_only")
    ids = tokens()
    for num_steps in (1, 2, 5):
        assert relative(model(ids, num_steps=num_steps).logits, dense(ids).logits) < 1e-5


@torch.no_grad()
def test_random_adapter_is_uniform_and_reproducible(converted):
    dense, model, _ = converted("llama", init="random", seed=3)
    _, again, _ = converted("llama", init="random", seed=3, mean_recurrence=2)
    _, other, _ = converted("llama", init="random", seed=4)
    weight = model.transformer.adapter.weight
    assert weight.equal(again.transformer.adapter.weight)
    assert not weight.equal(other.transformer.adapter.weight)
    bound = (2 * 48) ** -0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert model.config.state_init == "like-init"
    ids = tokens()
    assert relative(model(ids, num_steps=1).logits, dense(ids).logits) > 1e-2


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"prelude": 1, "core": 2, "coda": 1, "layers": "last"}, [0, 3, 4, 5]),
        ({"prelude": 2, "core": 1, "coda": 1, "core_layers": (3,)}, [0, 1, 3, 5]),
    ],
)
@torch.no_grad()
def test_dropped_layers_are_those_that_the_rule_names(converted, options, kept):
    dense, model, folder = converted("olmo2", **options)
    dense.model.layers = nn.ModuleList(dense.model.layers[i] for i in kept)
    dense.config.num_hidden_layers = len(kept)
    ids = tokens()
    assert relative(model(ids, num_steps=1).logits, dense(ids, use_cache=False).logits) < 1e-5
    report = json.loads((folder / "conversion.json").read_text())
    assert list(report["layers"].values()) == kept
    assert report["dropped_layers"] == [i for i in range(LAYERS) if i not in kept]


@pytest.mark.parametrize("rule", ["influence", "angular"])
def test_layers_that_change_nothing_are_dropped(tmp_path, rule):
    source = dense_folder(tmp_path / "dense", "llama")
    dense = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():  # layers 2 and 3 become the identity
        for i in (2, 3):
            dense.model.layers[i].self_attn.o_proj.weight.zero_()
            dense.model.layers[i].mlp.down_proj.weight.zero_()
    dense.save_pretrained(source)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 10)
    options = {"prelude": 1, "core": 2, "coda": 1, "layers": rule, "text": str(tmp_path / "text.txt")}
    convert(ConvertConfig(str(source), str(tmp_path / "out"), **options))
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["dropped_layers"] == [2, 3]
    assert report["block_influence"][2] == pytest.approx(0, abs=1e-6)


def test_gradient_reaches_both_halves_of_the_adapter(converted):
    for init in ("identity", "input_only", "random"):
        _, model, _ = converted("qwen3", init=init)
        ids = tokens()
        model(ids, labels=ids, num_steps=2).loss.backward()
        state, injected = model.transformer.adapter.weight.grad.split(48, dim=1)
        assert state.abs().max() > 0
        assert injected.abs().max() > 0


def test_tokenizer_template_and_generation_tokens_are_carried_over(converted):
    _, model, folder = converted("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    assert model.generation_config.eos_token_id == [2]
    assert model.generation_config.pad_token_id == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2_yarn", "qwen3", "olmo2"])
@torch.no_grad()
def test_folder_loads_with_its_own_code_and_exports_again(converted, tmp_path, name):
    _, model, folder = converted(name)
    assert main(["export", "--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    again = load_model(tmp_path / "out")[0]
    ids = tokens()
    assert again(ids, num_steps=2).logits.equal(model(ids, num_steps=2).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prelude", "2", "--core", "2", "--coda", "1"], "2 + 2 + 1 = 5 layers, but the model has 6"),
        (["--prelude", "4", "--core", "2", "--coda", "1"], "7 layers, but the model has 6; lower them"),
        (["--prelude", "2", "--core", "1", "--coda", "2", "--core_layers", "5"], "between 2 and 3"),
        (["--prelude", "0", "--core", "2", "--coda", "1"], "prelude is 0; it must be at least 1"),
        (["--prelude", "2", "--core", "1", "--coda", "2", "--layers", "influence"], "text is missing"),
    ],
)
def test_split_that_does_not_add_up_is_refused(tmp_path, capsys, options, message):
    source = dense_folder(tmp_path / "dense", "llama")
    assert main(["convert", "--model", str(source), "--out", str(tmp_path / "out"), *options]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_model_without_tokenizer_is_refused(tmp_path, capsys):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    options = ["--prelude", "2", "--core", "2", "--coda", "2", "--out", str(tmp_path / "out")]
    assert main(["convert", "--model", str(tmp_path / "dense"), *options]) == 1
    assert "has no tokenizer" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_recurrent_model_is_refused(converted, tmp_path):
    _, _, folder = converted("llama")
    with pytest.raises(ModelError, match="recurrent already"):
        convert(ConvertConfig(str(folder), str(tmp_path / "out"), **ALL))


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("llama", {"attention_bias": True}, "bias in the output projection"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("mistral", {"sliding_window": 16}, "sliding windows"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, "sliding windows"),
    ],
)
def test_unsupported_parts_are_refused_by_name(name, fields, reason):
    with pytest.raises(ModelError, match=reason):
        check_supported(dense_model(name, **fields).config)


def test_unsupported_architecture_is_refused_by_name(tmp_path, capsys):
    config = GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=12,
    )
    source = dense_folder(tmp_path / "dense", "llama")
    GemmaForCausalLM(config).save_pretrained(source)
    options = ["--prelude", "1", "--core", "1", "--coda", "1", "--out", str(tmp_path / "out")]
    assert main(["convert", "--model", str(source), *options]) == 1
    assert "'gemma' has norms with weight 1 + w" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_default_mistral_is_refused_for_its_window():
    with pytest.raises(ModelError, match="sliding_window: 4096"):
        check_supported(MistralConfig())


@pytest.mark.slow
def test_converted_model_trains_with_the_model_file_of_its_folder(converted, tmp_path):
    _, model, folder = converted("qwen2")
    arguments = ["train", "--model", str(folder / "model.yaml"), "--init-from", str(folder), "--steps", "3"]
    arguments += ["--data.task.name", "shell_game", "--batch-size", "4", "--out", str(tmp_path / "run")]
    assert main([*arguments, "--optimizer.lr", "1e-9", "--validation.rows", "4", "--runtime.device", "cpu"]) == 0
    trained = load_model(tmp_path / "run")[0]
    assert trained.model_config == model.model_config
    ids = tokens()
    assert relative(trained(ids, num_steps=2).logits, model(ids, num_steps=2).logits) < 1e-4


def test_run_and_export_keep_template_and_end_of_text_of_converted_model(converted, tmp_path):
    _, _, folder = converted("llama")
    text, data, run = tmp_path / "text.jsonl", tmp_path / "data", tmp_path / "run"
    text.write_text("".join(json.dumps({"text": f"{n} abcdefgh" * 10}) + "\n" for n in range(40)))
    arguments = ["--tokenizer", str(folder / "tokenizer.json"), "--sequence-length", "16", "--out", str(data)]
    assert main(["prepare", "--source", str(text), "--validation-share", "0.2", *arguments]) == 0
    arguments = ["--model", str(folder / "model.yaml"), "--init-from", str(folder), "--data.packed.path", str(data)]
    arguments += ["--steps", "1", "--optimizer.warmup-steps", "0", "--batch-size", "2", "--validation.rows", "2"]
    assert main(["train", *arguments, "--runtime.device", "cpu", "--out", str(run)]) == 0
    assert main(["export", "--model", str(run), "--out", str(tmp_path / "export")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("</s>", "<s>", "<pad>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    assert load_model(tmp_path / "export")[0].generation_config.eos_token_id == [2]


@pytest.mark.slow
@torch.no_grad()
def test_merged_lora_equals_the_adapted_model(converted):
    from peft import LoraConfig, get_peft_model

    _, model, _ = converted("qwen2")
    ids = tokens()
    before = model(ids, num_steps=2).logits
    config = LoraConfig(r=4, target_modules=["Wqkv", "proj", "fc", "adapter"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    expected = adapted(input_ids=ids, num_steps=2).logits
    assert relative(expected, before) > 1e-3
    assert relative(adapted.merge_and_unload()(ids, num_steps=2).logits, expected) < 1e-5
