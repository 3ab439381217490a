"""The rows of the speed table: what is trained, by us and by a peer."""

from dataclasses import dataclass
from pathlib import Path

from scripts.bench import memory

HERE = Path(__file__).resolve().parent
GIB = 24.0
FAST = "trainer.fast=true"


@dataclass(frozen=True)
class Row:
    """ours: settings of the command. peer: script and its arguments, in which BASE, DATA, OUT and STEPS are filled in.
    count: images or token positions of a step, of either side. unit: what is counted. bound: what bounds it now.
    """

    preset: str
    ours: tuple[str, ...]
    count: int
    peer: tuple[str, ...]
    peer_count: int
    unit: str
    bound: str
    steps: int = 24
    stage: str = "train"
    data: str = ""

    def case(self, name: str) -> memory.Case:
        return memory.Case(name, self.preset, GIB, self.ours)

    def command(self, name: str, base: Path, run: Path, data: Path) -> list[str]:
        """What follows `finetune`."""
        if self.stage == "caption":
            words = ["conf=pixar_style", "caption=blip_base", f"caption.model={base}", f"run_dir={run}"]
            return ["caption", *words, f"data.folder={data}", *self.ours]
        words = memory.command(self.case(name), base, run, data)
        words = [word for word in words if not word.startswith("trainer.log_every")]  # as recipes have it
        words += [f"data.file={data}"] if self.data else []
        return ["train", *words, *(f"trainer.{key}={self.steps}" for key in ("steps", "save_every", "validate_every"))]


def images(preset: str, side: int, batch: int, script: str, peer_batch: int, *more: str, bound: str) -> Row:
    """A row whose peer is one of diffusers' examples."""
    peer = (
        script, "--pretrained_model_name_or_path=BASE", "--train_data_dir=DATA", "--caption_column=text",
        "--output_dir=OUT", f"--resolution={side}", "--center_crop", f"--train_batch_size={peer_batch}", "--rank=16",
        "--learning_rate=1e-4", "--mixed_precision=bf16", "--max_train_steps=STEPS", "--seed=0",
        "--dataloader_num_workers=4", *more,
    )  # fmt: skip
    return Row(preset, of_images(side, batch), batch, peer, peer_batch, "images", bound)


def of_images(side: int, batch: int, *more: str, accumulate: int = 1) -> tuple[str, ...]:
    square = "data.max_aspect=1"  # as the peers cut them
    size = (f"model.resolution={side}", f"trainer.micro_batch={batch}", f"trainer.accumulate={accumulate}")
    return (*size, square, "lora.dropout=0", FAST, *more)


def language(
    preset: str,
    rows: int,
    length: int,
    *more: str,
    bound: str,
    accumulate: int = 1,
    checkpointing: int = 0,
    peer_rows: int = 0,
    data: str = "",
) -> Row:
    """A row whose peer is TRL, with packs as many and as long unless peer_rows says otherwise."""
    ours = (
        f"data.length={length}", "model.quantize=nf4", f"trainer.micro_batch={rows}",
        f"trainer.accumulate={accumulate}", f"trainer.activation_checkpointing={checkpointing}", "lora.dropout=0", FAST,
    )  # fmt: skip
    peer_rows = peer_rows or rows * accumulate
    peer = (str(HERE / "trl_sft.py"), "BASE", "DATA", "OUT", str(peer_rows), str(length), "STEPS", *more)
    counts = rows * accumulate * length, peer_rows * length
    return Row(preset, ours, counts[0], peer, counts[1], "tokens", bound, steps=16, data=data)


EXAMPLE, EXAMPLE_XL = "train_text_to_image_lora.py", "train_text_to_image_lora_sdxl.py"
UNET = "attention, and products too small for the GPU's best rate; norms, copies and changes of layout are a quarter"
PRODUCTS = "products of the frozen weights, which are made of 4 bits before each, and those of the adapters"
TWICE = "every block is computed twice; of half the rows every second one, 5 % more is planned in 6.8 GiB"
CAPTIONS = 64  # images at once
ROWS = {
    "sd15-4": images("sd15", 512, 4, EXAMPLE, 4, bound=UNET),
    "sd15-16": images("sd15", 512, 16, EXAMPLE, 16, bound=UNET),
    "sdxl": images("sdxl", 1024, 3, EXAMPLE_XL, 4, "--gradient_checkpointing", bound=UNET),
    "flux1-nf4": Row(
        "flux1_dev",
        of_images(1024, 1, "trainer.activation_checkpointing=4", "model.quantize=nf4", accumulate=2),
        2,
        (str(HERE / "flux_lora.py"), "BASE", "DATA", "1024", "2", "STEPS"),
        2,
        "images",
        "attention, and products of weights that are made of 4 bits before each",
        steps=16,
    ),
    "llama2-7b-4x1024": language("llama2_7b", 4, 1024, bound=PRODUCTS),
    "llama2-7b-4x1024-lean": language("llama2_7b", 4, 1024, checkpointing=1, bound=TWICE),
    "llama2-7b-8x1024": language("llama2_7b", 4, 1024, "liger", accumulate=2, bound=PRODUCTS),
    "llama31-8b-2x2048": language("llama31_8b", 2, 2048, bound=PRODUCTS),
    "llama31-8b-short": language("llama31_8b", 4, 1024, "rows", peer_rows=8, data="short", bound=PRODUCTS),
    "blip-base": Row(
        "blip_base",
        (f"caption.batch={CAPTIONS}", "caption.num_beams=1", "trainer.precision=fp16"),
        CAPTIONS,
        (str(HERE / "blip_captions.py"), "BASE", "DATA", "16"),
        1,
        "images",
        "a pass of the decoder for each word of all captions",
        steps=16,
        stage="caption",
        data="photos",
    ),
}
