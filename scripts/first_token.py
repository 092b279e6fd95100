"""Seconds from a fresh process to the first token of a recipe's model, with random weights made on the device, while
XLA's compile cache is empty and once it is filled; then to the end of ``generate``'s first call, and of its second.

    python scripts/first_token.py bench/v2_lite
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--batch", type=int, default=1, help="prompts")
    parser.add_argument("--prompt", type=int, default=448, help="tokens of each")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cache", default="", help="of a process that is measured: its compile cache")
    parser.add_argument("--began", type=float, default=0, help="and when it was started")
    options = parser.parse_args()
    if options.cache:
        return measure(options)
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "filled"):
            print(f"compile cache {state}", flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--cache", cache, "--began", str(time.time())]
            subprocess.run(command, check=True)


def measure(options: argparse.Namespace) -> None:
    import jax

    from deepseek_jax.cli.bench_inference import Setting
    from deepseek_jax.inference.generate import begin, generate
    from deepseek_jax.workflows.pretrain import PretrainConfig
    from deepseek_jax.workflows.recipe import load_recipe

    def say(what: str) -> None:
        print(f"{time.time() - options.began:7.1f} s: {what}", flush=True)

    jax.config.update("jax_compilation_cache_dir", options.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    say(f"{jax.devices()[0].device_kind} and imports")
    recipe = dataclasses.replace(load_recipe(options.recipe, PretrainConfig), batch_size=options.batch)
    its = Setting.of(recipe, options.prompt, options.new_tokens, options.prompt + options.new_tokens, "none")
    given = its.config, its.compute, *its.weights, its.requests
    say("weights")
    with jax.set_mesh(its.mesh):
        jax.device_get(begin(*given).token_B)
        say("the first token")
        jax.device_get(generate(*given).tokens_BN)
        say("generate's first call")
        jax.device_get(generate(*given).tokens_BN)
        say("its second")


if __name__ == "__main__":
    main()
