"""The settings of `finetune serve`: a part of `finetune.config.schema`."""

from dataclasses import dataclass, field

from finetune.config.rules import POSITIVE, at_least, must

LANGUAGE = {"kind": "language"}  # as in the schema, which imports this


def _are_words(names: list[str]) -> bool:
    return all(name.split() == [name] and "/" not in name for name in names)


@dataclass
class ServeConfig:
    """HTTP on this machine: `finetune serve`."""

    host: str = field(default="127.0.0.1", metadata=must("name an address", str.strip))
    """Address to listen on. 127.0.0.1 is this machine alone; any other asks every request for a key."""
    keys: list[str] = field(default_factory=list, metadata=must("be names without blanks and /", _are_words))
    """Names of clients, each of which gets a key of its own; empty is one key for all, where one is needed."""
    port: int = field(default=8000, metadata=at_least(0, most=65_535))
    """TCP port; 0 takes a free one."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Name -> run folder or adapter's folder, of adapters beside the run's own, such as {formal:outputs/formal}."""
    names: list[str] = field(default_factory=list)
    """Names by which clients call this machine, besides its address and localhost; others are refused."""
    origins: list[str] = field(default_factory=list)
    """Web pages that may use this server, such as http://localhost:3000, besides its own."""
    context: int = field(default=0, metadata=LANGUAGE | at_least(0))
    """Longest prompt and reply together, tokens; 0 is what the base reads, and what a GPU has room for."""
    max_new_tokens: int = field(default=512, metadata=LANGUAGE | at_least(1, most=1_000_000))
    """Longest reply, tokens; requests may ask for less."""
    temperature: float = field(default=0.7, metadata=LANGUAGE | at_least(0, most=100))
    """Of the tokens drawn, where a request doesn't say; 0 always takes the likeliest."""
    top_p: float = field(default=0.9, metadata=LANGUAGE | must("be above 0 and at most 1", lambda p: 0 < p <= 1))
    """Draw from the likeliest tokens that together have this probability, where a request doesn't say."""
    batch: int = field(default=16, metadata=at_least(1, most=1024))
    """Replies written, or images drawn, at once."""
    queue: int = field(default=64, metadata=at_least(0, most=100_000))
    """Requests that may wait, for each key; one more is told to try again later."""
    requests_per_minute: int = field(default=0, metadata=at_least(0))
    """For each key; 0 is without a limit."""
    tokens_per_minute: int = field(default=0, metadata=LANGUAGE | at_least(0))
    """Read and written, for each key; 0 is without a limit."""
    timeout_s: float = field(default=300.0, metadata=POSITIVE)
    """Longest time that a request may wait and be answered in, seconds."""
    max_body_kib: int = field(default=1024, metadata=at_least(1, most=1_048_576))
    """Largest request, KiB."""
