"""Adapters on one base: each row gets its own, names and contents are right, what doesn't fit is refused."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.adapters import formats, lora
from finetune.config.schema import LoraConfig, ModelConfig
from finetune.data.text.tokens import Chat
from finetune.errors import ConfigError, ModelError
from finetune.language import causal_lm, export
from finetune.serving.adapters import BaseIdentity, Shelf, Source, sources
from finetune.serving.language import LanguageServer
from finetune.serving.requests import BASE, Refused
from finetune.training import checkpoint
from tests.tiny_language_models import save_language

CPU, FP32 = torch.device("cpu"), torch.float32
IDS = [4, 5, 6, 7]


def save_adapter(folder: Path, base: Path, seed: int, **settings: Any) -> Path:
    """A PEFT folder with a large random change."""
    model = causal_lm.load_model(config(base), FP32, CPU)
    lora.inject(model, LoraConfig(**({"rank": 2} | settings)), ["q_proj", "down_proj"], seed=seed)
    random = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(weight.shape, generator=random) if ".lora_B" in name else weight
        for name, weight in lora.state(model).items()
    }
    formats.save_peft(model, folder, {key: w for key, w in weights.items() if "initial" not in key}, str(base))
    return folder


def config(base: Path) -> ModelConfig:
    return ModelConfig(kind="language", base=str(base))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "one": save_adapter(root / "one", base, 1),
        "two": save_adapter(root / "two", base, 2, rank=4),
        "dora": save_adapter(root / "dora", base, 3, dora=True),
    }


@pytest.fixture
def server(base: Path) -> Iterator[LanguageServer]:
    chat = Chat(causal_lm.load_tokenizer(str(base)))
    made = LanguageServer(config(base), chat, CPU, FP32, vram_gib=0, most_rows=4, most_waiting=4)
    yield made
    made.engine.close()


@torch.no_grad()
def routed(server: LanguageServer, *keys: str) -> torch.Tensor:
    """Logits of the same prompt for each key, in one batch."""
    server.engine.batch.keep([])
    return server.engine.batch.join([IDS] * len(keys), keys)


@torch.no_grad()
def plain(base: Path, adapter: Path | None) -> torch.Tensor:
    model: Any = causal_lm.load_model(config(base), FP32, CPU)
    if adapter:
        model = export.load(model, adapter)
    found: torch.Tensor = model(torch.tensor([IDS])).logits[0, -1]
    return found


def test_each_row_has_its_own_adapter(server: LanguageServer, base: Path, folders: dict[str, Path]) -> None:
    for name in ("one", "two"):
        server.load_adapter(folders[name], name)
    expected = {BASE: plain(base, None)} | {name: plain(base, folders[name]) for name in ("one", "two")}
    assert (expected["one"] - expected["two"]).norm() > 0.1 * expected["one"].norm()
    order = ["two", BASE, "one", "one", BASE, "two"]
    torch.testing.assert_close(routed(server, *order), torch.stack([expected[key] for key in order]))
    server.drop_adapter("one")
    order = ["two", BASE, "two"]
    torch.testing.assert_close(routed(server, *order), torch.stack([expected[key] for key in order]))
    server.load_adapter(folders["one"], "again")
    torch.testing.assert_close(routed(server, "again")[0], expected["one"])
    for key in ("two", "again"):  # none is left
        server.drop_adapter(key)
    server.load_adapter(folders["two"], "other")
    torch.testing.assert_close(routed(server, BASE, "other"), torch.stack([expected[BASE], expected["two"]]))


@pytest.mark.parametrize("first", [True, False])
def test_an_adapter_that_does_not_fit_leaves_the_others_as_they_were(
    server: LanguageServer, base: Path, folders: dict[str, Path], tmp_path: Path, first: bool
) -> None:
    shutil.copytree(folders["one"], tmp_path / "odd")
    weights = load_file(tmp_path / "odd" / formats.PEFT_WEIGHTS)
    save_file(
        {name: weight[:, :-1].contiguous() for name, weight in weights.items()}, tmp_path / "odd" / formats.PEFT_WEIGHTS
    )
    if not first:
        server.load_adapter(folders["two"], "two")
    with pytest.raises(ModelError, match="does not fit this base"):
        server.load_adapter(tmp_path / "odd", "odd")
    torch.testing.assert_close(routed(server, BASE)[0], plain(base, None))
    server.load_adapter(folders["one"], "odd")  # its key is free again
    torch.testing.assert_close(
        routed(server, "odd", BASE), torch.stack([plain(base, folders["one"]), plain(base, None)])
    )


class Holder:
    """Notes what is loaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    async def between_steps(self, work: Any) -> Any:
        return work()

    def load_adapter(self, folder: Path, key: str) -> None:
        assert (folder / formats.PEFT_WEIGHTS).exists()
        self.loaded.append(key)

    def drop_adapter(self, key: str) -> None:
        self.loaded.remove(key)


def run_folder(folder: Path, adapter: Path, content: str, **weights: torch.Tensor) -> Source:
    """A run with one checkpoint."""
    shutil.copytree(adapter, folder / "adapter/peft")
    stored = formats.read_peft_folder(adapter) | weights
    identity = {"content of model.base": content}
    checkpoint.save(folder / "checkpoints", checkpoint.TrainState(identity, step=20), stored, {}, None)
    return Source("mine", folder / "adapter/peft", folder)


def shelf(found: dict[str, Source], base: Path, most: int = 8, content: str = "sha256:b") -> tuple[Shelf, Holder]:
    holder = Holder()
    return Shelf(found, holder, base=BaseIdentity(str(base), content, "t"), most=most), holder


def use(made: Shelf, *models: str) -> list[str]:
    async def ask() -> list[str]:
        found = []
        for model in models:
            async with made.using(model) as loaded:
                found.append(loaded.content)
        return found

    return asyncio.run(ask())


def test_checkpoints_are_adapters_of_their_own(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    source = run_folder(tmp_path / "run", folders["one"], "sha256:b")
    made, holder = shelf({"mine": source}, base)
    assert made.names() == ["base:mine", "base", "base:mine@step-20"]
    contents = use(made, *made.names())
    assert len(set(contents)) == 3
    assert [f"sha256:b+{key}" for key in holder.loaded] == [contents[0], contents[2]]
    for odd in ("base:mine@step-21", "base:mine@step-020x", "base:mine@step-²", "mine", "base:../mine"):
        with pytest.raises(Refused, match="there is no model"):
            use(made, odd)


def test_the_least_used_adapter_makes_room(base: Path, folders: dict[str, Path]) -> None:
    found = {name: Source(name, folders[name], None) for name in ("one", "two", "dora")}
    made, holder = shelf(found, base, most=2)
    use(made, "base:one", "base:two", "base:one", "base:dora")
    assert len(holder.loaded) == 2
    assert use(made, "base:one") == [f"sha256:b+{holder.loaded[0]}"], "the one of the middle has gone"


def test_what_was_trained_on_another_base_is_refused(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    made, holder = shelf({"mine": run_folder(tmp_path / "run", folders["one"], "sha256:old")}, base)
    with pytest.raises(
        Refused, match=r"trained on the base sha256:old, and this server has .* \(sha256:b\)"
    ) as refused:
        use(made, "base:mine")
    assert (refused.value.status, holder.loaded) == (409, [])


def test_files_without_a_run_know_their_base_by_content(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["one"], tmp_path / "mine")
    file = tmp_path / "mine" / formats.PEFT_WEIGHTS
    weights = load_file(file)
    save_file(weights, file, metadata={formats.BASE_CONTENT: "sha256:a"})
    made, _ = shelf({"mine": Source("mine", tmp_path / "mine", None)}, base)
    with pytest.raises(Refused, match=rf"trained on the base {base} sha256:a, and this server has {base}"):
        use(made, "base:mine")
    save_file(weights, file, metadata={formats.BASE_CONTENT: "sha256:b"})
    renamed, _ = shelf({"mine": Source("mine", tmp_path / "mine", None)}, Path("another/name"))
    assert use(renamed, "base:mine")


def test_checkpoints_of_pissa_are_refused(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    odd = {"model.layers.0.self_attn.q_proj.lora_A.initial": torch.zeros(1)}
    made, _ = shelf({"mine": run_folder(tmp_path / "run", folders["one"], "sha256:b", **odd)}, base)
    with pytest.raises(Refused, match=r"checkpoints of lora\.init=pissa can't be served, only the exported adapter"):
        use(made, "base:mine@step-20")
    assert use(made, "base:mine")


def test_an_adapter_that_has_gone_is_refused(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    made, _ = shelf({"mine": Source("mine", tmp_path / "gone.safetensors", None)}, base)
    with pytest.raises(Refused, match=r"gone\.safetensors can't be read \(No such file or directory\)"):
        use(made, "base:mine")


def test_an_adapter_that_changes_while_it_is_read_is_refused(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["one"], tmp_path / "mine")
    made, holder = shelf({"mine": Source("mine", tmp_path / "mine", None)}, base)

    def load(folder: Path, key: str) -> None:
        holder.loaded.append(key)
        shutil.copy(folders["two"] / formats.PEFT_WEIGHTS, folder / formats.PEFT_WEIGHTS)

    holder.load_adapter = load  # type: ignore[method-assign]
    with pytest.raises(Refused, match="was replaced while it was read; ask again"):
        use(made, "base:mine")
    assert holder.loaded == []


def test_adapters_are_named_and_found(folders: dict[str, Path], tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", folders["one"], "").folder
    found = sources(run, "own", {"a": str(folders["two"]), "b": str(tmp_path / "run")})
    assert {name: source.folder for name, source in found.items()} == {"own": run, "a": folders["two"], "b": run}
    assert found["b"].steps == [20]
    assert found["a"].steps == []
    for name in ("own", "x:y", "x@step-1", "../x", ""):
        with pytest.raises(ConfigError, match="an adapter can't be called"):
            sources(run, "own", {name: str(folders["two"])})
    with pytest.raises(ModelError, match="there is no adapter at nowhere; name a run folder or an adapter's folder"):
        sources(None, "own", {"x": "nowhere"})


def test_the_template_is_compared(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["one"], tmp_path / "mine")
    file = tmp_path / "mine/chat_template.json"
    made, _ = shelf({"mine": Source("mine", tmp_path / "mine", None)}, base)
    file.write_text(json.dumps({"sha256": "other"}))
    with pytest.raises(Refused, match="it was trained with another chat template; name that one"):
        use(made, "base:mine")
    file.write_text(json.dumps({"sha256": "t"}))
    assert use(made, "base:mine")
