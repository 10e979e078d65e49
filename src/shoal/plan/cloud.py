"""The same requests at a cloud endpoint: what it would give, and whether prompts may go there at all.

Its figures are declared.  A round trip comes once a request, because tokens stream; requests that are answered at once do not slow
each other down there, so many of them give many times the tokens of one.
"""

from shoal.plan.cost import breaches, foreign
from shoal.plan.problem import Cloud, CloudAlternative, Estimate, Problem


def cloud_alternative(problem: Problem) -> CloudAlternative | None:
    """What the problem's endpoint gives for a typical request; None where it names none."""
    cloud = problem.cloud
    if cloud is None:
        return None
    estimate = _estimate(problem, cloud)
    return CloudAlternative(name=cloud.name, estimate=estimate, refused=_refusal(problem, cloud, estimate))


def _estimate(problem: Problem, cloud: Cloud) -> Estimate:
    shape = problem.shape
    first_s = cloud.round_trip_s + cloud.time_to_first_token_s
    latency_s = first_s + (shape.tokens_out - 1) * cloud.time_per_output_token_s
    streams = cloud.streams or shape.in_flight * shape.batch
    tokens = cloud.price_per_1k_tokens_in * shape.tokens_in + cloud.price_per_1k_tokens_out * shape.tokens_out
    return Estimate(
        time_to_first_token_s=first_s,
        time_per_output_token_s=cloud.time_per_output_token_s,
        tokens_per_s=streams * shape.tokens_out / latency_s if latency_s else 0.0,
        latency_s=latency_s,
        price=cloud.price_per_request + tokens / 1000,
    )


def _refusal(problem: Problem, cloud: Cloud, estimate: Estimate) -> str:
    if said := foreign(problem.residency, cloud.region, cloud.trust):
        return f"residency: {said}"
    if problem.pin_last:
        return "the last block, and so every answer, stays on the source"
    broken = breaches(problem.limits, estimate)
    return f"beyond the limit of {', '.join(broken)}" if broken else ""
