"""Files that commands read: problems, plans, endpoints."""

from pathlib import Path

from shoal.errors import InvalidRequestError
from shoal.plan.dag.problem import GraphProblem
from shoal.plan.document import parse_cloud, parse_either, parse_problem
from shoal.plan.problem import Cloud, Problem


def read_problem(path: Path) -> Problem:
    """A problem file that states a chain of blocks, checked."""
    return parse_problem(read_file(path, "problem"))


def read_either(path: Path) -> Problem | GraphProblem:
    """A problem file of any kind, checked."""
    return parse_either(read_file(path, "problem"))


def read_file(path: Path, param: str) -> bytes:
    """What is in *path*, which the user named as *param*."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(
            f"cannot read {path}: {error.strerror}", hint=f"give the path of a {param} file", param=param
        ) from error


def read_cloud(path: Path) -> Cloud:
    """An endpoint that a problem weighs, checked."""
    return parse_cloud(read_file(path, "cloud"))
