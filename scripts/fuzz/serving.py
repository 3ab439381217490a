"""Odd requests to a running server: python -m scripts.fuzz.serving URL [COUNT]

Bodies and queries are made from the server's own description of its routes (OpenAPI), by schemathesis: half of them as
it is described, half not. Every answer must come, an error in OpenAI's shape; none may be the server's own failure.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

COUNT, SEED, GETS = 500, 20261130, 10  # GETS: requests of each kind to a route without a body
MOST_TOLD = 20


@dataclass
class Answers:
    """statuses: how many there were of each. problems: what should not have happened, a line each."""

    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def fuzz(url: str, count: int) -> Answers:
    """Send about so many bodies, and some requests without one."""
    import schemathesis
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode

    found = Answers()
    operations = [each.ok() for each in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]
    posts = [each for each in operations if each.method == "post"]
    for operation in operations:
        examples = count // (2 * len(posts)) if operation in posts else GETS
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                _send(url, operation.as_strategy(generation_mode=mode), examples, found)
            except (schemathesis.errors.SchemathesisError, Unsatisfiable):  # nothing is wrong where nothing is taken
                assert operation not in posts
    return found


def _send(url: str, cases: Any, examples: int, found: Answers) -> None:
    import hypothesis
    import requests

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=max(1, examples),
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def send(case: Any) -> None:
        try:
            answer = case.call(base_url=url, timeout=120)
        except (requests.exceptions.InvalidHeader, UnicodeError):  # can't be sent at all
            return
        except requests.exceptions.RequestException as error:
            found.problems.append(f"{case.method} {case.path}: {error}: {case.as_curl_command()[:500]}")
            return
        found.statuses[answer.status_code] += 1
        if wrong := _wrong(answer):
            found.problems.append(f"{case.method} {case.path}: {wrong}: {case.as_curl_command()[:500]}")

    send()


def _wrong(answer: Any) -> str:
    """What is wrong with an answer; empty for nothing."""
    if answer.status_code >= 500:
        return f"status {answer.status_code}"
    if answer.status_code < 400:
        return ""
    try:
        error = answer.json()["error"]
        return "" if error["message"] and error["type"] and "\n" not in error["message"] else f"an error of {error}"
    except (ValueError, KeyError, TypeError):
        return f"an error that is no JSON: {answer.text[:100]!r}"


def main() -> int:
    url, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else COUNT
    found = fuzz(url, count)
    print(f"{found.statuses.total()} answers: {dict(sorted(found.statuses.items()))}; {len(found.problems)} problems")
    for line in found.problems[:MOST_TOLD]:
        print(line)
    return bool(found.problems)


if __name__ == "__main__":
    sys.exit(main())
