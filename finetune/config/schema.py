"""The configuration, typed: one docstring under every field says what it is, with its unit.

Plain dataclasses without a heavy import: the CLI reads them before torch is loaded. Presets in `conf/` fill them. A
field's metadata holds its rule and the kind of model that alone has it; `finetune.config.validate` has rules between.
"""

from dataclasses import dataclass, field
from enum import Enum

from finetune.config.rules import BETAS, LARGEST_SEED, POSITIVE, SEEDS, SHARE, at_least, is_file_name, multiple_of, must
from finetune.config.serve import ServeConfig
from finetune.config.workstation import CostConfig, ProfileConfig

DIFFUSION, LANGUAGE = {"kind": "diffusion"}, {"kind": "language"}


class Precision(Enum):
    """Arithmetic of the forward and backward pass; adapter and optimiser state are always fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Optimizer(Enum):
    """The optimisers that are offered; behind the name, if it isn't Adam's, the largest rate that makes sense."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"
    paged_adamw8bit = "paged_adamw8bit"

    def __init__(self, _name: str, largest_lr: float = 0.1) -> None:
        self.largest_lr = largest_lr


class Schedule(Enum):
    """Learning rate after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Device(Enum):
    """Where to compute; `auto` takes a CUDA GPU if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ExportFormat(Enum):
    """File formats of an exported adapter: what it is, the kinds of model that have it, and the setting in
    `ExportConfig` that its difference to the trained model must not exceed."""

    peft = "a folder for PEFT", ("diffusion", "language")
    diffusers = "a file for diffusers", ("diffusion",)
    kohya = "a file for ComfyUI and others", ("diffusion",)
    merged = "a whole model in 16 bit", ("language",), "divergence"
    gguf = "a file for llama.cpp", ("language",)

    def __init__(self, _meaning: str, kinds: tuple[str, ...], limit: str = "tolerance") -> None:
        self.kinds, self.limit = kinds, limit


class Quantize(Enum):
    """How the frozen base is stored: as it computes, in 8-bit integers (arXiv 2208.07339), or in 4-bit NormalFloat with
    double quantisation (arXiv 2305.14314)."""

    none = "none"
    int8 = "int8"
    nf4 = "nf4"


class LoraInit(Enum):
    """Where an adapter starts: B at zero, the base's principal components (PiSSA, arXiv 2404.02948), or what
    quantisation lost (LoftQ, arXiv 2310.08659)."""

    default = "default"
    pissa = "pissa"
    loftq = "loftq"


class Weighting(Enum):
    """How much each noise level counts in the loss of an image model."""

    uniform = "uniform"
    min_snr = "min_snr"


class ConversationFormat(Enum):
    """What the columns of a file of conversations mean."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    text = "text"


class LongRows(Enum):
    """What happens to a row of more tokens than fit."""

    keep_end = "keep_end"
    keep_start = "keep_start"
    split = "split"
    drop = "drop"
    refuse = "refuse"


class Autotune(Enum):
    """How a run on a GPU finds settings that fit: the fastest that do, those of the recipe, tried out, or untried."""

    auto = "auto"
    check = "check"
    off = "off"


class CheckpointChoice(Enum):
    """Which checkpoint is exported: the last one, or the one of the lowest validation loss."""

    last = "last"
    best = "best"


@dataclass
class ModelConfig:
    """The base model and the facts that belong to its architecture."""

    kind: str = "diffusion"
    """What is trained: diffusion (images) or language (chats)."""
    base: str = "embedded:diffusion"
    """`embedded:NAME` (comes with the package), a local folder, an image model's .safetensors file, or a hub id."""
    parts: str = field(default="", metadata=DIFFUSION)
    """Where what a base of a single file lacks comes from: a folder, or a hub id whose architecture is known."""
    family: str = field(default="sd", metadata=DIFFUSION)
    """Architecture of an image model, such as sd (Stable Diffusion 1 and 2), sdxl or flux: a module of
    `finetune.diffusion.families`."""
    lora_targets: dict[str, list[str]] = field(default_factory=dict)
    """Preset name -> module name suffixes that get an adapter; `lora.targets` picks one."""
    resolution: int = field(default=128, metadata=DIFFUSION | at_least(1, most=16_384))
    """Side of the square whose area every bucket keeps, pixels."""
    bucket_step: int = field(default=16, metadata=DIFFUSION | multiple_of(16, most=16_384))
    """Bucket sides are multiples of this, pixels; VAE factor (8) times patches, or what the UNet halves."""
    quantize: Quantize = Quantize.none
    """Storage of the frozen base: none (as it computes), int8 or nf4; less memory, a little slower and coarser."""
    offload: bool = False
    """Keep frozen blocks that don't fit `hardware.vram_gib` in CPU memory: slower, but it runs."""
    added_tokens: list[str] = field(default_factory=list, metadata=LANGUAGE)
    """New control tokens; only their own rows of the embedding are trained."""


@dataclass
class DataConfig:
    """The user's images or conversations."""

    folder: str = field(default="", metadata=DIFFUSION)
    """Folder of images, searched recursively."""
    flip: bool = field(default=False, metadata=DIFFUSION)
    """Also train on each image mirrored; wrong where captions say left and right."""
    max_pixels: int = field(default=178_956_970, metadata=DIFFUSION | at_least(1))
    """Largest image that is decoded, pixels (width x height); above it is bad. Pillow's own bomb limit."""
    max_aspect: float = field(default=2.0, metadata=DIFFUSION | at_least(1, most=100))
    """Longest side over shortest side of a bucket; longer images are cropped."""
    file: str = field(default="", metadata=LANGUAGE)
    """Conversations: JSON, JSON lines, CSV, Parquet, plain text, or a folder saved by `datasets`; or a list."""
    format: ConversationFormat = field(default=ConversationFormat.auto, metadata=LANGUAGE)
    """What the columns mean; auto recognises it and says so."""
    columns: dict[str, str] = field(default_factory=dict, metadata=LANGUAGE)
    """What the format calls a column -> what the file calls it, such as {prompt:question,completion:answer}."""
    chat_template: str = field(default="", metadata=LANGUAGE)
    """Jinja template of conversations, a file that holds one, or chatml; empty takes the tokenizer's own."""
    length: int = field(default=2048, metadata=LANGUAGE | at_least(2, most=10_000_000))
    """Tokens in a row that the model sees; longer conversations meet `data.long_rows`."""
    long_rows: LongRows = field(default=LongRows.keep_end, metadata=LANGUAGE)
    """Over-long rows: keep_end, keep_start, split, drop or refuse; the trained tokens that are lost are reported."""
    packing: bool = field(default=True, metadata=LANGUAGE)
    """Put several conversations into one row, isolated from one another; off gives each a row of its own."""
    workers: int = field(default=0, metadata=LANGUAGE | at_least(0, most=1024))
    """Processes that tokenise; 0 is one for each core."""
    skip_bad: bool = False
    """Leave out unreadable images or rows with a warning instead of stopping."""
    validation_share: float = field(default=0.1, metadata=SHARE)
    """Share held out for the validation loss, by content; sets under 20 hold out none; "split" in metadata wins."""
    cache: str = field(default="outputs/.cache", metadata=must("name a folder", str.strip))
    """Folder of encoded examples, keyed by content and safe to share between runs or to delete."""


@dataclass
class CaptionConfig:
    """Automatic captions for images that have none."""

    model: str = "embedded:captioner"
    """A captioning model such as BLIP: `embedded:captioner`, a local folder or a hub id."""
    batch: int = field(default=8, metadata=at_least(1, most=10_000))
    """Images captioned at once."""
    max_new_tokens: int = field(default=40, metadata=at_least(1, most=512))
    """Longest caption, tokens."""
    num_beams: int = field(default=1, metadata=at_least(1, most=100))
    """Beams of the search; 1 is greedy."""
    prefix: str = ""
    """Text put in front of a generated caption."""
    trigger: str = ""
    """Phrase put behind a generated caption, after a comma; prompts that contain it call the style up."""
    overwrite: bool = False
    """Caption every image again. Captions written by hand are lost, so this is off."""


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685)."""

    rank: int = field(default=16, metadata=at_least(1, most=16_384))
    """Inner dimension r."""
    alpha: float = field(default=32.0, metadata=POSITIVE)
    """The update is scaled by alpha / rank."""
    dropout: float = field(default=0.0, metadata=SHARE)
    """Dropout on an adapter's input, probability."""
    targets: str = "attention"
    """Which of the model's `lora_targets` presets gets adapters."""
    init: LoraInit = field(default=LoraInit.default, metadata=LANGUAGE)
    """Where the adapter starts: default (no change), pissa (principal components), loftq (makes up for nf4)."""
    rslora: bool = field(default=False, metadata=LANGUAGE)
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732): high ranks then still learn."""
    dora: bool = field(default=False, metadata=LANGUAGE)
    """Train the weights' magnitude apart from their direction (arXiv 2402.09353): a little better, slower."""
    start_from: str = ""
    """Adapter to continue from: a PEFT folder, a run's adapter folder, for image models also a diffusers or kohya-style
    file. The start is the same function whatever alpha is here; empty starts at zero."""


@dataclass
class OptimConfig:
    """Optimiser and learning rate."""

    name: Optimizer = Optimizer.adamw
    """adamw (fused), adamw8bit (bitsandbytes; 8-bit states) or paged_adamw8bit (and in CPU memory on a full GPU)."""
    lr: float = field(default=1e-4, metadata=POSITIVE)
    """Peak learning rate."""
    allow_large_lr: bool = False
    """Take any rate; otherwise one that is beyond the optimiser's scale is refused as a slip."""
    lora_plus: float = field(default=1.0, metadata=POSITIVE)
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354); 1 gives both the same."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata=BETAS)
    """Adam's decay rates."""
    eps: float = field(default=1e-8, metadata=POSITIVE)
    """Adam's denominator floor."""
    weight_decay: float = field(default=0.01, metadata=at_least(0))
    """Decoupled weight decay."""
    schedule: Schedule = Schedule.linear
    """Learning rate after the warm-up: constant, or to zero at the last step (linear, cosine)."""
    warmup_steps: int = field(default=100, metadata=at_least(0))
    """Optimiser steps of linear warm-up; 0 starts at full rate."""


@dataclass
class TrainerConfig:
    """How long, how much at once, and what is kept."""

    steps: int = field(default=1000, metadata=at_least(1))
    """Optimiser steps in all."""
    micro_batch: int = field(default=4, metadata=at_least(1, most=10_000))
    """Examples in one forward pass on one process."""
    accumulate: int = field(default=4, metadata=at_least(1, most=100_000))
    """Micro-batches in one optimiser step; effective batch = micro_batch x accumulate x processes."""
    precision: Precision = Precision.auto
    """fp32, bf16 or fp16 (with loss scaling); auto takes bf16 on a GPU that has it, else fp16, and fp32 on a CPU."""
    clip_norm: float = field(default=1.0, metadata=at_least(0))
    """Largest gradient norm; 0 does not clip."""
    max_bad_steps: int = field(default=5, metadata=at_least(1))
    """Refused (non-finite) steps in a row after which the run stops."""
    save_every: int = field(default=500, metadata=at_least(1))
    """Steps between checkpoints; the last step always saves."""
    keep_checkpoints: int = field(default=2, metadata=at_least(1))
    """Newest checkpoints kept; the best one is kept besides."""
    log_every: int = field(default=10, metadata=at_least(1))
    """Steps between log lines and TensorBoard points that need device work."""
    validate_every: int = field(default=100, metadata=at_least(0))
    """Steps between validation losses; 0 turns them off."""
    ema_decay: float = field(default=0.0, metadata=SHARE)
    """Decay of an averaged copy of the adapter, saved as an extra file; 0 keeps none."""
    activation_checkpointing: int = field(default=0, metadata=at_least(0, 1))
    """Blocks recomputed in the backward pass, less memory for more time: 0 none, 1 each, n every n-th."""
    autotune: Autotune = Autotune.auto
    """On a GPU: auto takes the fastest micro_batch, accumulate, activation_checkpointing and model.offload that fit,
    with the same effective batch; check keeps those given; both make a dry run of the largest step; off does not."""
    fast: bool = True
    """On a GPU: fewer, larger kernels, or all of a step in one CUDA graph, where model and settings allow it."""
    offload_activations: bool = False
    """Keep what backward needs in CPU memory: of checkpointed blocks the inputs, of others all. Slower."""
    patience: int = field(default=0, metadata=at_least(0))
    """Validations in a row without a better loss after which training stops early; 0 never stops."""
    restart: bool = False
    """Set an earlier run in this folder aside (`previous-N/`) and start at step 0."""


@dataclass
class LossConfig:
    """The diffusion loss."""

    weighting: Weighting = field(default=Weighting.min_snr, metadata=DIFFUSION)
    """How noise levels are weighted: min_snr (arXiv 2303.09556; flow matching: alike) or uniform (alike)."""
    min_snr_gamma: float = field(default=5.0, metadata=DIFFUSION | at_least(0))
    """Cap of the signal-to-noise ratio in min_snr; 0 weights all noise levels alike."""
    noise_offset: float = field(default=0.0, metadata=DIFFUSION | at_least(0))
    """Size of a constant added to each channel's noise: lets very dark and bright images be learnt."""
    caption_dropout: float = field(default=0.1, metadata=DIFFUSION | SHARE)
    """Share of examples trained with an empty caption, which guidance needs."""


@dataclass
class HardwareConfig:
    """Facts about the machine."""

    device: Device = Device.auto
    """auto, cpu or cuda."""
    vram_gib: float = field(default=0.0, metadata=at_least(0))
    """Memory of the GPU that may be used, GiB; 0 is all of it."""
    gpu: str = ""
    """The GPU as its driver calls it: `plan` then needs none; empty reads the machine."""
    bf16: bool = True
    """Whether the GPU computes in bf16."""
    tflops: float = field(default=0.0, metadata=at_least(0))
    """Peak of dense products in 16 bit with fp32 sums, TFLOP/s."""
    fp32_tflops: float = field(default=0.0, metadata=at_least(0))
    """Peak in fp32, TFLOP/s."""
    gb_per_s: float = field(default=0.0, metadata=at_least(0))
    """Peak of the GPU's memory, GB/s."""
    pcie_gb_per_s: float = field(default=20.0, metadata=POSITIVE)
    """Between CPU memory and the GPU, GB/s: of PCIe 4.0 x16 two thirds of its peak."""


@dataclass
class SampleConfig:
    """Images drawn, or answers written, while training and at the end."""

    adapter: str = ""
    """PEFT folder or LoRA file to draw with; empty takes the run's own."""
    prompts: list[str] = field(default_factory=list)
    """What to draw or to answer; each prompt for each seed. [] draws nothing, no previews either."""
    negative: str = field(default="", metadata=DIFFUSION)
    """What guidance leads away from."""
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata=SEEDS)
    """One image (or answer) per prompt and seed; base and tuned start from the same noise."""
    steps: int = field(default=25, metadata=DIFFUSION | at_least(1, most=1000))
    """Denoising steps."""
    guidance: float = field(default=7.5, metadata=DIFFUSION | at_least(0))
    """Classifier-free guidance scale (arXiv 2207.12598)."""
    max_new_tokens: int = field(default=128, metadata=LANGUAGE | at_least(1, most=1_000_000))
    """Longest answer, tokens."""
    temperature: float = field(default=0.0, metadata=LANGUAGE | at_least(0))
    """Of the tokens drawn; 0 always takes the likeliest."""
    every: int = field(default=0, metadata=at_least(0))
    """Training steps between previews in TensorBoard; 0 makes them at the first and last step only."""
    previews: int = field(default=4, metadata=at_least(0))
    """Prompts of a preview (the first ones, with the first seed); 0 makes none."""


@dataclass
class ExportConfig:
    """What is exported."""

    formats: list[ExportFormat] = field(
        default_factory=lambda: [ExportFormat.peft, ExportFormat.diffusers, ExportFormat.kohya],
        metadata=must("name at least one format", bool, ["peft"]),
    )
    """File formats that are written, loaded back and compared."""
    tolerance: float = field(default=1e-5, metadata=POSITIVE)
    """Largest relative difference (fp32) between an exported adapter and the trained module."""
    divergence: float = field(default=0.05, metadata=LANGUAGE | POSITIVE)
    """Largest mean divergence (KL, nats a token) of a merged or quantised model from the trained one."""
    checkpoint: CheckpointChoice = CheckpointChoice.last
    """What is exported: the last checkpoint, or the one of the lowest validation loss (best)."""


@dataclass
class Config:
    """One run. `name` is the recipe's file name unless the recipe says otherwise."""

    name: str = field(default="run", metadata=must("be one name, no path, of at most 200 bytes", is_file_name, "mine"))
    """The recipe; also the name of the run folder and of exported files."""
    seed: int = field(default=0, metadata=must("be in 0 … 2^63-1", lambda seed: 0 <= seed <= LARGEST_SEED))
    """Every random number of the run follows from it."""
    run_dir: str = field(default="outputs/${name}", metadata=must("name a folder", str.strip, "outputs/mine"))
    """Folder of everything this run writes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig, metadata=DIFFUSION)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    loss: LossConfig = field(default_factory=LossConfig, metadata=DIFFUSION)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    cost: CostConfig = field(default_factory=CostConfig)
