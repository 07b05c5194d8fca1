"""The registry of quantization schemes: what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finhpc.errors import ConfigError
from finhpc.quantization.bitsandbytes import Nf4
from finhpc.quantization.frozen import FrozenFloat, FrozenLinear, Tensors
from finhpc.quantization.minmax import MinMax
from finhpc.quantization.schemes import SCHEMES, check_scheme


class Forgetful(MinMax):
    """Its layers have another matrix than the one that was quantized."""

    def frozen(self, tensors: Tensors, shape: tuple[int, int], bias: Tensor | None, bits: int) -> FrozenLinear:
        return FrozenFloat(torch.zeros(shape), bias)


class Fp4(Nf4):
    quant_type = "fp4"


def test_a_scheme_is_checked_when_it_is_registered() -> None:
    SCHEMES.check("fp4", Fp4())
    with pytest.raises(ConfigError, match=r"scheme=forgetful is wrong: at 8 bits .* 100% away .* correct its tensors"):
        SCHEMES.check("forgetful", Forgetful())
    for odd in (MinMax, object()):
        with pytest.raises(ConfigError, match=r"scheme=odd must be an instance of .*\.Scheme"):
            SCHEMES.check("odd", odd)


def test_unknown_schemes_and_other_bits_are_refused() -> None:
    check_scheme(4, "minmax")
    with pytest.raises(ConfigError, match=r"scheme=nf5 is unknown; did you mean 'nf4'\? One of your own comes from"):
        check_scheme(4, "nf5")
    with pytest.raises(ConfigError, match=r"use quantization\.bits=4, or a scheme of 8 bits: minmax, int8"):
        check_scheme(8, "nf4")
