"""How long loading and writing a checkpoint take, beside reading the same files and beside transformers.

    .venv/bin/python scripts/bench_checkpoint.py [--gigabytes 2.2] [--folder /tmp] [--peer-python .venv-peer/bin/python]

It writes random weights of DeepSeek-V3's layout, in bfloat16 and in FP8, into a temporary folder, which it removes.
Everything is timed from the page cache, best of --repeats, in processes of their own. The first load of a process
compiles some dozen programs, which deepseek-jax's commands keep on disk; both times are printed. The peer is
transformers' from_pretrained followed by a touch of every parameter (alone it maps the file).
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

PEER = """
import sys, time, warnings
warnings.simplefilter("ignore")
import torch, transformers
transformers.logging.set_verbosity_error()
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.view(torch.uint8).sum() if parameter.dim() else parameter.item()
print(time.perf_counter() - start)
"""


def model_config(gigabytes: float):
    from deepseek_jax.config import ModelConfig

    fixed, layer = 0.35e9, 12 * 3 * 1024 * 1024 * 2  # bytes beside the experts, and of 12 experts
    experts = max(8, 8 * round(12 * (gigabytes * 1e9 - fixed) / (layer * 2 * 2) / 8))
    return ModelConfig(
        vocab_size=32768, hidden_size=2048, num_hidden_layers=3, intermediate_size=4096, num_attention_heads=16,
        q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=experts, moe_intermediate_size=1024, num_experts_per_tok=8, first_k_dense_replace=1,
        n_group=8, topk_group=4, routed_scaling_factor=2.5, num_nextn_predict_layers=0,
    )  # fmt: skip


def write_random(folder: Path, config, fp8: bool) -> None:
    """A checkpoint of random bits that are small, finite numbers."""
    import ml_dtypes

    from deepseek_jax.checkpoint.hf_names import hf_tensors
    from deepseek_jax.checkpoint.hf_save import QUANTISED
    from deepseek_jax.checkpoint.safetensors_writing import Planned, write_folder

    plan = []
    for tensor in hf_tensors(config):
        quantised = fp8 and tensor.quantised
        bias = tensor.name.endswith("e_score_correction_bias")
        dtype = np.float32 if bias else ml_dtypes.float8_e4m3fn if quantised else ml_dtypes.bfloat16
        plan.append(Planned(tensor.name, np.dtype(dtype), tensor.shape))
        if quantised:
            plan.append(Planned(tensor.scale_name, np.dtype(np.float32), tensor.scale_shape))
    kinds = {item.name: item for item in plan}
    noise = np.random.default_rng(0).standard_normal(2**24).astype(np.float32)
    pools = {item.dtype: (0.02 * noise).astype(item.dtype) for item in plan}

    def produce(name: str) -> np.ndarray:
        item = kinds[name]
        size, pool = math.prod(item.shape), pools[item.dtype]
        repeated = pool if size <= pool.size else np.concatenate([pool] * -(-size // pool.size))
        return repeated[:size].reshape(item.shape)

    folder.mkdir()
    write_folder(folder, plan, produce, max_shard_bytes=10**9)
    released = config.to_hf() | {"torch_dtype": "bfloat16"} | ({"quantization_config": QUANTISED} if fp8 else {})
    (folder / "config.json").write_text(json.dumps(released))


def read_seconds(folder: Path) -> float:
    """Read the files into memory, one after the other, and keep them."""
    start = time.perf_counter()
    kept = [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]
    seconds = time.perf_counter() - start
    del kept
    return seconds


def write_seconds(folder: Path, target: Path) -> float:
    """Write the files' bytes once more, each followed by fsync."""
    kept = [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]
    target.mkdir()
    start = time.perf_counter()
    for n, content in enumerate(kept):
        with open(target / str(n), "wb", buffering=0) as stream:
            left = memoryview(content)
            while left:
                left = left[stream.write(left) :]
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


class Peak:
    """The largest RssAnon of this process while it runs, in bytes."""

    def __enter__(self):
        self.largest, self._stop = self.now(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.largest = max(self.largest, self.now())

    @staticmethod
    def now() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])


def measure(what: str, folder: str, target: str) -> None:
    """In a process of its own: print seconds, and the peak of memory beside the parameters."""
    import jax

    import deepseek_jax
    from deepseek_jax.model.parameters import split

    dtype = "float8_e4m3" if what.endswith("fp8") else "bfloat16"

    def load():
        start = time.perf_counter()
        model = deepseek_jax.load_hf(folder, dtype=dtype)
        jax.block_until_ready(split(model))
        return model, time.perf_counter() - start

    with Peak() as peak:
        model, first = load()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(split(model)))
    result = {"seconds": first, "first": first, "beside": peak.largest - size, "parameters": size}
    if what.startswith("load"):
        del model
        _, result["seconds"] = load()
    else:
        start = time.perf_counter()
        deepseek_jax.save_hf(model, target, dtype=dtype)
        result["seconds"] = time.perf_counter() - start
    print(json.dumps(result))


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--folder", default=None, help="where the temporary folder is made")
    parser.add_argument("--peer-python", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for kind in ("bf16", "fp8"):
            folder = Path(scratch) / kind
            write_random(folder, model_config(options.gigabytes * (1 + (kind == "fp8"))), kind == "fp8")
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            reading = min(read_seconds(folder) for _ in range(options.repeats))
            writing = min(write_seconds(folder, Path(scratch) / "written") for _ in range(options.repeats))
            print(f"{kind}: {size / 1e9:.2f} GB, read() {reading:.2f} s, write() and fsync {writing:.2f} s", flush=True)
            cases = ("load", "save") if kind == "bf16" else ("load", "load-fp8", "save-fp8")
            for case in cases:
                best: dict = {}
                for n in range(options.repeats):
                    target = str(Path(scratch) / f"{case}{n}")
                    command = (sys.executable, __file__, "--measure", case, str(folder), target)
                    found = json.loads(run(*command))
                    shutil.rmtree(target, ignore_errors=True)
                    best = found if not best or found["seconds"] < best["seconds"] else best
                saved = case.startswith("save")
                print(
                    f"  {case:9} {best['seconds']:.2f} s, {best['seconds'] / (writing if saved else reading):.2f} x "
                    f"{'write()' if saved else 'read()'}; first load, which compiles: {best['first']:.2f} s; RssAnon "
                    f"beside {best['parameters'] / 1e9:.2f} GB of parameters: {best['beside'] / 1e6:.0f} MB",
                    flush=True,
                )
            if options.peer_python and kind == "bf16":
                seconds = min(float(run(options.peer_python, "-c", PEER, str(folder))) for _ in range(options.repeats))
                print(f"  transformers, touching every parameter: {seconds:.2f} s, {seconds / reading:.2f} x read()")
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
