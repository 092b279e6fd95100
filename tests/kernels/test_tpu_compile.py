"""The TPU kernels at real shapes, compiled for chips that are not here. Nothing runs.

Other shapes, among them 128k tokens and 384 experts, are tried by ``python -m deepseek_kernels.compile_tpu``.
"""

import pytest

from deepseek_kernels import compile_tpu

V2_LITE, V3 = "16 heads", "128 heads"
CASES = {
    "v5e": (f"attention, {V2_LITE}, 4096", "experts V3, 8 of 256, wi", f"decode, 64 x 4096, {V2_LITE}"),
    "v5p": (f"attention, {V3}, 4096", "experts V3, 8 of 256, wo", f"decode, 64 x 4096, {V3}"),
    "v6e": (f"attention, {V2_LITE}, 32768", "experts V2-Lite, wo", f"decode, 64 x 1000, {V2_LITE}"),
    "tpu7x": (f"attention, {V2_LITE}, 8192 of 32768", "experts V2-Lite, wi", f"decode, 8 x 32768, {V3}, 4 queries"),
}
MOST = {  # MiB of temporaries. Scores in bfloat16 would be 512 for each 4096² of 16 heads, a copy of a cache 300
    f"attention, {V2_LITE}, 4096": 150,
    f"attention, {V3}, 4096": 1700,
    f"attention, {V2_LITE}, 32768": 1700,
    f"attention, {V2_LITE}, 8192 of 32768": 1700,
    # The weights in bfloat16 (0.10's compiler puts them where their gradient comes), the product, the rows transposed.
    "experts V3, 8 of 256, wi": 700,
    "experts V3, 8 of 256, wo": 420,
    "experts V2-Lite, wi": 1300,
    "experts V2-Lite, wo": 760,
}
FLOPS = {  # three products of the rows, whatever the number of experts
    "experts V3, 8 of 256, wi": 6 * 8192 * 7168 * 4096,
    "experts V3, 8 of 256, wo": 6 * 8192 * 2048 * 7168,
    "experts V2-Lite, wi": 6 * 6 * 8192 * 2048 * 2816,
    "experts V2-Lite, wo": 6 * 6 * 8192 * 1408 * 2048,
}


@pytest.mark.skipif(
    not compile_tpu.available(), reason="it needs libtpu: python -m deepseek_kernels.compile_tpu --install"
)
@pytest.mark.parametrize("chip", CASES)
def test_kernels_compile_for_chips_that_are_not_here(chip):
    """Within the chip's vector memory, or the compiler would fail; nothing of S × T or of E × rows beside them."""
    for case, found in zip(CASES[chip], compile_tpu.apart(chip, *CASES[chip]), strict=True):
        assert found["temporaries"] <= MOST.get(case, 100) * 2**20, (case, found)
        if case in FLOPS:
            assert found["flops"] == pytest.approx(FLOPS[case], rel=1e-3), case
