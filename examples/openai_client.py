"""Ask a model through the official `openai` client: a whole answer, a stream, log-probabilities, and an error.

pip install openai
python examples/openai_client.py                 # pulls SmolLM2 and starts a node of its own
SHOAL_URL=http://127.0.0.1:8400 python examples/openai_client.py
"""

import os

import openai
from local_node import arguments, local_node, serve

from shoal.client import Shoal

NAME = "smollm2-135m"


def main() -> None:
    """Deploy, then talk."""
    asked = arguments("Ask a model through the openai client.", model=NAME)
    with local_node(asked.model, NAME, asked.home) as url:
        key = os.environ.get("SHOAL_API_KEY")
        with Shoal(url, api_key=key) as shoal:
            serve(shoal, NAME)
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none is asked for on loopback") as client:
            talk(client)


def talk(client: openai.OpenAI) -> None:
    """Four things that clients do."""
    print("models:", [model.id for model in client.models.list()])

    whole = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Name one fish."}],
        temperature=0,
        max_tokens=16,
        logprobs=True,
    )
    choice = whole.choices[0]
    print(
        "whole:", choice.message.content, f"({choice.finish_reason}, {whole.usage and whole.usage.total_tokens} tokens)"
    )
    if choice.logprobs and choice.logprobs.content:
        first = choice.logprobs.content[0]
        print(f"first token: {first.token!r}, log-probability {first.logprob:.2f}")

    print("stream: ", end="")
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Count to five."}],
        temperature=0.7,
        seed=7,
        max_tokens=24,
        stream=True,
        extra_body={"min_p": 0.05},  # an extension that open servers share
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
    print()

    try:
        client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "Hi"}])
    except openai.NotFoundError as error:
        print("error:", error.body)


if __name__ == "__main__":
    main()
