"""Plan without a fleet: a problem file says what blocks, devices and links are like (docs/reference/problem.md).

Llama-2-7B on three devices; then the same with the link to the server cut to a hundredth.

    python examples/plan_a_problem_file.py [FILE]
"""

import sys
import time
from pathlib import Path

from msgspec.structs import replace

from shoal.plan.budget import DeadlineBudget
from shoal.plan.document import parse_problem
from shoal.plan.placement import place
from shoal.plan.problem import Infeasible, Plan, Problem

PROBLEM = Path(__file__).parent / "problems" / "llama2_7b_three_nodes.json"
SEARCH_S = 10.0


def main() -> None:
    """Solve it twice."""
    problem = parse_problem(Path(sys.argv[1] if len(sys.argv) > 1 else PROBLEM).read_bytes())
    show("as the file says", problem)
    slower = tuple(replace(link, bytes_per_s=link.bytes_per_s / 100) for link in problem.links)
    show("links a hundred times slower", replace(problem, links=slower))


def show(title: str, problem: Problem) -> None:
    """Print a plan and why it is what it is."""
    answer = place(problem, DeadlineBudget(time.monotonic, SEARCH_S))
    print(f"{title}:")
    match answer:
        case Plan():
            for stage in answer.stages:
                print(
                    f"  blocks [{stage.start}, {stage.stop}) on {stage.node}: {stage.decode_s * 1000:.1f} ms per token"
                )
            value = answer.estimate
            print(f"  {value.time_per_output_token_s * 1000:.1f} ms per token, {value.latency_s:.2f} s per request")
            print(f"  lower bound {answer.lower_bound:.2f} s, gap {answer.gap:.1%}, found by {answer.solver}")
            for reason in answer.reasons:
                print(f"  {reason.node}: {reason.text}")
        case Infeasible():
            print(f"  no plan: {answer.reason}\n  hint: {answer.hint}")


if __name__ == "__main__":
    main()
