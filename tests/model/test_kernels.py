"""The choice of kernels, and checks of compiled kernels without a GPU. Their results are tested in tests/kernels."""

import sys
import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

import recurrent_depth_kernels as kernels
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.ops import TORCH_OPS, choose_ops, rms_norm, use_ops
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.training.config import RuntimeConfig
from recurrent_depth.training.parallel import Ranks, build_model
from recurrent_depth_kernels import autotune, catalogue, tune, tuning
from recurrent_depth_kernels.norm import norm_rows
from recurrent_depth_kernels.targets import ARCHITECTURES, assumed, warp_size

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "recurrent_depth_kernels", None)


def test_kernels_auto_is_torch_on_a_cpu_and_triton_on_a_gpu():
    assert choose_ops("auto", CPU) == TORCH_OPS
    assert choose_ops("auto", GPU).swiglu is kernels.swiglu
    assert choose_ops("torch", GPU) == TORCH_OPS


def test_kernels_triton_without_triton_says_what_to_do(without_kernels):
    with pytest.raises(ValueError, match="pip install triton, or set kernels: torch"):
        choose_ops("triton", GPU)
    with pytest.warns(UserWarning, match="auto runs torch's operations"):
        assert choose_ops("auto", GPU) == TORCH_OPS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_ops("auto", CPU)


def test_kernels_triton_on_a_cpu_is_an_error():
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device"):
        build_model(ModelConfig(), RuntimeConfig(kernels="triton"), Ranks(0, 1, CPU), seed=0)
    model = RecurrentDepthModel(ModelConfig())
    use_ops(model, choose_ops("triton", GPU))  # a model that is on the CPU although the kernels were chosen for a GPU
    with pytest.raises(ValueError, match="got tensors on cpu"):
        model(torch.ones(1, 4, dtype=torch.long), num_steps=1)


def test_use_ops_sets_every_module():
    model = RecurrentDepthModel(ModelConfig())
    chosen = choose_ops("triton", GPU)
    use_ops(model, chosen)
    holders = [m for m in model.modules() if hasattr(m, "ops")]
    assert len(holders) == 3 * (4 + 2) + 2  # blocks: four norms, attention, MLP; the core, and ln_f
    assert all(m.ops is chosen for m in holders)


def test_released_rounding_changes_bfloat16_alone():
    released = choose_ops("torch", CPU, released_rounding=True)
    x, weight = torch.randn(8, 64), torch.rand(64) + 0.5
    assert torch.equal(released.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))
    x, weight = x.bfloat16(), weight.bfloat16()
    assert not torch.equal(released.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))


def test_set_kernels_sets_the_ops_of_the_transformers_class():
    from recurrent_depth.hf.loading import wrap

    model = wrap(RecurrentDepthModel(ModelConfig()))
    model.set_kernels("auto")
    assert model.transformer.ln_f.ops == TORCH_OPS
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device"):
        model.set_kernels("triton")
    assert "kernels" not in model.config.to_dict()


def shapes_alone(graph, graphs):
    """Return a compiler backend that records the graph and returns zeros, so that nothing has to run."""
    graphs.append(graph)
    outputs = [node.meta["val"] if node is not None else None for node in graph.graph.output_node().args[0]]

    def run(*args):
        return [None if v is None else torch.zeros(v.shape, dtype=v.dtype) for v in outputs]

    return make_boxed_func(run)


def test_torch_compile_traces_the_kernels_and_their_launch_options():
    graphs = []
    backend = aot_autograd(
        fw_compiler=lambda g, _: shapes_alone(g, graphs), bw_compiler=lambda g, _: shapes_alone(g, graphs)
    )

    def block(x, y, weight, qkv, cos, sin):
        normal = kernels.add_norm(x, y, weight, 1e-6)
        q, k, v = kernels.bias_rope(qkv, None, cos, sin, 4)
        return normal.sum() + kernels.swiglu(normal).sum() + (q * k * v).sum()

    x, y, weight = (torch.randn(shape, requires_grad=True) for shape in [(2, 3, 64), (2, 3, 64), (64,)])
    qkv, cos, sin = torch.randn(2, 3, 3 * 64, requires_grad=True), torch.ones(1, 3, 16), torch.ones(1, 3, 16)
    torch._dynamo.reset()
    torch.compile(block, backend=backend, fullgraph=True)(x, y, weight, qkv, cos, sin).backward()
    found = []
    for graph in graphs:
        for node in graph.graph.nodes:
            if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
                found.append(kernel_side_table.get_kernel(node.kwargs["kernel_idx"]))
    names = [tuned.fn.fn.__name__ for tuned in found]
    assert names[:3] == ["norm_forward", "rope_forward", "swiglu_forward"]
    assert sorted(names[3:]) == ["norm_backward", "rope_backward", "swiglu_backward"]
    rope = found[1]
    assert rope.configs[0].num_warps == tuning.TABLE["rope"]["sm_90"]["num_warps"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_catalogue_launches_fit_the_limits_of_every_gpu(arch):
    launches = catalogue.launches(arch)
    assert {launch.name for launch in launches} >= {
        "norm_forward", "norm_backward", "rope_forward", "rope_backward", "swiglu_forward",
        "swiglu_backward", "normal_noise",
    }  # fmt: skip
    for launch in launches:
        assert launch.num_warps * warp_size(arch) <= 1024
        signature = launch.signature()
        assert list(signature) == launch.kernel.arg_names
        assert set(launch.constexprs()) == {name for name, kind in signature.items() if kind == "constexpr"}
    norm = launches[0]
    assert norm.signature()["x_ptr"] == "*bf16"
    assert norm.constexprs()["BLOCK"] == 8192
    assert norm.attributes("hip")[(0,)] == [["tt.divisibility", 16], ["tt.pointer_range", 32]]
    assert [["tt.divisibility", 16]] in norm.attributes("cuda").values()


@pytest.fixture
def some_gpu(tmp_path, monkeypatch):
    """Simulate a GPU's name, with an empty cache of settings."""
    monkeypatch.setenv("RECURRENT_DEPTH_CACHE", str(tmp_path))
    monkeypatch.setattr("recurrent_depth_kernels.targets._name", lambda device: "Some GPU")
    monkeypatch.setattr("recurrent_depth_kernels.targets._of_device", lambda device: "sm_90")


def test_tuning_keeps_the_fastest_launch_of_every_op(some_gpu):
    """The simulated time grows with the number of threads, and blocks of 4096 do not launch."""

    def seconds(launch):
        block = launch.constants.get("BLOCK", launch.constants.get("BLOCK_S", 0))
        if block == 4096:
            raise RuntimeError("out of registers")
        return 1e-6 * launch.num_warps + 1e-9 * block

    calls = tune.examples(torch.device("meta"), torch.bfloat16, rows=4, width=264, heads=11, inner=600)
    found = tune.tune(calls, torch.bfloat16, "Some GPU", seconds)
    autotune.write(autotune.cache_file(), found)
    assert tuning.settings("rope", 264, torch.bfloat16, GPU) == {"block": 512, "num_warps": 2}
    assert tuning.settings("swiglu", 600, torch.bfloat16, GPU) == {"block": 512, "num_warps": 2}
    assert tuning.row_settings("norm", 264, torch.bfloat16, GPU) == (512, 1)  # fewest warps
    for op in ("attend_one", "attend_many"):  # kept by head size
        assert tuning.settings(op, 24, torch.bfloat16, GPU) == {"block": 16, "waves": 2, "num_warps": 2}
    for unmeasured in [("rope", 5280, torch.bfloat16), ("rope", 264, torch.float32)]:
        assert tuning.settings(*unmeasured, GPU) == tuning.TABLE["rope"]["sm_90"]
    with assumed("gfx942"):  # measurements of this GPU are not used for another one
        assert tuning.settings("rope", 264, torch.bfloat16, GPU) == tuning.TABLE["rope"]["gfx942"]
    autotune.write(autotune.cache_file(), {autotune.key("rope", 48, torch.bfloat16, "Some GPU"): {"block": 1024}})
    assert tuning.settings("rope", 264, torch.bfloat16, GPU)["block"] == 512  # a second entry keeps the first


def test_tuning_cache_damage_is_named(tmp_path):
    (tmp_path / "kernels.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        autotune.read(tmp_path / "kernels.json")
    with pytest.raises(RuntimeError, match="no configuration ran"):
        autotune.best([{"block": 1}], lambda candidate: (_ for _ in ()).throw(RuntimeError("spills")))


def test_row_ops_refuse_rows_that_are_too_wide():
    x = torch.empty(2, 40_000, device="meta")
    with assumed("sm_90"), pytest.raises(ValueError, match="wider than 32768"):
        norm_rows(x, None, torch.empty(40_000, device="meta"), 1e-6, False)
