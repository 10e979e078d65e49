"""The Python SDK for what the OpenAI client does not cover: machines, plans, deployments, events."""

from shoal.client.blocking import Shoal
from shoal.client.concurrent import AsyncShoal

__all__ = ["AsyncShoal", "Shoal"]
