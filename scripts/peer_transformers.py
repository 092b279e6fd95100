"""The peer's side of the speed benchmark: transformers' DeepseekV3ForCausalLM on torch, on a CPU or an NVIDIA GPU.

    .venv-peer/bin/python scripts/peer_transformers.py < request.json

It runs in a venv of its own (`make peer`), started by `deepseek-jax bench`. It reads one JSON object

    {"config": {"hidden_size": 128, ...},          a config.json of the model type deepseek_v3
     "rows": 8, "seq": 128, "steps": 10,           the training batch, and how many steps are timed
     "decode_batches": [64, 1], "prompt": 32, "new_tokens": 96, "repeats": 3,
     "phases": [],                                 batches whose prompts and whose later tokens are timed apart
     "threads": [2, 1], "seed": 0,
     "device": "cpu", "dtype": "float32",          or "cuda" and "bfloat16": parameters and optimizer's state in it;
                                                   "auto" is a GPU where there is one
     "checkpointed": false}                        activations of a layer computed again in the backward pass

(only "config" must be there; the rest has the values shown, and without steps or batches that part is left out)
and prints one JSON line with tokens a second: medians over steps or repeats, after a warm-up, each with the
number of threads that did best (torch's threads wait for each other spinning, so on a machine that is busy
otherwise two are many times slower than one: the load average stands in the result). Training is forward,
backward and a fused AdamW step, all in the one dtype, without MTP, which the peer does not train. Decoding is
greedy `generate` with its cache: the new tokens over the whole call, prefill included, and no token ends an
answer early.
"""
# pyright: reportMissingImports=false, reportArgumentType=false
# (torch and transformers are in the peer's venv alone)

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure. The fields are those of the JSON object."""

    config: dict[str, Any]
    rows: int = 8
    seq: int = 128
    steps: int = 10
    decode_batches: tuple[int, ...] = (64, 1)
    phases: tuple[int, ...] = ()
    prompt: int = 32
    new_tokens: int = 96
    repeats: int = 3
    threads: tuple[int, ...] = (2, 1)
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    checkpointed: bool = False


def read_request(text: str) -> Request:
    """Parses the JSON object. An unknown field or a missing config is a ValueError that names it."""
    fields = json.loads(text)
    known = {field.name for field in dataclasses.fields(Request)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown fields {unknown}: known are {sorted(known)}")
    if not isinstance(fields.get("config"), dict):
        raise ValueError('the request needs "config", an object with the fields of a config.json')
    if fields.get("device") == "auto":
        fields |= {"device": "cuda", "threads": [1]} if torch.cuda.is_available() else {"device": "cpu"}
    return Request(**fields)


def build_model(request: Request) -> torch.nn.Module:
    """The model with random weights, experts by grouped_mm, attention by SDPA."""
    torch.manual_seed(request.seed)
    config = transformers.DeepseekV3Config(**request.config)
    config._experts_implementation = "grouped_mm"
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(getattr(torch, request.dtype))  # no copy in float32: V2-Lite's would fill a card
    with torch.device(request.device):
        model = transformers.DeepseekV3ForCausalLM(config)
    if request.checkpointed:
        model.gradient_checkpointing_enable()
    assert model.config._experts_implementation == "grouped_mm"
    # Every answer has the full length: nothing is an end of text.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def median_seconds(call: Callable[[], object], *, warm_up: int, repeats: int) -> float:
    """The median time of `repeats` calls, after `warm_up` that are not timed."""
    seconds = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])


def train_speed(model: torch.nn.Module, request: Request) -> float:
    """Tokens a second of forward, backward and AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, request.config["vocab_size"], (request.rows, request.seq), device=request.device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    return request.rows * request.seq / median_seconds(step, warm_up=3, repeats=request.steps)


def decode_seconds(model: Any, batch: int, new_tokens: int, request: Request) -> float:
    """Of greedy generation, prefill included."""
    prompt = torch.randint(0, request.config["vocab_size"], (batch, request.prompt), device=request.device)
    mask = torch.ones_like(prompt)

    def generate() -> None:
        ids = model.generate(prompt, attention_mask=mask, do_sample=False, use_cache=True, max_new_tokens=new_tokens)
        assert ids.shape == (batch, request.prompt + new_tokens), ids.shape

    model.eval()
    with torch.inference_mode():
        return median_seconds(generate, warm_up=1, repeats=request.repeats)


def decode_speed(model: Any, batch: int, request: Request) -> float:
    """New tokens a second, prefill included."""
    return batch * request.new_tokens / decode_seconds(model, batch, request.new_tokens, request)


def phases_speed(model: Any, batch: int, request: Request) -> dict[str, dict[str, float]]:
    """The prompt's tokens a second up to the first new one, and the new ones behind it."""
    first = decode_seconds(model, batch, 1, request)
    steps = decode_seconds(model, batch, 1 + request.new_tokens, request) - first
    speeds = {"prefill": batch * request.prompt / first, "decode": batch * request.new_tokens / steps}
    return {work: {"tokens_per_second": round(speed, 1)} for work, speed in speeds.items()}


def best(measure: Callable[[], float], threads: tuple[int, ...]) -> dict[str, float]:
    """The highest of the speeds measured with each number of threads, and that number."""
    speeds = {}
    for count in threads:
        torch.set_num_threads(count)
        speeds[count] = measure()
    fastest = max(speeds, key=speeds.__getitem__)
    return {"tokens_per_second": round(speeds[fastest], 1), "threads": fastest}


def main() -> None:
    """Reads the request, measures, prints one JSON line."""
    transformers.logging.set_verbosity_error()
    request = read_request(sys.stdin.read())
    load_before = os.getloadavg()[0]
    model = build_model(request)
    result = {
        "peer": f"transformers {transformers.__version__}, torch {torch.__version__}, grouped_mm, {request.dtype}"
        + (", checkpointed" if request.checkpointed else ""),
        "load_average_before": round(load_before, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_batch": [request.rows, request.seq],
        "train": best(lambda: train_speed(model, request), request.threads) if request.steps else None,
        "decode": {
            str(batch): best(lambda batch=batch: decode_speed(model, batch, request), request.threads)
            for batch in request.decode_batches
        },
        "phases": {str(batch): phases_speed(model, batch, request) for batch in request.phases},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
