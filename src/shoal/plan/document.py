"""Problems and answers as JSON documents.  A problem from a user is read strictly; answers are written for programs."""

import re
from typing import NoReturn, TypeVar

import msgspec

from shoal.errors import InvalidRequestError, UnsupportedVersionError
from shoal.ids import NodeId
from shoal.plan.check import check, check_cloud
from shoal.plan.dag.check import check_graph
from shoal.plan.dag.problem import GRAPH_VERSION, GraphAnswer, GraphProblem
from shoal.plan.pareto import Front
from shoal.plan.problem import PROBLEM_VERSION, Answer, Cloud, Infeasible, Plan, Problem
from shoal.plan.replicas import Replicas

JSON_HINT = "docs/reference/problem.md lists every field; examples/problems has files that work"

PLAN_HINT = "`shoal plan --problem FILE --json` writes one"


def parse_problem(document: bytes) -> Problem:
    """Read and check a problem; raises InvalidRequestError naming the place, UnsupportedVersionError for a newer file."""
    raw = _raw(document)
    if isinstance(raw, dict) and "kind" in raw:
        raise InvalidRequestError(
            f"this is a problem of kind {raw['kind']!r}, wanted is a chain of blocks, which names no kind",
            hint="`shoal plan --problem FILE` solves both",
            param="kind",
        )
    return _chain(raw)


def parse_either(document: bytes) -> Problem | GraphProblem:
    """Read and check a chain of blocks or, where `kind` is `graph`, a graph of operators; raises as `parse_problem` does."""
    raw = _raw(document)
    if not isinstance(raw, dict) or "kind" not in raw:
        return _chain(raw)
    if raw["kind"] != "graph":
        raise InvalidRequestError(
            f"kind is {raw['kind']!r}; there is 'graph', and chains of blocks without a kind",
            hint=JSON_HINT,
            param="kind",
        )
    problem = _strictly(raw, GraphProblem, GRAPH_VERSION)
    check_graph(problem)
    return problem


def _raw(document: bytes) -> object:
    try:
        return msgspec.json.decode(document)
    except msgspec.MsgspecError as error:
        raise InvalidRequestError(
            f"this is not a problem: {error}{_near(document, str(error))}", hint=JSON_HINT
        ) from error


def _near(document: bytes, said: str) -> str:
    """The line of a byte that an error names, and what stands there: nobody counts bytes."""
    place = re.search(r"\(byte (\d+)\)", said)
    if place is None or not document:
        return ""
    byte = int(place.group(1))
    words = document[byte : byte + 20].split(maxsplit=1)
    there = words[0].decode(errors="replace").rstrip(",]}") if words else ""
    note = "; JSON has no NaN and no infinity" if there.lstrip("-").startswith(("NaN", "Inf")) else ""
    line = document.count(b"\n", 0, byte) + 1
    return f", line {line}: {there}{note}"


def _chain(raw: object) -> Problem:
    problem = _strictly(raw, Problem, PROBLEM_VERSION)
    check(problem)
    _check_names(problem)
    return problem


Stated = TypeVar("Stated", Problem, GraphProblem)


def _strictly(raw: object, kind: type[Stated], newest: int) -> Stated:
    _check_version(raw, newest)
    try:
        problem = msgspec.convert(raw, kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequestError(f"this is not a problem: {error}", hint=JSON_HINT) from error
    unknown = _unknown_fields(raw, msgspec.to_builtins(problem), "")
    if unknown:
        raise InvalidRequestError(f"unknown field {unknown[0]}", hint=JSON_HINT, param=unknown[0])
    return problem


def parse_cloud(document: bytes) -> Cloud:
    """Read and check an endpoint; raises InvalidRequestError naming what is wrong."""
    try:
        raw = msgspec.json.decode(document)
        cloud = msgspec.convert(raw, Cloud)
    except msgspec.MsgspecError as error:
        raise InvalidRequestError(f"this is not a cloud endpoint: {error}", hint=JSON_HINT, param="cloud") from error
    unknown = _unknown_fields(raw, msgspec.to_builtins(cloud), "cloud.")
    if unknown:
        raise InvalidRequestError(f"unknown field {unknown[0]}", hint=JSON_HINT, param=unknown[0])
    check_cloud(cloud)
    return cloud


def parse_plan(document: bytes) -> Plan:
    """Read a plan as `answer_json` writes it; raises InvalidRequestError when it is none."""
    try:
        answer: Answer = msgspec.json.decode(document, type=Answer)
    except msgspec.MsgspecError as error:
        raise InvalidRequestError(f"this is not a plan: {error}", hint=PLAN_HINT, param="plan") from error
    if isinstance(answer, Infeasible):
        raise InvalidRequestError(f"this says that there is no plan: {answer.reason}", hint=PLAN_HINT, param="plan")
    return answer


def answer_json(answer: Answer | Front | Replicas | GraphAnswer) -> bytes:
    """An answer as indented JSON; its `type` is `plan`, `front`, `replicas`, `graph-plan` or `infeasible`."""
    return msgspec.json.format(msgspec.json.encode(answer), indent=2)


def _check_names(problem: Problem) -> None:
    """A name that is spelt wrong would silently be a link or a demand less; a live fleet's may be of nodes that were not asked."""
    known = {problem.source, *(device.node for device in problem.devices)}
    for index, link in enumerate(problem.links):
        for end, node in (("source", link.source), ("target", link.target)):
            if node not in known:
                _unknown_node(node, f"links.{index}.{end}")
    for index, node in enumerate(problem.exclude):
        if node not in known:
            _unknown_node(node, f"exclude.{index}")


def _unknown_node(node: NodeId, param: str) -> NoReturn:
    raise InvalidRequestError(f"{param} is {node!r}, which is no device here", hint=JSON_HINT, param=param)


def _check_version(raw: object, newest: int) -> None:
    version = raw.get("version", newest) if isinstance(raw, dict) else newest
    if isinstance(version, int) and version > newest:
        raise UnsupportedVersionError(
            f"this problem has version {version}, we read up to {newest}",
            hint="upgrade shoal, or write the older form",
        )
    if isinstance(version, int) and version < 1:
        raise InvalidRequestError(f"version is {version}; there are 1 to {newest}", param="version")


def _unknown_fields(raw: object, known: object, path: str) -> list[str]:
    if isinstance(raw, dict) and isinstance(known, dict):
        extra = [f"{path}{name}" for name in raw if name not in known]
        return extra + [
            field
            for name in raw
            if name in known
            for field in _unknown_fields(raw[name], known[name], f"{path}{name}.")
        ]
    if isinstance(raw, list) and isinstance(known, list | tuple):
        pairs = zip(raw, known, strict=True)
        return [
            field
            for index, (item, twin) in enumerate(pairs)
            for field in _unknown_fields(item, twin, f"{path}{index}.")
        ]
    return []
