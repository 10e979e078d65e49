"""One process of llama.cpp through llama-cpp-python, timed as ours is; runs in an interpreter of its own that has `llama_cpp`."""

import json
import sys
import time

import llama_cpp
import numpy as np


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    threads = asked["threads"]
    engine = llama_cpp.Llama(
        asked["gguf"], n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
    )
    generate(engine, asked["prompt"], asked["warm_tokens"])
    runs = [generate(engine, asked["prompt"], asked["new_tokens"])]
    print(json.dumps({"version": llama_cpp.__version__, "runs": runs}))


def generate(engine: llama_cpp.Llama, prompt: list[int], new_tokens: int) -> dict[str, object]:
    engine.reset()
    engine._ctx.kv_cache_clear()  # noqa: SLF001 - reset() alone keeps what an equal prompt has filled
    vocabulary = engine.n_vocab()

    def step(ids: list[int]) -> int:
        engine.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(engine.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    began, began_cpu = time.perf_counter(), time.process_time()
    tokens = [step(prompt)]
    first, first_cpu = time.perf_counter(), time.process_time()
    while len(tokens) < new_tokens:
        tokens.append(step(tokens[-1:]))
    done, done_cpu = time.perf_counter(), time.process_time()
    decoded = len(tokens) - 1
    return {
        "prefill_tokens_per_s": len(prompt) / (first - began),
        "prefill_cpu_s_per_token": (first_cpu - began_cpu) / len(prompt),
        "decode_tokens_per_s": decoded / (done - first),
        "decode_cpu_s_per_token": (done_cpu - first_cpu) / decoded,
        "tokens": tokens,
    }


if __name__ == "__main__":
    main()
