"""Record what Transformers computes, so that tests need neither torch nor Transformers (`make golden`, extra `reference`).

For every architecture a tiny random model is written as a Hugging Face folder under tests/golden/<case>/, with `reference.npz`:

    ids       int64 [N]       a fixed sequence
    prefill   int64 []        how many of them went in as one prompt; the rest was decoded one by one against the cache
    logits    float32 [N, V]  of every position (causal models)
    hidden    float32 [B,T,H] of the last layer, with ids and mask [B,T] (encoders)

Weights are drawn much wider than Transformers would draw them (its std of 0.02 makes attention nearly uniform, so that a wrong
rotary table or mask would hide in the noise), and norms and biases are random too, so that none may be left out unnoticed.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from cases import CAUSAL, ENCODERS, ROPES, Case, make_config
from pretrained import record_minilm, record_smollm2
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 48
PREFILL = 32
TOLERANCE = 2e-4
"""Largest difference allowed between Transformers with a cache and Transformers without one (fp32 noise; logits have std ~3)."""


def randomise(model: torch.nn.Module, case: Case) -> None:
    """Give every parameter a value that matters: matrices near unit gain, norms off their neutral value, biases of 0.2."""
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower():
                parameter.add_(0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(case.embedding_std * noise)
            else:
                parameter.copy_(1.3 * noise / parameter.shape[1] ** 0.5)


def causal_logits(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    """[N, V]: prefill of the first PREFILL ids, then one token per step against the cache."""
    outputs = model(ids[None, :PREFILL], use_cache=True)
    rows, cache = [outputs.logits[0]], outputs.past_key_values
    for position in range(PREFILL, len(ids)):
        outputs = model(ids[None, position : position + 1], past_key_values=cache, use_cache=True)
        rows.append(outputs.logits[0])
        cache = outputs.past_key_values
    stepwise = torch.cat(rows)
    worst = (stepwise - model(ids[None], use_cache=False).logits[0]).abs().max().item()
    if worst > TOLERANCE:
        sys.exit(f"step by step and at once differ by {worst}: the recording would not be a reference")
    return stepwise.numpy()


def record_causal(case: Case, folder: Path) -> None:
    """One tiny decoder: its folder and its logits."""
    model = transformers.AutoModelForCausalLM.from_config(make_config(case), attn_implementation="eager").eval()
    randomise(model, case)
    model.save_pretrained(folder)
    ids = torch.randint(0, model.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(case.seed + 1))
    logits = causal_logits(model, ids)
    np.savez_compressed(folder / "reference.npz", ids=ids.numpy(), prefill=np.int64(PREFILL), logits=logits)
    print(f"{case.name}: logits std {logits.std():.2f}, {folder_bytes(folder) / 1e3:.0f} kB")


def record_encoder(case: Case, folder: Path) -> None:
    """One tiny encoder: a batch of two rows, the second one padded."""
    model = transformers.AutoModel.from_config(make_config(case), attn_implementation="eager").eval()
    randomise(model, case)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(case.seed + 1)
    ids = torch.randint(0, model.config.vocab_size, (2, 20), generator=generator)
    types = torch.randint(0, 2, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    hidden = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    np.savez_compressed(
        folder / "reference.npz", ids=ids.numpy(), mask=mask.numpy(), types=types.numpy(), hidden=hidden.numpy()
    )
    print(f"{case.name}: hidden std {hidden.std():.2f}, {folder_bytes(folder) / 1e3:.0f} kB")


def record_ropes(path: Path) -> None:
    """Inverse frequencies and attention factor of every kind of rotary scaling."""
    recorded = []
    for kind, parameters in ROPES.items():
        given = {"rope_type": kind, "rope_theta": 500000.0, **parameters}
        config = transformers.LlamaConfig(
            hidden_size=256, num_attention_heads=2, head_dim=128, max_position_embeddings=131072, rope_parameters=given
        )
        rope = LlamaRotaryEmbedding(config)
        recorded.append(
            {
                "config": given,
                "context": 131072,
                "inv_freq": rope.inv_freq.tolist(),
                "factor": float(rope.attention_scaling),
            }
        )
    path.write_text(json.dumps(recorded) + "\n")
    print(f"ropes: {', '.join(ROPES)}")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Record reference outputs of Transformers for the tests.")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden")
    parser.add_argument("--only", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--smollm2", type=Path, help="path of SmolLM2-135M-Instruct.Q4_1.gguf (skipped when absent)")
    parser.add_argument("--minilm", type=Path, help="path of the all-MiniLM-L6-v2 folder (skipped when absent)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wanted = None if options.only is None else set(options.only)
    for cases, record in ((CAUSAL, record_causal), (ENCODERS, record_encoder)):
        for case in cases:
            if wanted is None or case.name in wanted:
                folder = options.out / case.name
                folder.mkdir(parents=True, exist_ok=True)
                record(case, folder)
    if wanted is None or "ropes" in wanted:
        record_ropes(options.out / "ropes.json")
    for name, source, keep in (("smollm2", options.smollm2, record_smollm2), ("minilm", options.minilm, record_minilm)):
        if wanted is not None and name not in wanted:
            continue
        if source is None or not source.exists():
            print(f"{name}: skipped, no model given (--{name})")
            continue
        (options.out / name).mkdir(parents=True, exist_ok=True)
        keep(source, options.out / name)


if __name__ == "__main__":
    main()
