"""Trains the content reader and the style reader on renders."""

import torch
from torch import Tensor
from torch.nn import functional

from scripts.embedded.augment import spoil, to_float
from scripts.embedded.fit import Budget, fit
from scripts.embedded.readers import Reader, save_reader
from scripts.embedded.render_sets import Pictures, join, load_set
from scripts.embedded.settings import BASE_SETS, SEED, Settings
from scripts.toyworld.looks import HELD_OUT, STYLES
from scripts.toyworld.scene import COLOURS, KINDS, SETTINGS

STYLE_SHARE_OF_TIME = 0.3  # looks are told apart sooner than things


def train_readers(settings: Settings) -> None:
    """They judge, so they may see every look."""
    pictures = join([load_set(settings, name) for name in (*BASE_SETS, *HELD_OUT)])
    content = pictures.only(lambda scene, look: len(scene.things) == 1)
    things = [scene.things[0] for scene in content.scenes]
    train_reader(
        settings,
        "content",
        content,
        {
            "kind": (tuple(KINDS), [thing.kind for thing in things]),
            "colour": (tuple(COLOURS), [thing.colour for thing in things]),
            "setting": (tuple(SETTINGS), [scene.setting for scene in content.scenes]),
        },
        share_of_time=1.0 - STYLE_SHARE_OF_TIME,
    )
    names = {look: name for name, look in STYLES.items()}
    named = pictures.only(lambda scene, look: look in names)
    train_reader(
        settings,
        "style",
        named,
        {"style": (tuple(STYLES), [names[look] for look in named.looks])},
        share_of_time=STYLE_SHARE_OF_TIME,
    )


def train_reader(
    settings: Settings,
    name: str,
    pictures: Pictures,
    questions: dict[str, tuple[tuple[str, ...], list[str]]],
    *,
    share_of_time: float,
) -> None:
    """Train one reader; `questions` gives each head's labels and every picture's answer."""
    device = pictures.images.device
    answers = {
        head: torch.tensor([labels.index(answer) for answer in given], device=device)
        for head, (labels, given) in questions.items()
    }
    torch.manual_seed(SEED)
    reader = Reader({head: labels for head, (labels, _) in questions.items()}).to(device)
    batch = settings.batch(256)
    # Classes of unequal counts (the style sets differ in size) are drawn alike often.
    first_head = next(iter(answers.values()))
    weights = 1.0 / torch.bincount(first_head).clamp_min(1).float()[first_head]

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.multinomial(weights, batch, replacement=True, generator=generator)
        images_B3PP = spoil(to_float(pictures.images[rows]), generator, zoom=1.1, shift=0.05)
        return images_B3PP, *(answer[rows] for answer in answers.values())

    def loss_of(images_B3PP: Tensor, *answers_B: Tensor) -> Tensor:
        logits = reader(images_B3PP).values()
        return torch.stack([functional.cross_entropy(*pair) for pair in zip(logits, answers_B, strict=True)]).sum()

    fitted = fit(
        reader,
        draw,
        loss_of,
        name=f"{name} reader",
        budget=Budget(settings.minutes["readers"] * 60 * share_of_time, settings.tiny_steps),
        lr=2e-3,
        checkpoint=settings.work / "checkpoints" / f"{name}-reader.pt",
        seed=SEED,
        pause_at=settings.pause_at,
        ema_decay=0.99,  # short, because the batch statistics beside it follow the latest weights
    )
    if fitted.done:
        save_reader(reader, settings.readers / f"{name}.safetensors")
