"""A process of its own that solves one instance and says how far its resident memory rose: numpy's and native solvers' included.

Read from the kernel's high-water mark, set back before the search (Linux); `ru_maxrss` would begin with the parent's.

python -m bench.planner.memory FAMILY SEED LIMIT_S        # FAMILY as JSON
"""

import json
import sys
import time
from pathlib import Path

import msgspec

from bench.planner.instances import Family, instance
from shoal.plan.budget import DeadlineBudget
from shoal.plan.placement import place


def main() -> None:
    family, seed, limit_s = msgspec.json.decode(sys.argv[1], type=Family), int(sys.argv[2]), float(sys.argv[3])
    problem = instance(family, seed)
    before_bytes = _high_water_bytes(again=True)
    place(problem, DeadlineBudget(time.process_time, limit_s))
    print(json.dumps({"rise_bytes": max(0, _high_water_bytes() - before_bytes)}))


def _high_water_bytes(*, again: bool = False) -> int:
    if again:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
