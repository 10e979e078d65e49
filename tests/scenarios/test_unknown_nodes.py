"""A node that is not in the fleet is the caller's mistake, not an outage."""

from typing import Any

import httpx

Fleet = Any  # of conftest


def test_an_unknown_node_is_not_found_and_the_known_ones_are_named(three_nodes: Fleet) -> None:
    url = three_nodes.machines[0].url

    answers = [
        httpx.post(f"{url}/shoal/v1/nodes/foo/leave", timeout=30),
        httpx.post(f"{url}/shoal/v1/profile", json={"model": "tiny", "nodes": ["foo"]}, timeout=30),
    ]

    for answer in answers:
        assert answer.status_code == 404
        assert "retry-after" not in answer.headers
        error = answer.json()["error"]
        assert error["code"] == "node_not_found"
        assert error["message"].startswith("no node foo; nodes are: ")
        for machine in three_nodes.machines:
            assert f"{machine.id} ({machine.name})" in error["message"]
