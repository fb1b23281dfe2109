import math

import pytest
import torch

from recurrent_depth.checks import (
    check_at_least,
    check_between,
    check_each_at_least,
    check_fraction,
    check_positive,
)
from recurrent_depth.devices import choose_device, choose_dtype


def test_checks_pass_allowed_values_and_unset_fields() -> None:
    check_at_least("a", 1, 1)
    check_at_least("a", None, 1)
    check_positive("a", 1e-9)
    check_positive("a", math.inf, infinite=True)
    check_between("a", 1, 0, 1)
    check_fraction("a", 0)
    check_each_at_least("a", [1, 2], 1)
    check_each_at_least("a", [], 1, empty=True)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf])
def test_check_positive_refuses(value: float) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.lr is .*finite number above 0"):
        check_positive("optimizer.lr", value)


def test_checks_name_field_value_and_range() -> None:
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        check_at_least("steps", 0, 1)
    with pytest.raises(ValueError, match=r"at least 1"):
        check_at_least("steps", math.nan, 1)
    with pytest.raises(ValueError, match=r"beta is 1; it must lie in \[0, 1\)"):
        check_between("beta", 1, 0, 1, high_open=True)
    with pytest.raises(ValueError, match=r"share is nan; it must lie in \[0, 1\]"):
        check_fraction("share", math.nan)
    with pytest.raises(ValueError, match=r"num_steps is \[1, 0\]; every entry must be at least 1"):
        check_each_at_least("num_steps", [1, 0], 1)
    with pytest.raises(ValueError, match="num_steps is empty"):
        check_each_at_least("num_steps", [], 1)


def test_device_auto_follows_torch_and_unknown_names_are_refused() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device().type == expected
    assert choose_device("cpu").type == "cpu"
    for name in ("bogus", "cuda:99", "meta", ""):
        with pytest.raises(ValueError, match="device is"):
            choose_device(name)


def test_dtype_auto_is_bfloat16_on_a_gpu_only() -> None:
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        choose_dtype("int8", torch.device("cpu"))
