"""The demo's corpus: the running Python's standard library, and worked arithmetic.

    deepseek-jax corpus demo/corpus

2 CPU cores: 3 seconds.
"""

from deepseek_jax.workflows.corpus import CorpusConfig
from deepseek_jax.workflows.demo import CorpusStage


def config() -> CorpusStage:
    return CorpusStage(folder="runs/demo/corpus", corpus=CorpusConfig(vocab_size=512, arithmetic_share=0.5))
