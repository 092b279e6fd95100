"""Times torch's grouped product or its cuDNN attention for ``deepseek_kernels.bench``, on one GPU in bfloat16.

``peer_kernels.py JOB`` with a JSON object: ``repeats`` and either ``sizes`` (rows per group), ``width`` and ``hidden``,
or ``attention``: batch, tokens, heads, key width and value width of causal rows. Prints median seconds of ``forward``
and ``forward+backward``, the mean of ten calls in a row each, as JSON.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false
# (torch is in the peer's environment alone)

import json
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

NEW = {"dtype": torch.bfloat16, "device": "cuda"}


def median_seconds(call, repeats):
    call()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / 10)
    return statistics.median(seconds)


def grouped(sizes, width, hidden):
    x = torch.randn(sum(sizes), width, **NEW, requires_grad=True)
    w = torch.randn(len(sizes), width, hidden, **NEW).div_(width**0.5).requires_grad_()
    ends = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
    return lambda x, w: torch._grouped_mm(x, w, offs=ends), (x, w)


def attention(batch, tokens, heads, key_width, value_width):
    shapes = [(batch, heads, tokens, width) for width in (key_width, key_width, value_width)]

    def attend(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend, tuple(torch.randn(shape, **NEW, requires_grad=True) for shape in shapes)


def main():
    job = json.loads(sys.argv[1])
    repeats = job.pop("repeats")
    function, inputs = attention(*job["attention"]) if "attention" in job else grouped(**job)
    dout = torch.randn_like(function(*inputs))

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def both():
        for x in inputs:
            x.grad = None
        function(*inputs).backward(dout)

    found = {"forward": median_seconds(forward, repeats), "forward+backward": median_seconds(both, repeats)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
