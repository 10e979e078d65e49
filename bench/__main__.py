"""`python -m bench [CLAIM...]`: measure what is not measured yet, print the tables, write `docs/benchmarks.md`."""

import argparse
import importlib
import os
import shutil
import signal
import sys
from pathlib import Path

from bench.measure import Claim, Options
from bench.table import PAGE, table, write_page

MODULES = {
    "engine": "bench.engine.claim",
    "batch": "bench.batch.claim",
    "prefix": "bench.prefix.claim",
    "quality": "bench.quality_claim",
    "activations": "bench.activations.claim",
    "stages": "bench.stages.claim",
    "gateway": "bench.gateway.claim",
    "memory": "bench.memory.claim",
    "cold_start": "bench.cold_start.claim",
    "planner": "bench.planner.claim",
    "edgeshard": "bench.edgeshard.claim",
    "prediction": "bench.prediction.claim",
    "speculation": "bench.speculation.claim",
    "links": "bench.links.claim",
    "bulk": "bench.bulk.claim",
    "stall": "bench.stall.claim",
    "overload": "bench.overload.claim",
    "soak": "bench.soak.claim",
    "failover": "bench.failover.claim",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"some of {', '.join(MODULES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs, not how fast")
    parser.add_argument("--fresh", action="store_true", help="measure again what is measured already")
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the page")
    llama = os.environ.get("SHOAL_BENCH_LLAMA", "")
    parser.add_argument("--llama-python", default=llama, help="interpreter that has llama_cpp [SHOAL_BENCH_LLAMA]")
    torch = os.environ.get("SHOAL_BENCH_TRANSFORMERS", "")
    parser.add_argument(
        "--transformers-python", default=torch, help="interpreter that has transformers [SHOAL_BENCH_TRANSFORMERS]"
    )
    rpc = os.environ.get("SHOAL_BENCH_LLAMA_RPC", "")
    parser.add_argument(
        "--llama-rpc", default=rpc, help="folder with llama-server and ggml-rpc-server [SHOAL_BENCH_LLAMA_RPC]"
    )
    return parser.parse_args()


def main() -> None:
    # Whoever is told to end takes along what was started, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = arguments()
    unknown = set(asked.claims) - set(MODULES)
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    options = Options(
        quick=asked.quick,
        fresh=asked.fresh,
        llama_python=_interpreter(asked.llama_python),
        transformers_python=_interpreter(asked.transformers_python),
        llama_rpc=str(Path(asked.llama_rpc).absolute()) if asked.llama_rpc else "",
    )
    modules = {name: importlib.import_module(path) for name, path in MODULES.items()}
    for name in [] if asked.table else asked.claims or MODULES:
        results = Claim(name, options)
        results.fill(modules[name].cells(options))
        print(f"\n{modules[name].TITLE}\n\n{table(modules[name].findings(results.cells))}")
    write_page(list(modules.values()))
    print(f"wrote {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")


def _interpreter(named: str) -> str:
    """The path of an interpreter that was named; ends when it is not there."""
    if not named:
        return ""
    found = shutil.which(named)
    if found is None:
        sys.exit(f"{named} is no interpreter that can be run")
    return str(Path(found).absolute())


if __name__ == "__main__":
    main()
