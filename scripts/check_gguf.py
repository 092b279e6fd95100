"""Whether llama.cpp reads what is written here: its own converter and runtime, greedy tokens compared.

    python scripts/check_gguf.py WORK TOKENIZER [MODEL …]

WORK: a folder for llama.cpp, from the source distribution of `llama-cpp-python` on PyPI (CMake, a C++ compiler, five
minutes of two cores), the models and their GGUF files; what is there is used again. TOKENIZER: a folder with R1's
tokenizer.json, plain or gzipped, whose splitting llama.cpp's converter knows. Needs torch, transformers and gguf
(`pip install -e '.[parity]'`). MODEL: one of those below, by default each. docs/results/gguf.md holds a result.
"""

import gzip
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax import Engine, ModelConfig, SamplingParams, load, save_hf
from deepseek_jax.checkpoint.model import Model
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import RopeScaling
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model import parameters
from deepseek_jax.parallel.mesh import make_mesh

PACKAGE = "llama-cpp-python==0.3.36"
PROMPTS = (
    "The quick brown fox",
    "def add(a, b):\n    return",
    "Die Antwort ist 42, nicht 17.",
    "素数は無限に存在する。",
    "1 2 3 4 5 6 7 8 9 10 " * 8,
)
TOKENS = 48
Fields = dict[str, Any]
_TINY: Fields = dict(vocab_size=129280, hidden_size=64, intermediate_size=96, num_attention_heads=4)
_TINY |= dict(max_position_embeddings=512, num_hidden_layers=3)
_MLA: Fields = _TINY | dict(kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
_MLA |= dict(q_lora_rank=32, moe_intermediate_size=32, n_routed_experts=16, n_group=4, topk_group=2)
_V2: Fields = _MLA | dict(scoring="softmax", norm_topk_prob=False, num_nextn_predict_layers=0)
_YARN: Fields = dict(type="yarn", factor=40.0, original_max_position_embeddings=64)
_LLAMA3 = RopeScaling("llama3", 8.0, original_max_position_embeddings=64)
MODELS: dict[str, Fields] = {
    "v3 with MTP": _MLA | dict(routed_scaling_factor=2.5, rope_scaling=RopeScaling(**_YARN)),
    # llama.cpp knows a network without compressed queries by its 27 layers.
    "v2-lite": _V2
    | dict(topk_method="greedy", q_lora_rank=0, n_routed_experts=8, n_shared_experts=2, num_hidden_layers=27)
    | dict(rope_scaling=RopeScaling(**_YARN, mscale=0.707, mscale_all_dim=0.707)),
    "v2 with groups": _V2 | dict(topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    "llama": _TINY
    | dict(attention="gqa", num_key_value_heads=2, head_dim=16, rope_interleave=False, rope_scaling=_LLAMA3)
    | dict(num_hidden_layers=4, n_routed_experts=0, first_k_dense_replace=4, num_nextn_predict_layers=0),
}
KNOWN = {"v2 with groups": "llama.cpp ranks groups by their two best experts, as V3 does; V2 by the best"}


def build(work: Path) -> Path:
    """The unpacked source distribution, with libllama built in ``<work>/build``."""
    name = PACKAGE.replace("-", "_").replace("==", "-")
    if not (work / name).is_dir():
        _pip("download", "--no-deps", "--no-binary", ":all:", "-d", str(work), PACKAGE)
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    if not (work / "site").is_dir():
        _pip("install", "--target", str(work / "site"), "diskcache", "sentencepiece")
    if not (work / "build" / "bin" / "libllama.so").exists():
        off = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")
        flags = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", *(f"-DLLAMA_BUILD_{part}=OFF" for part in off)]
        source, target = str(work / name / "vendor" / "llama.cpp"), str(work / "build")
        subprocess.run(["cmake", "-S", source, "-B", target, *flags], check=True)
        subprocess.run(["cmake", "--build", target, "--target", "llama", "-j"], check=True)
    return work / name


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True)


def tokenizer(source: Path, target: Path) -> Tokenizer:
    """R1's, unpacked."""
    target.mkdir(exist_ok=True)
    packed = source / "tokenizer.json.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else (source / "tokenizer.json").read_bytes()
    (target / "tokenizer.json").write_bytes(raw)
    (target / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return Tokenizer.from_folder(target)


def drawn(config: ModelConfig, text: Tokenizer) -> Model:
    """A model whose answers hang on everything: wide weights, gains that are not 1, a routing bias."""
    rng = np.random.default_rng(0)
    params, bias = parameters.abstract_arrays(config)

    def draw(path, leaf):
        wide = 0.15 * rng.standard_normal(leaf.shape)
        return jax.numpy.asarray(1 + wide if "gain" in jax.tree_util.keystr(path) else wide, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, params)
    bias = None if bias is None else jax.numpy.asarray(0.1 * rng.standard_normal(bias.shape), "float32")
    mesh = make_mesh(devices=jax.devices()[:1])
    return Model(config, ComputeConfig(dtype="float32").on(mesh), params, bias, text, mesh)


def ours(folder: Path) -> list[tuple[list[int], list[int]]]:
    """(The prompt's ids, the greedy answer's) for each prompt."""
    model = load(folder, compute=ComputeConfig(dtype="float32", param_dtype="float32"))
    prompts = [model.text.encode(prompt) for prompt in PROMPTS]
    answers = Engine(model).generate(prompts, SamplingParams(temperature=0.0, max_tokens=TOKENS))
    return [(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]


# Runs in a process of its own: llama.cpp's binding from its source folder, with a float32 cache (by default float16).
THEIRS = """
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, type_k=0, type_v=0, verbose=False)
out = []
for text in json.loads(sys.argv[2]):
    ids = model.tokenize(text.encode(), add_bos=False, special=True)
    answer = []
    for token in model.generate(ids, temp=0.0, reset=True):
        answer.append(token)
        if token == model.token_eos() or len(answer) == int(sys.argv[3]):
            break
    out.append([ids, answer])
print(json.dumps(out))
"""


def theirs(work: Path, source: Path, folder: Path) -> list[tuple[list[int], list[int]]]:
    """The same by llama.cpp's converter and runtime, all in float32."""
    converter, gguf = source / "vendor" / "llama.cpp", folder.with_suffix(".gguf")
    path = {"PYTHONPATH": os.pathsep.join((str(converter / "gguf-py"), str(work / "site")))}
    convert = [sys.executable, converter / "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", gguf]
    subprocess.run([*map(str, convert)], check=True, env=os.environ | path)
    environment = {
        "PYTHONPATH": os.pathsep.join((str(source), str(work / "site"))),
        "LLAMA_CPP_LIB_PATH": str(work / "build" / "bin"),
    }
    run = [sys.executable, "-c", THEIRS, str(gguf), json.dumps(PROMPTS), str(TOKENS)]
    done = subprocess.run(run, check=True, env=os.environ | environment, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def main(work: Path, source: Path, names: list[str]) -> int:
    work.mkdir(parents=True, exist_ok=True)
    llama_cpp = build(work)
    text = tokenizer(source, work / "tokenizer")
    wrong = 0
    for name in names or MODELS:
        folder = work / name.replace(" ", "_")
        if not folder.exists():
            save_hf(drawn(ModelConfig(**MODELS[name]), text), folder, dtype="float32")
        pairs = [*zip(ours(folder), theirs(work, llama_cpp, folder), strict=True)]
        ids = sum(list(a[0]) == b[0] for a, b in pairs)
        same = sum(x == y for a, b in pairs for x, y in zip(a[1], b[1], strict=False))
        total = sum(len(a[1]) for a, b in pairs)
        known = f" ({KNOWN[name]})" if name in KNOWN else ""
        alike = f"prompts tokenised alike {ids}/{len(pairs)}, greedy tokens alike {same}/{total}"
        print(f"{name}: {alike}{known}", flush=True)
        wrong += name not in KNOWN and (ids < len(pairs) or same < total)
    return int(wrong > 0)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]), sys.argv[3:]))
