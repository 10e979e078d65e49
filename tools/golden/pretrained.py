"""References of the two real models: what Transformers says about a fixed text, kept small."""

from pathlib import Path

import numpy as np
import torch
import transformers

TEXT = (
    "The harbour was quiet before sunrise. Fishermen checked their nets, counted the boxes and looked at the sky, because the "
    "forecast on the radio had promised wind from the north by noon. At the edge of the pier a small computer measured the tide "
    "every ten seconds and sent one line of text to the town. Nobody had to watch it."
)
POSITIONS = 64
TOP = 32
SENTENCES = (
    "A small boat waits in the harbour.",
    "The vessel is moored at the quay.",
    "Quarterly revenue grew by eleven percent.",
    "Where is the nearest pharmacy?",
    "木の葉が川を流れていく。",
)


def record_smollm2(gguf: Path, folder: Path) -> None:
    """Top logits and the log of the partition sum at the first POSITIONS positions of TEXT (dequantised GGUF, fp32)."""
    loaded = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **loaded)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, attn_implementation="eager", **loaded
    ).eval()
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False).input_ids[:POSITIONS])
    logits = model(ids[None]).logits[0]
    values, tokens = logits.topk(TOP, dim=-1)
    partition = logits.double().logsumexp(dim=-1)
    kept = {"ids": ids, "top_tokens": tokens.int(), "top_logits": values, "logsumexp": partition}
    np.savez_compressed(folder / "reference.npz", **{name: value.numpy() for name, value in kept.items()})
    print(f"smollm2: {len(ids)} positions, mean nll {nll(logits, ids):.3f}")


def nll(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood per token: a sane model and text give 2 to 4."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()


def record_minilm(source: Path, folder: Path) -> None:
    """Token ids and mean-pooled, normalised embeddings of SENTENCES, and the token vectors of the first."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(source, local_files_only=True, attn_implementation="eager").eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.savez_compressed(
        folder / "reference.npz",
        ids=batch["input_ids"].numpy(),
        mask=batch["attention_mask"].numpy(),
        types=batch["token_type_ids"].numpy(),
        first_hidden=hidden[0].numpy(),
        embeddings=pooled.numpy(),
        sentences=np.array(SENTENCES),
    )
    print(f"minilm: {len(SENTENCES)} sentences, similarity of the first two {float(pooled[0] @ pooled[1]):.3f}")
