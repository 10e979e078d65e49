"""Logits of a GGUF model in Transformers: `transformers_logits.py MODEL.gguf IDS.npy OUT.npy` (needs torch and accelerate)."""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main() -> None:
    gguf, given, made = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.no_grad():
        np.save(made, model(torch.from_numpy(np.load(given))[None]).logits[0].numpy())


if __name__ == "__main__":
    main()
