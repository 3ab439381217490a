"""What is said of a request that isn't answered."""

from finetune.serving.requests import Refused


def test_an_error_is_one_line_whatever_a_client_wrote() -> None:
    refused = Refused(400, "no model é\n\x1b[2J\u2028x here", code="model_not_found")
    assert refused.body()["error"]["message"] == r"no model é\n\x1b[2J\u2028x here"
