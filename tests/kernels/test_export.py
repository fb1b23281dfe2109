"""An exported folder contains no kernels and uses the installed ones."""

from pathlib import Path

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from recurrent_depth.hf.export import ExportConfig, export
from recurrent_depth_kernels.launch import watched

FIXTURE = Path(__file__).parents[1] / "fixtures" / "huginn_tiny"


def test_exported_code_can_use_the_kernels(tmp_path, device):
    folder = export(ExportConfig(model=str(FIXTURE), out=str(tmp_path / "model")))
    model_class = get_class_from_dynamic_module("modeling_recurrent_depth.RecurrentDepthForCausalLM", str(folder))
    assert not model_class.__module__.startswith("recurrent_depth.")
    model = model_class.from_pretrained(folder).eval().to(device)
    ids = torch.arange(1, 6, device=device)[None]
    with torch.no_grad(), watched() as launches:
        plain = model(ids, num_steps=2).logits
        assert not launches
        model.set_kernels("triton")
        fused = model(ids, num_steps=2).logits
        assert launches
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
