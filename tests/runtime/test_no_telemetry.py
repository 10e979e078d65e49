"""Nothing is written to, or sent from, the user's home by the engine."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import numpy as np
from onnx import TensorProto, helper
from shoal.model.quantize import *
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.ports import Shard
x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy")
graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
session = OnnxBackend().load(Shard(graph=model, tensors={}, slots=0, context_tokens=0, threads=1))
assert session.step((), {"x": np.ones(2, np.float32)})["y"][0] == -1
"""


def test_the_engine_leaves_nothing_in_the_users_home(tmp_path: Path) -> None:
    # What would silence it as well must not be why.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_", "CI", "GITHUB"))}

    subprocess.run([sys.executable, "-c", PROGRAM], env=kept | {"HOME": str(tmp_path)}, timeout=60, check=True)

    assert [str(path) for path in tmp_path.rglob("*")] == []
