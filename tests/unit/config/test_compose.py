"""Recipes, presets and overrides: what composes, and what is said about what doesn't."""

import os
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from finetune import kinds
from finetune.config import compose, recipes
from finetune.config.describe import as_dict
from finetune.config.schema import Config, Optimizer, Precision
from finetune.config.validate import cautions, check
from finetune.errors import ConfigError
from finetune.reading import MOST_BYTES
from tests.conftest import ROOT

PRESETS = [f"{group}={name}" for group, files in recipes.preset_files().items() for name in files]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipes.recipe_files())
def test_every_recipe_composes_and_passes_the_check(name: str) -> None:
    config = compose.load(name)
    assert check(config) == []
    assert (config.name, config.run_dir) == (name, f"outputs/{name}")
    assert recipes.title(recipes.recipe_files()[name])


@pytest.mark.sampled
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes(preset: str) -> None:
    group, name = preset.split("=")
    file = recipes.preset_files()[group][name]
    of_language = "kind: language" in file.read_text() or preset in ("lora=all_linear", "export=language")
    assert check(compose.load("pirate_chat" if of_language else "pixar_style", [preset])) == []
    assert recipes.title(file)


BASES = [name for name in recipes.preset_files()["model"] if not name.startswith("embedded")]


def of_language(name: str) -> bool:
    return "kind: language" in recipes.preset_files()["model"][name].read_text()


PAIRS = [(r, b) for r in recipes.recipe_files() for b in BASES if of_language(b) == ("chat" in r)]


@pytest.mark.sampled
@pytest.mark.parametrize(("recipe", "base"), PAIRS)
def test_every_recipe_with_every_other_base_takes_what_suits_that_base(
    recipe: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of what belongs to the embedded model is left: its rate, batch, captioner, guidance, targets. The steps
    of a recipe belong to its data, and see it as often as is usual."""
    language = of_language(base)
    config = compose.load(recipe, [f"model={base}"])
    assert check(config) == []
    assert config.optim.lr == (2e-4 if language else 1e-4)
    assert config.caption.model == "Salesforce/blip-image-captioning-base"
    assert config.sample.guidance > 3
    assert config.sample.max_new_tokens == 128
    assert (config.lora.targets, config.loss.min_snr_gamma) == ("all_linear" if language else "attention", 5.0)
    assert cautions(config) == []
    if recipe != "smoke":  # two small steps, which teach nothing
        effective = config.trainer.micro_batch * config.trainer.accumulate
        assert effective == (4 if language else 16)
        assert config.optim.warmup_steps <= config.trainer.steps / 10
        monkeypatch.chdir(ROOT)  # where the recipes' data is
        examples = kinds.of(config).examples(config)
        assert examples is not None
        visits = config.trainer.steps * effective / examples.per_epoch
        most = 300 if recipe == "stained_glass_style" else 200  # twelve images, and the steps of pixar_style's forty
        assert (1 < visits < 10) if language else (50 < visits < most)


def test_a_model_recommends_and_recipe_command_line_and_chosen_presets_decide(
    workdir: Path,
) -> None:
    typed = compose.load("pixar_style", ["model=flux1_dev", "caption=blip_large", "lora=r32", "sample.guidance=2.5"])
    assert typed.caption.model == "Salesforce/blip-image-captioning-large"
    assert (typed.lora.targets, typed.sample.guidance) == ("attention_ff", 2.5)
    write(workdir / "conf" / "mine.yaml", "defaults: [pixar_style, override /model: own]\ntrainer: {micro_batch: 2}\n")
    file = write(
        workdir / "conf" / "model" / "own.yaml",
        "defaults: [sd15]\nbase: some/base\n"
        "recommended: {optim: {lr: 3e-4}, trainer: {micro_batch: 1, accumulate: 8}}\n",
    )
    own = compose.load("mine")
    assert (own.model.base, own.model.resolution) == ("some/base", 512)
    assert (own.optim.lr, own.trainer.micro_batch, own.trainer.accumulate) == (3e-4, 2, 8)
    file.write_text("defaults: [sd15]\nrecommended: {optim: {rate: 3e-4}, lora: {rank: 8.5}}\n")
    with pytest.raises(ConfigError, match=r"own\.yaml: .*optim\.rate") as caught:
        compose.load("mine")
    assert "lora.rank" in str(caught.value)


def test_settings_of_the_other_kind_of_model_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.length is a setting of language models, this recipe trains a diffusion"
    ):
        compose.load("pixar_style", ["data.length=512"])
    with pytest.raises(
        ConfigError, match=r"caption\.prefix is a setting of diffusion models, this recipe trains a lang"
    ):
        compose.load("pirate_chat", ["caption.prefix=x"])
    with pytest.raises(ConfigError, match=r"^caption is a setting of diffusion models"):
        compose.load("pirate_chat", ["caption=blip_base"])
    with pytest.raises(ConfigError, match=r"^data\.length is a setting of language models"):
        compose.apply(compose.load("pixar_style"), ["data.length=512"])
    found = check(compose.load("pixar_style", ["model=embedded_language", "lora.rank=0"]))
    assert found == [
        (
            "this recipe is for diffusion models (data.folder is set), this is a language model; "
            "take a recipe such as conf=pirate_chat, or another model"
        ),
        "lora.rank must be at least 1, got 0; try lora.rank=16",
    ]
    found = check(compose.load("pixar_style", ["model=embedded_language", "data.file=x"]))
    assert found[0].startswith("export.formats=diffusers is not for a language model; it offers: peft, merged, gguf")
    assert check(compose.load("pirate_chat", ["data.file="])) == ["data.file is not set; type data.file=…"]


def test_values_arrive_with_their_types() -> None:
    config = compose.load("pixar_style", ["optim.name=adamw8bit", "trainer.precision=bf16", "optim.lr=3e-4"])
    assert isinstance(config, Config)
    assert config.optim.name is Optimizer.adamw8bit
    assert config.trainer.precision is Precision.bf16
    assert config.optim.lr == 3e-4
    assert config.lora.rank == 16
    assert config.caption.trigger == "pixar style"


def test_text_stays_what_was_typed(workdir: Path) -> None:
    """Whatever YAML or Hydra's grammar takes it for: a number with underscores, a float, a truth value."""
    words = ["name=2024_05_01", "caption.trigger=1e5", "caption.prefix=true", 'sample.prompts=[1_0,"2,3_0", nan,7]']
    config = compose.load("pixar_style", words)
    assert (config.name, config.caption.trigger, config.caption.prefix) == ("2024_05_01", "1e5", "true")
    assert config.sample.prompts == ["1_0", "2,3_0", "nan", "7"]
    assert compose.apply(config, ["name=1.50"]).name == "1.50"
    # What the error of an unknown reference offers.
    assert compose.load("smoke", [r'sample.prompts=["a \${b}"]', r"name=\${b}"]).sample.prompts == ["a ${b}"]
    write(workdir / "conf/2024.yaml", "defaults: [pixar_style]\ncaption: {trigger: no}\nsample: {prompts: [1_0, x]}\n")
    write(workdir / "conf/caption/7.yaml", "prefix: 1_000\n")
    write(workdir / "conf/trainer/off.yaml", "autotune: off  # a name that YAML takes for false\n")
    config = compose.load("2024")
    assert (config.name, config.caption.trigger, config.sample.prompts) == ("2024", "no", ["1_0", "x"])
    config = compose.load("pixar_style", ["caption=7", "trainer=off"])
    assert (config.caption.prefix, config.trainer.autotune.name) == ("1_000", "off")


def test_a_plus_as_hydra_has_it_sets_a_key_that_is_there() -> None:
    config = compose.load("pirate_chat", ["+lora.rank=8", "++optim.lr=1e-4", "+data.columns.prompt=q"])
    assert (config.lora.rank, config.optim.lr, config.data.columns) == (8, 1e-4, {"prompt": "q"})


def test_quoted_text_keeps_commas_and_colons() -> None:
    config = compose.load("pixar_style", ['sample.prompts=["a: b, c","d"]', 'caption.prefix="one, two"'])
    assert config.sample.prompts == ["a: b, c", "d"]
    assert config.caption.prefix == "one, two"


def test_a_tilde_is_the_home_folder_wherever_a_path_is_typed(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = compose.load("pixar_style", ["data.folder=~/my pics", "run_dir=~/out", "caption.prefix=~/x"])
    assert (config.data.folder, config.run_dir, config.caption.prefix) == ("/home/me/my pics", "/home/me/out", "~/x")
    write(workdir / "conf/mine.yaml", "model: {base: ~/sd}\ndata: {folder: x, cache: ~/cache}\n")
    config = compose.load("mine", ['sample.adapter="~/a"'])
    assert (config.model.base, config.data.cache, config.sample.adapter) == (
        "/home/me/sd",
        "/home/me/cache",
        "/home/me/a",
    )
    assert compose.apply(config, ["lora.start_from=~/b"]).lora.start_from == "/home/me/b"
    names = {"model.base": "~.safetensors", "data.folder": "~nobody-of-this-name/x"}  # as a shell leaves them
    config = compose.load("pixar_style", names)
    assert {"model.base": config.model.base, "data.folder": config.data.folder} == names


def test_conversations_may_be_a_list_of_paths(workdir: Path) -> None:
    wanted = os.pathsep.join(["a b.jsonl", "my/c.csv", "7"])
    for word in ('data.file=["a b.jsonl",my/c.csv,7]', f'data.file="{wanted}"'):
        assert compose.load("pirate_chat", [word]).data.file == wanted
        assert compose.apply(compose.load("pirate_chat"), [word]).data.file == wanted
    assert compose.load("pirate_chat", ["data.file=[a.jsonl]"]).data.file == "a.jsonl"
    (workdir / "conf" / "data").mkdir(parents=True)
    (workdir / "conf" / "mine.yaml").write_text("defaults: [pirate_chat]\ndata:\n  file: [a b.jsonl, my/c.csv, 7]\n")
    (workdir / "conf" / "data" / "all.yaml").write_text("file:\n- a b.jsonl\n- my/c.csv\n- 7\n")
    assert compose.load("mine").data.file == wanted
    (workdir / "conf" / "other.yaml").write_text(
        "defaults: [override /model: embedded_language, override /data: all]\n"
    )
    assert compose.load("other").data.file == wanted


def test_a_recipe_extends_a_recipe_with_another_model(workdir: Path) -> None:
    write(workdir / "conf/real.yaml", "defaults:\n  - pixar_style\n  - override /model: sd15\nseed: 9\n")
    config = compose.load("real")
    assert (config.name, config.seed, config.trainer.steps) == ("real", 9, compose.load("pixar_style").trainer.steps)
    assert config.model.resolution == 512
    assert config.model.base.startswith("stable-diffusion-v1-5/")


@pytest.mark.parametrize(("name", "pixels", "micro_batch"), [("sd15", 512, 4), ("sdxl", 1024, 2)])
def test_recipes_for_stable_diffusion_take_sixteen_pictures_a_step(name: str, pixels: int, micro_batch: int) -> None:
    config = compose.load(f"pixar_style_{name}")
    assert (config.model.family, config.model.resolution) == ("sd" if name == "sd15" else name, pixels)
    lora, trainer, optim = config.lora, config.trainer, config.optim
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (16, 32, 0.0, "attention")
    assert (trainer.micro_batch, trainer.micro_batch * trainer.accumulate, trainer.save_every) == (micro_batch, 16, 125)
    assert (optim.name.name, optim.lr, optim.schedule.name, optim.warmup_steps) == ("adamw", 1e-4, "linear", 25)
    assert (config.caption.model, config.caption.trigger) == ("Salesforce/blip-image-captioning-base", "pixar style")
    assert (config.data.folder, config.hardware.vram_gib) == ("datasets/pixar_style", 23.5)


def test_a_recipe_may_name_itself(workdir: Path) -> None:
    write(workdir / "conf/mine.yaml", "name: garden\n")
    assert compose.load("mine", ["data.folder=x"]).run_dir == "outputs/garden"


def test_names_of_recipes_and_presets_have_letters_beyond_ascii(workdir: Path) -> None:
    write(workdir / "conf/größe.yaml", "data:\n  folder: x\n")
    write(workdir / "conf/lora/groß (2).yaml", "rank: 99\n")
    config = compose.load("größe", ["lora=groß (2)"])
    assert (config.name, config.lora.rank) == ("größe", 99)
    with pytest.raises(ConfigError, match="no recipe called 'grösse'; did you mean größe"):
        compose.load("grösse")
    write(workdir / "conf/mit leer.yaml", "data:\n  folder: x\n")
    assert compose.judged(["conf=größe,mit leer, pixar_style", "lora=groß (2),r32"], print, sweep=True) == [
        'conf="größe","mit leer","pixar_style"',
        'lora="groß (2)","r32"',
    ]


def test_the_current_folders_conf_wins(workdir: Path) -> None:
    write(workdir / "conf/pixar_style.yaml", "seed: 77\ndata:\n  folder: x\n")
    write(workdir / "conf/lora/default.yaml", "rank: 5\n")
    write(workdir / "conf/lora/r99.yaml", "rank: 99\n")
    assert compose.load("pixar_style").seed == 77
    assert compose.load("pixar_style").lora.rank == 5
    assert compose.load("pixar_style", ["lora=r99"]).lora.rank == 99


def test_another_folders_conf_is_forgotten(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(workdir / "conf/mine.yaml", "data:\n  folder: x\n")
    compose.load("mine")
    monkeypatch.chdir(workdir.parent)
    with pytest.raises(ConfigError, match="no recipe called 'mine'"):
        compose.load("mine")


def test_everything_wrong_with_a_recipe_is_named_with_its_file(workdir: Path) -> None:
    write(
        workdir / "conf/mine.yaml",
        "defaults:\n  - base\n  - override /modle: sd15\n  - override /lora: r33\n"
        "lora:\n  rnk: 4\n  alpha: much\noptim: fast\ntrianer:\n  steps: 1\nsample:\n  seeds: [a]\n",
    )
    write(workdir / "conf/base.yaml", "sead: 4\n")
    with pytest.raises(ConfigError) as raised:
        compose.load("mine", ["lora.dropuot=1"])
    groups = "caption, cost, data, export, hardware, lora, loss, model, optim, profile, sample, serve, trainer"
    assert sorted(str(raised.value).splitlines()) == [
        "conf/base.yaml: no key called sead; did you mean seed?",
        "conf/mine.yaml: lora.alpha must be a number, got 'much'",
        "conf/mine.yaml: no key called lora.rnk; did you mean lora.rank?",
        "conf/mine.yaml: no key called trianer; did you mean trainer?",
        "conf/mine.yaml: no lora preset called 'r33'; did you mean r32? there are: all_linear, default, r32",
        f"conf/mine.yaml: no preset group called 'modle'; did you mean model? there are: {groups}",
        "conf/mine.yaml: optim is a section, got 'fast'; set a key in it, such as optim.name",
        "conf/mine.yaml: sample.seeds must be a list, each item a whole number, such as [a,b], got ['a']",
        "no key called lora.dropuot; did you mean lora.dropout?",
    ]


def test_a_recipe_that_extends_itself_or_nothing(workdir: Path) -> None:
    write(workdir / "conf/loop.yaml", "defaults:\n  - loop\n")
    with pytest.raises(ConfigError, match=r"conf/loop\.yaml extends itself"):
        compose.load("loop")
    write(workdir / "conf/orphan.yaml", "defaults:\n  - pixar_stil\n")
    with pytest.raises(
        ConfigError, match=r"^conf/orphan.yaml: no recipe called 'pixar_stil'; did you mean pixar_style"
    ):
        compose.load("orphan")


@pytest.mark.parametrize("choice", ["lora=mine", "lora=extended", "conf=recipe", "conf=default"])
def test_a_wrong_key_in_a_users_preset_is_named_with_its_file(workdir: Path, choice: str) -> None:
    name = "default" if choice == "conf=default" else "mine"
    write(workdir / f"conf/lora/{name}.yaml", "rank: 4\nalhpa: 8\n")
    write(workdir / "conf/lora/extended.yaml", "defaults: [mine]\n")
    write(workdir / "conf/recipe.yaml", "defaults: [pixar_style, override /lora: mine]\n")
    overrides = ["seed=-1", *([choice] if choice.startswith("lora") else [])]
    with pytest.raises(ConfigError) as raised:
        compose.load("recipe" if choice == "conf=recipe" else "pixar_style", overrides)
    line = f"conf/lora/{name}.yaml: no key called lora.alhpa; did you mean lora.alpha?"
    assert str(raised.value) == line  # not composed: values wait


def test_files_that_are_not_chosen_are_not_judged(workdir: Path) -> None:
    write(workdir / "conf/lora/mine.yaml", "alhpa: 8\n")
    write(workdir / "conf/recipe.yaml", "defaults: [pixar_style, override /lora: mine]\n")
    assert compose.load("recipe", ["lora=r32"]).lora.rank == 32


def test_everything_is_named_at_once_keys_types_values_and_the_other_kinds_settings() -> None:
    with pytest.raises(ConfigError) as raised:
        compose.load("pirate_chat", ["lora.rnk=1", "trainer.steps=x", "lora.rank=0", "caption.prefix=x", "lora=r33"])
    lines = str(raised.value).splitlines()
    assert [line.split(",")[0].split(";")[0] for line in lines[:3]] == [
        "no key called lora.rnk",
        "trainer.steps must be a whole number",
        "no lora preset called 'r33'",
    ]
    with pytest.raises(ConfigError) as raised:
        compose.load("pirate_chat", ["lora.rnk=1", "trainer.steps=x", "lora.rank=0", "caption.prefix=x"])
    lines = str(raised.value).splitlines()
    assert lines[2].startswith("caption.prefix is a setting of diffusion models")
    assert lines[3:] == ["lora.rank must be at least 1, got 0; try lora.rank=16"]


@pytest.mark.parametrize("wrong", ["", "lora.rnk=1", "data.length=2"])
def test_a_call_composes_once_at_most(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    calls = []

    def counting(*words: object, **more: object) -> object:
        calls.append(words)
        return hydra_compose(*words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(compose, "compose", counting)
    try:
        compose.load("pixar_style", [wrong] if wrong else [])
    except ConfigError:
        assert wrong
    assert len(calls) == 1


def test_a_recipe_is_data_and_sets_nothing_of_hydras(workdir: Path) -> None:
    """What Hydra is told to instantiate it runs."""
    write(workdir / "conf/mine.yaml", "defaults: [pixar_style]\nhydra: {callbacks: {x: {_target_: os.getcwd}}}\n")
    write(workdir / "conf/hydra/config.yaml", "run: {dir: elsewhere}\n")
    with pytest.raises(ConfigError, match=r"^conf/mine\.yaml: no key called hydra; there are: model, "):
        compose.load("mine")
    assert compose.load("pixar_style").name == "pixar_style"


@pytest.mark.parametrize("entry", ["/foo@hydra.callbacks.y: x", "override hydra/callbacks: x"])
def test_a_recipe_sets_nothing_of_hydras_by_its_defaults_either(workdir: Path, entry: str) -> None:
    write(workdir / "conf/mine.yaml", f"defaults: [smoke, {{{entry}}}]\n")
    call = "{_target_: builtins.exit, _args_: [9]}\n"
    for group in ("foo", "foo@hydra.callbacks.y", "hydra/callbacks"):
        write(workdir / f"conf/{group}/x.yaml", f"y: {call}" if group == "hydra/callbacks" else call)
    with pytest.raises(ConfigError, match=r"^conf/mine\.yaml: (defaults must be|no preset group called)"):
        compose.load("mine")


def test_a_recipe_is_extended_by_its_name_alone(workdir: Path) -> None:
    write(workdir / "conf/mine.yaml", "defaults: [{/conf: smoke}]\n")
    with pytest.raises(ConfigError, match=r"^conf/mine\.yaml: .*: smoke, not /conf: smoke$"):
        compose.load("mine")


def test_hydra_around_us_is_left_alone(workdir: Path) -> None:
    with initialize(version_base="1.3", config_path=None):
        outer = GlobalHydra.instance().hydra
        compose.load("pixar_style")
        assert GlobalHydra.instance().hydra is outer
        hydra_compose(overrides=[])
    assert not GlobalHydra.instance().is_initialized()


def test_a_host_applications_config_store_is_left_alone(workdir: Path) -> None:
    store = ConfigStore.instance()
    before = dict(store.repo)
    try:
        store.store(name="my_app", node={"port": 1})
        store.store(name="config", node={"defaults": [{"db": "postgres"}, {"lora": "theirs"}]})  # names of ours
        store.store(group="db", name="postgres", node={"host": "here"})
        store.store(group="lora", name="theirs", node={"rank": "their own"})
        stored = deepcopy(store.repo)
        assert compose.load("pixar_style").lora.rank == 16
        with pytest.raises(ConfigError):
            compose.load("pixar_style", ["lora.rank=x"])
        with pytest.raises(ConfigError, match="no lora preset called 'theirs'"):
            compose.load("pixar_style", ["lora=theirs"])
        assert store.repo == stored
        with initialize(version_base="1.3", config_path=None):
            assert hydra_compose("config") == {"db": {"host": "here"}, "lora": {"rank": "their own"}}
    finally:
        store.repo = before


def test_apply_changes_a_copy() -> None:
    config = compose.load("pixar_style")
    changed = compose.apply(config, ["lora.rank=4", "run_dir=elsewhere"])
    assert (changed.lora.rank, changed.run_dir) == (4, "elsewhere")
    assert (config.lora.rank, config.run_dir) == (16, "outputs/pixar_style")


def test_apply_takes_no_text_for_a_reference() -> None:
    config = compose.load("pixar_style", {"sample.prompts": ["for ${5} or \\${name}"]})
    assert compose.apply(config, ["seed=4"]).sample.prompts == ["for ${5} or \\${name}"] == config.sample.prompts
    assert compose.apply(Config(), ["name=mine"]).run_dir == "outputs/mine"


def test_apply_refuses_what_load_refuses_and_presets() -> None:
    config = compose.load("pixar_style")
    with pytest.raises(ConfigError, match=r"no key called lora\.rnk"):
        compose.apply(config, ["lora.rnk=4"])
    with pytest.raises(ConfigError, match="lora=r32 chooses a preset, which needs a recipe"):
        compose.apply(config, ["lora=r32"])


def test_the_folder_of_a_sweep_job_is_readable_safe_and_its_own() -> None:
    name = partial(recipes.sweep_folder, "a")
    assert name(["conf=a", "lora.rank=4", "run_dir=x"], {"lora.rank"}) == "a/lora.rank=4"
    assert name(["conf=a"], set()) == "a/all"
    in_common = [name(["conf=a", "lora.rank=4", f"seed={seed}"], {"lora.rank"}) for seed in (1, 2)]
    assert in_common[0] != in_common[1]
    assert all(folder.startswith("a/lora.rank=4-") for folder in in_common)
    assert name(["seed=1", "lora.rank=4", "conf=a"], {"lora.rank"}) == in_common[0]
    slashed, spaced = (name(["conf=a", f"data.folder={folder}"], {"data.folder"}) for folder in ("b/c", "b c"))
    assert slashed != spaced
    assert slashed.count("/") == 1
    assert len(name(["conf=a", f"caption.prefix={'x' * 999}"], {"caption.prefix"})) < 120


def test_a_configuration_survives_yaml() -> None:
    plain = as_dict(compose.load("pixar_style"))
    assert yaml.safe_load(yaml.safe_dump(plain, allow_unicode=True)) == plain


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defaults:\n", "conf/odd.yaml: defaults must be a list of recipes and presets"),
        ("defaults: pixar_style", "conf/odd.yaml: defaults must be a list of recipes and presets"),
        ("defaults: [pixar_style, {lora: [r32]}]", "conf/odd.yaml: defaults must be a list of recipes and presets"),
        ("seed: 2024-13-45", "conf/odd.yaml: seed must be a whole number"),
        (f"seed: {'1' * 5000}", "conf/odd.yaml is not readable YAML: Exceeds the limit"),
        ("[" * 100_000, "conf/odd.yaml is not readable YAML: "),
    ],
)
def test_a_recipe_of_odd_yaml_is_one_line(workdir: Path, text: str, said: str) -> None:
    write(workdir / "conf" / "odd.yaml", text)
    with pytest.raises(ConfigError) as error:
        compose.load("odd")
    assert str(error.value).startswith(said)


def test_a_recipe_of_nothing_is_one_without_settings(workdir: Path) -> None:
    write(workdir / "conf" / "odd.yaml", "null")
    assert check(compose.load("odd"))[0].startswith("data.folder is not set")


def test_a_recipe_that_cannot_be_read_is_named(workdir: Path) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf" / "round.yaml").symlink_to("round.yaml")
    with open(workdir / "conf" / "large.yaml", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    for name, said in {"large": "File too large", "round": "Too many levels of symbolic links"}.items():
        with pytest.raises(ConfigError, match=rf"{name}\.yaml is not readable YAML: .*{said}"):
            compose.load(name)
    assert check(compose.load("pixar_style")) == []


def test_a_number_of_thousands_of_digits_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^cannot read seed=1"):
        compose.load("pixar_style", [f"seed={'1' * 5000}"])
