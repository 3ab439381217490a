"""A server within this process, on a language model of some 50,000 parameters."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from finetune.config.schema import ModelConfig
from finetune.data.text.tokens import Chat
from finetune.language import causal_lm
from finetune.serving import server
from finetune.serving.fairness import Rates
from finetune.serving.guard import Rules, names_of
from finetune.serving.language import LanguageServer, LanguageService
from finetune.serving.runs import Runs
from finetune.serving.text_routes import Defaults
from tests.end_to_end.serving import Client
from tests.tiny_language_models import save_language

Serve = Callable[..., AbstractContextManager[Client]]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """A function that serves inside a block. keys: clients by the hash of their key."""
    base = save_language(tmp_path_factory.mktemp("base"))

    @contextmanager
    def serving(keys: dict[str, str] | None = None, rates: Rates | None = None) -> Iterator[Client]:
        model = ModelConfig(kind="language", base=str(base))
        chat = Chat(causal_lm.load_tokenizer(str(base)))
        made = LanguageServer(model, chat, torch.device("cpu"), torch.float32, vram_gib=0, most_rows=4, most_waiting=16)
        defaults = Defaults(32, 1.0, 1.0, 60.0, made.most_tokens, made.embedding_rows)
        service = LanguageService(made, {}, defaults, rates or Rates(0, 0))
        rules = Rules(keys or {}, names_of("localhost", ()), frozenset(), 64 * 1024)
        try:
            with server.listening("127.0.0.1", 0) as listener:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                with server.in_background(service, rules, listener, Runs(Path("no runs"))):
                    yield Client(url)
        finally:
            service.close()

    return serving
