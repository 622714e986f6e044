"""What a node's /health says, in words."""

import json
from typing import Any


def health_words(body: str) -> str:
    """Why it is not ready; the answer's first line where it is none of ours."""
    try:
        told = json.loads(body)
        return ", ".join(_reasons(told)) or str(told["status"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return body.strip().partition("\n")[0][:200]


def _reasons(told: dict[str, Any]) -> list[str]:
    reasons = [str(told[key]) for key in ("problem", "error") if key in told]
    if told.get("status") == "draining":
        reasons.append("it is about to end")
    if told.get("registered") is False:
        reasons.append("no controller takes it")
    if told.get("synchronised") is False:
        reasons.append("it has not heard of the pipelines yet")
    pipelines = told.get("pipelines")
    if isinstance(pipelines, list):
        reasons += [f"{each['name']} is {each['state']}" for each in pipelines if each["state"] != "ready"]
    return reasons
