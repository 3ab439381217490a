"""The training scripts of the embedded models, on tiny random models: nothing here waits for real training."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from scripts.embedded.captioner import new_processor, targets
from scripts.embedded.diffusion import append, made_up_suffixes, new_scheduler, tokenise, velocity_pair
from scripts.embedded.evaluate import describe
from scripts.embedded.export import export_diffusion, export_model
from scripts.embedded.packing import pack, unpack
from scripts.embedded.readers import Reader, load_reader, read, save_reader
from scripts.embedded.render_sets import Pictures, chunk_scenes, chunks_in_turn
from scripts.embedded.settings import BASE_SETS, FULL_SETS, Settings
from scripts.embedded.vocabularies import make_wordpiece_tokenizer, save_clip_tokenizer, train_clip_tokenizer
from scripts.toyworld.captions import caption, styled
from scripts.toyworld.looks import HELD_OUT, NAMED, random_look
from scripts.toyworld.scene import held_out, sample_scene
from tests.unit.scripts.tiny_autoencoder import tiny_autoencoder

ALL_HEADS = {"kind": ("cat", "car"), "colour": ("red", "blue"), "setting": ("snow", "space")}
CAPTIONS = [caption(sample_scene(seed), seed % 8) for seed in range(200)]


@pytest.fixture(scope="module")
def clip_tokenizer() -> CLIPTokenizer:
    return train_clip_tokenizer(CAPTIONS)


# --- tokenizers -------------------------------------------------------------------------------------------------


def test_clip_tokenizer_survives_a_round_trip_through_its_folder(clip_tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    save_clip_tokenizer(clip_tokenizer, tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a big red robot on the left, in a meadow, pixar style"
    ids = again(text)["input_ids"]
    assert ids == clip_tokenizer(text)["input_ids"]
    assert again.decode(ids, skip_special_tokens=True).replace(" ,", ",") == text
    assert again.model_max_length == 77
    assert len(again) <= 1000
    assert {path.name for path in tmp_path.iterdir()} >= {"vocab.json", "merges.txt"}


def test_the_words_of_every_look_are_known_and_their_captions_fit() -> None:
    """Each word is one token, and the longest captions end before the text encoder does."""
    rng = random.Random(0)
    looks = [*NAMED.values(), *(random_look(rng) for _ in range(300))]
    texts = [styled(caption(sample_scene(k, things=2), k % 8), look, k % 8) for k, look in enumerate(looks * 8)]
    tokenizer = train_clip_tokenizer([*CAPTIONS, *texts])
    for word in ("watercolour", "crayon", "knitted", "halftone", "vivid"):
        assert len(tokenizer(word)["input_ids"]) == 3, word
    assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) <= 77 - 12  # a made-up suffix may follow


def test_clip_tokenizer_pads_as_trained_with_its_end_token(clip_tokenizer: CLIPTokenizer) -> None:
    tokens_L = tokenise(clip_tokenizer, [["a cat"]])[0, 0]
    assert tokens_L[0] == clip_tokenizer.bos_token_id
    assert (tokens_L[5:] == clip_tokenizer.eos_token_id).all()


@pytest.mark.parametrize("word", ["zorp", "vexa", "ÿ", "日本", "42", "🦊"])
def test_any_word_tokenises_and_comes_back(clip_tokenizer: CLIPTokenizer, word: str) -> None:
    ids = clip_tokenizer(word)["input_ids"][1:-1]
    assert ids
    assert clip_tokenizer.eos_token_id not in ids
    assert clip_tokenizer.decode(ids).replace(" ", "") == word


def test_caption_words_are_single_pieces_of_the_captioners_vocabulary() -> None:
    tokenizer = make_wordpiece_tokenizer(CAPTIONS, 32)
    assert tokenizer.tokenize("a red robot, zorp") == ["a", "red", "robot", ",", "z", "##o", "##r", "##p"]
    tokens_NL, labels_NL = targets(tokenizer, ["a red robot", "a red robot and a cat, in space"])
    assert tokens_NL[0, 0] == tokenizer.bos_token_id
    assert (labels_NL[0, 5:] == -100).all()
    assert tokenizer.decode(tokens_NL[0], skip_special_tokens=True) == "a red robot"


# --- captions of the diffusion training -------------------------------------------------------------------------


def test_suffix_goes_behind_its_caption(clip_tokenizer: CLIPTokenizer) -> None:
    captions, suffix = ["a cat", "a big red robot on the left, in a meadow"], ", zorp style"
    tokens_NL = tokenise(clip_tokenizer, [captions])[0]
    suffixes_NL = tokenise(clip_tokenizer, [[suffix, suffix]])[0]
    joined_NL = append(tokens_NL.long(), suffixes_NL.long(), clip_tokenizer.eos_token_id)
    wanted_NL = tokenise(clip_tokenizer, [[text + suffix for text in captions]])[0]
    assert torch.equal(joined_NL, wanted_NL.long())


def test_made_up_suffixes_never_name_the_trigger() -> None:
    suffixes = made_up_suffixes(500)
    assert len(set(suffixes)) > 400
    assert not any(word in suffix for suffix in suffixes for name in HELD_OUT for word in name.split())


def test_noise_and_velocity_agree_with_the_scheduler() -> None:
    scheduler, generator = DDPMScheduler.from_config(new_scheduler().config), torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 500, 998])  # at 999 the sampler keeps its logarithm finite
    noisy, velocity = velocity_pair(clean, noise, new_scheduler().alphas_cumprod[timesteps])
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, timesteps))
    torch.testing.assert_close(velocity, scheduler.get_velocity(clean, noise, timesteps))


# --- data -------------------------------------------------------------------------------------------------------


def test_training_sets_hold_no_held_out_combination_and_share_no_seed() -> None:
    seen: set[int] = set()
    for whole in FULL_SETS:
        scenes = chunk_scenes(whole, 0)
        assert whole.crowded or not (whole.for_training and any(map(held_out, scenes)))
        seeds = set(range(whole.first_seed, whole.first_seed + whole.seeds))
        assert not seeds & seen
        seen |= seeds


def test_without_readers_and_captioner_no_look_held_out_is_drawn_for_training(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, "cpu", tiny=False, kept=frozenset({"readers", "captioner", "detector"}))
    assert [entry.name for entry in settings.sets if entry.for_training] == list(BASE_SETS)
    assert {entry.name for entry in settings.sets if not entry.for_training} == {
        entry.name for entry in FULL_SETS if not entry.for_training and not entry.crowded
    }


def test_a_cut_rendering_leaves_every_training_set_in_proportion() -> None:
    order = [whole.name for whole, _ in chunks_in_turn(FULL_SETS) if whole.for_training]
    half = order[: len(order) // 2]
    assert half.count("pixar") / order.count("pixar") == pytest.approx(0.5, abs=0.06)


# --- export, readers, packing ----------------------------------------------------------------------------------


def test_mirror_images_come_with_words_that_fit_them() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    scenes = [sample_scene(1, things=2), sample_scene(2, things=1)]
    both = Pictures(images, scenes, [NAMED["flat"], NAMED["clay"]]).with_mirrored()
    assert torch.equal(both.images[2:].flip(3), both.images[:2])
    assert both.looks == [NAMED["flat"], NAMED["clay"]] * 2
    first, second = scenes[0].things
    assert [thing.kind for thing in both.scenes[2].things] == [second.kind, first.kind]
    assert both.captions()[2][0].index(second.kind) < both.captions()[2][0].index(first.kind)


def test_exported_diffusion_loads_and_draws(clip_tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
    )
    export_diffusion(
        tmp_path,
        vae=tiny_autoencoder(),
        unet=unet,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=clip_tokenizer,
        scheduler=new_scheduler(),
    )
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    assert pipeline.safety_checker is None
    images = pipeline(["a cat", "a zorp"], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()


def test_exported_captioner_loads_and_describes(tmp_path: Path) -> None:
    tokenizer = make_wordpiece_tokenizer(CAPTIONS, 32)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**small, **special, "encoder_hidden_size": 16, "vocab_size": len(tokenizer)},
        vision_config={**small, "image_size": 128, "patch_size": 32},
    )
    export_model(tmp_path, model=BlipForConditionalGeneration(config), processor=new_processor(tokenizer))
    model = BlipForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    pictures = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    texts = describe(model, BlipProcessor.from_pretrained(tmp_path), pictures)
    assert len(texts) == 2
    assert not any("[" in text for text in texts)


def test_a_saved_reader_reads_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reader = Reader({"kind": ("cat", "car"), "colour": ("red", "green", "blue")}).eval()
    save_reader(reader, tmp_path / "reader.safetensors")
    loaded = load_reader(tmp_path / "reader.safetensors")
    images = torch.randint(0, 256, (5, 3, 128, 128), dtype=torch.uint8)
    answers = read(loaded, images)
    assert loaded.labels == reader.labels
    assert [len(answers[head]) for head in ("kind", "colour")] == [5, 5]
    assert set(answers["colour"]) <= {"red", "green", "blue"}
    assert read(loaded, images.float() / 255) == answers
    assert (tmp_path / "reader.safetensors").stat().st_size <= 2**20


def test_packed_artefacts_come_back(tmp_path: Path) -> None:
    def settings(name: str) -> Settings:
        return Settings(work=tmp_path / name / "work", root=tmp_path / name / "root", device="cpu", tiny=True)

    here, there = settings("here"), settings("there")
    contents = {
        here.embedded / "diffusion" / "unet" / "model.safetensors": b"a" * 9_000_000,
        here.embedded / "captioner" / "model.safetensors": b"b" * 9_000_000,
        here.readers / "content.safetensors": b"c",
        here.evaluation / "samples.png": b"d",
        here.work / "render.log": b"e",
    }
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    pack(here, tmp_path / "out")
    tars = list((tmp_path / "out").iterdir())
    assert len(tars) == 2
    assert all(tar.stat().st_size <= 15 * 2**20 for tar in tars)
    unpack(there, tmp_path / "out")
    for path, content in contents.items():
        assert (tmp_path / "there" / path.relative_to(tmp_path / "here")).read_bytes() == content


def test_an_autoencoder_that_is_not_yet_shipped_is_packed_in_fp16(tmp_path: Path) -> None:
    settings = Settings(work=tmp_path / "work", root=tmp_path / "root", device="cpu", tiny=True)
    tiny_autoencoder().save_pretrained(settings.work / "autoencoder")
    pack(settings, tmp_path / "out")
    there = replace(settings, work=tmp_path / "there")
    unpack(there, tmp_path / "out")
    weights = load_file(there.work / "autoencoder" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    AutoencoderKL.from_pretrained(there.work / "autoencoder")


def test_artefacts_that_no_machine_would_hand_back_are_refused(tmp_path: Path) -> None:
    settings = Settings(work=tmp_path / "work", root=tmp_path, device="cpu", tiny=True)
    folder = settings.embedded / "diffusion"
    folder.mkdir(parents=True)
    for number in range(7):
        with (folder / f"{number}.safetensors").open("wb") as file:
            file.truncate(14 * 2**20)
    with pytest.raises(ValueError, match="the artefacts need 7 tars of 15 MiB, 98 MiB in all; 6 and 62 MiB may be"):
        pack(settings, tmp_path / "out")
