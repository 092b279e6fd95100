"""What a stage is told that cannot be, refused before rows are packed."""

import pytest
from model.tiny import whole
from small import SPEAKER

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.workflows.sft import SFTConfig
from deepseek_jax.workflows.stage_config import StageConfig, check_start


def test_devices_to_which_experts_cannot_be_dealt_are_known_before_rows_are_packed():
    start = whole(SPEAKER, None, None)
    check_start(SFTConfig(loss=LanguageModelLoss(balance_devices=3)), start)  # nothing asks for them
    with pytest.raises(ValueError, match="balance_devices=3 does not divide n_routed_experts=8"):
        check_start(SFTConfig(loss=LanguageModelLoss(balance_devices=3, drop_capacity=1.0)), start)


def test_masters_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="compute.param_dtype='bfloat16': a stage trains float32 masters"):
        StageConfig(compute=ComputeConfig(param_dtype="bfloat16"))
