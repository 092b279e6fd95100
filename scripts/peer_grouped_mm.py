"""Times torch's grouped product for ``deepseek_kernels.bench``, on one GPU in bfloat16.

``peer_grouped_mm.py JOB`` with a JSON object: ``sizes`` (rows per group), ``width``, ``hidden`` and ``repeats``. Prints
median seconds of ``forward`` and ``forward+backward``, the mean of ten calls in a row each, as JSON.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false
# (torch is in the peer's environment alone)

import json
import statistics
import sys
import time

import torch


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


def main():
    job = json.loads(sys.argv[1])
    sizes, width, hidden = job["sizes"], job["width"], job["hidden"]
    new = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(sum(sizes), width, **new, requires_grad=True)
    w = torch.randn(len(sizes), width, hidden, **new).div_(width**0.5).requires_grad_()
    dy = torch.randn(sum(sizes), hidden, **new)
    ends = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)

    def forward():
        with torch.no_grad():
            return torch._grouped_mm(x, w, offs=ends)

    def both():
        x.grad = w.grad = None
        torch._grouped_mm(x, w, offs=ends).backward(dy)

    repeats = job["repeats"]
    found = {"forward": median_seconds(forward, repeats), "forward+backward": median_seconds(both, repeats)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
