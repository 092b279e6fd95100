"""Prometheus' text."""

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from deepseek_jax.serve import meters


def test_many_at_once_are_told_as_one_by_one():
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    many, one = meters._Between("gaps", "Of tokens", meters._FAST), Histogram("gaps", "Of tokens", buckets=meters._FAST)
    ours.register(many)
    theirs.register(one)
    for seconds, times in ((0.0, 1), (0.001, 3), (0.0024, 8), (1.0, 2), (99.0, 1)):
        many.observe(seconds, times)
        for _ in range(times):
            one.observe(seconds)
    told = [line for line in generate_latest(theirs).split(b"\n") if b"_created" not in line]
    assert generate_latest(ours).split(b"\n") == told
