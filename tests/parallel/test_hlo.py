"""What is read of an HLO's text itself; how often loops turn: see test_collectives.py."""

import pytest

from deepseek_jax.parallel.hlo import Module, shape_bytes


def test_bytes_of_shapes_and_texts_that_are_none():
    assert shape_bytes("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s4[3], f8e4m3fn[5], pred[7], token[])") == 2048 + 2 + 5 + 7
    with pytest.raises(ValueError, match="no HLO module"):
        Module("nothing")
