"""Look at a fleet and ask where a model would go, with the Python SDK; nothing is loaded.

python examples/sdk_nodes_and_plan.py            # starts a node of its own: a fleet of one
SHOAL_URL=http://127.0.0.1:8400 python examples/sdk_nodes_and_plan.py
"""

import os

from local_node import arguments, local_node

from shoal.client import Shoal
from shoal.client.calls import PlanOptions
from shoal.plan.problem import Infeasible, Plan, RequestShape

NAME = "smollm2-135m"
SHAPE = RequestShape(tokens_in=100, tokens_out=100, context_tokens=256, slots=1)


def main() -> None:
    """Nodes, a plan, a plan that cannot be."""
    asked = arguments("Look at a fleet and ask for a plan.", model=NAME)
    with (
        local_node(asked.model, NAME, asked.home) as url,
        Shoal(url, api_key=os.environ.get("SHOAL_API_KEY"), timeout_s=60) as shoal,
    ):
        for node in shoal.nodes():
            print(f"{node.name}: {', '.join(node.roles)}; {node.memory_budget_bytes / 1e9:.1f} GB for models")
        show(shoal, "as the planner likes", PlanOptions(shape=SHAPE))
        show(shoal, "in two stages", PlanOptions(shape=SHAPE, stages=2))


def show(shoal: Shoal, title: str, wanted: PlanOptions) -> None:
    """Print the plan, or what stands in its way."""
    answer = shoal.plan(NAME, **wanted)
    print(f"\n{title}:")
    match answer:
        case Plan(stages=stages, estimate=estimate, gap=gap):
            for stage in stages:
                print(f"  [{stage.start}, {stage.stop}) on {stage.node[:8]}, {stage.memory_bytes / 1e6:.0f} MB")
            print(
                f"  first token after {estimate.time_to_first_token_s * 1000:.0f} ms, then "
                f"{estimate.time_per_output_token_s * 1000:.1f} ms each; at most {gap:.0%} from the optimum"
            )
        case Infeasible(reason=reason, hint=hint):
            print(f"  no plan: {reason}\n  hint: {hint}")


if __name__ == "__main__":
    main()
