"""Sentence embeddings from MiniLM through the official `openai` client: which sentences mean the same?

pip install openai
python examples/embeddings.py                    # pulls MiniLM and starts a node of its own
"""

import os
from itertools import combinations

import numpy as np
import openai
from local_node import arguments, local_node, serve

from shoal.client import Shoal

NAME = "minilm-l6-v2"
SENTENCES = ("The boat left the harbour.", "A ship sailed out of port.", "She baked a loaf of bread.")


def main() -> None:
    """Deploy the encoder, embed three sentences, compare them."""
    asked = arguments("Compare sentences by their embeddings.", model=NAME)
    with local_node(asked.model, NAME, asked.home) as url:
        key = os.environ.get("SHOAL_API_KEY")
        with Shoal(url, api_key=key) as shoal:
            serve(shoal, NAME)
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none is asked for on loopback") as client:
            answer = client.embeddings.create(model=NAME, input=list(SENTENCES))
    vectors = np.array([item.embedding for item in answer.data])
    print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers, {answer.usage.total_tokens} tokens")
    for one, other in combinations(range(len(SENTENCES)), 2):
        print(f"{vectors[one] @ vectors[other]:5.2f}  {SENTENCES[one]} / {SENTENCES[other]}")


if __name__ == "__main__":
    main()
