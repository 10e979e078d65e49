"""Shoal: unequal machines at the edge act as one inference service."""

import os

__version__ = "0.1.0"

# ONNX Runtime since 1.29 (microsoft/onnxruntime, pull request 27379) queues usage events for its maker in the user's cache folder.
# It reads this variable while it is imported, before any call of ours could stop it (`disable_telemetry_events` comes too late), so
# it is set here, which every process of ours runs first.  Who has set it otherwise is left to it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
