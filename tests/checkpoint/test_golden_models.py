"""Every family's logits as transformers computed them once (tests/parity/test_models.py does so live)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.drawn import write

from deepseek_jax import load_hf

GOLDEN = json.loads(Path(__file__).with_name("golden_models.json").read_text())


@pytest.mark.parametrize("family", GOLDEN)
def test_logits_are_those_of_transformers(family, tmp_path):
    golden = GOLDEN[family]
    (tmp_path / "config.json").write_text(json.dumps(golden["config"]))
    write(tmp_path, golden["shapes"])
    model = load_hf(tmp_path, dtype="float32")
    tokens = jnp.asarray(golden["tokens"], jnp.int32)
    real = (jnp.arange(tokens.shape[1]) < jnp.asarray(golden["lengths"])[:, None]).astype(jnp.int32)
    logits = np.asarray(jax.jit(lambda tokens: model(tokens, segment_ids_BS=real).logits)(tokens))
    last = np.stack([logits[row, length - 1] for row, length in enumerate(golden["lengths"])])
    assert np.abs(last - np.array(golden["logits"])).max() <= 1e-4
    assert logits[0].argmax(axis=-1).tolist() == golden["argmax"]
