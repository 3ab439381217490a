"""How fast a detector looks at frames, and how fast a whole video is annotated.

    python -m scripts.bench.video --device cuda --out outputs/bench_video

A detector of full size (RT-DETR v2, ResNet-50, 800×1344) with random weights: it finds nothing, and takes as long as a
released one. Prints one JSON line a measurement: frames a second of the model by batch, of the detector
with everything around it, and of `annotate` by stage on a 4K film that is made for it. `--tiny` proves it on a CPU.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from finetune.config.schema import Device
from finetune.video.annotation import annotate, load_detector
from finetune.video.detector import Detector
from finetune.video.settings import Annotate

HEIGHT, WIDTH = 800, 1344  # what 800×1333 becomes where a side must be a multiple of 32, as here
BATCHES = (1, 8, 16, 32)
FILM = (3840, 2160, 30, 20)  # width, height, frames a second, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    reference = random_detector(given.out / "detector", tiny=given.tiny)
    film = write_film(given.out / "film.mp4", *((320, 180, 10, 2) if given.tiny else FILM))
    settings = Annotate(video=str(film), detector=str(reference), device=Device[given.device], threshold=0.5, batch=16)
    for row in measurements(settings, film, given.out, (1, 2) if given.tiny else BATCHES):
        print(json.dumps(row | where(given.device)), flush=True)


def random_detector(folder: Path, *, tiny: bool) -> Path:
    torch.manual_seed(0)
    stages = [16, 16, 16, 16] if tiny else [256, 512, 1024, 2048]
    backbone = RTDetrResNetConfig(
        embedding_size=16 if tiny else 64,
        hidden_sizes=stages,
        depths=[1, 1, 1, 1] if tiny else [3, 4, 6, 3],
        layer_type="basic" if tiny else "bottleneck",
        out_indices=[2, 3, 4],
    )
    config = RTDetrV2Config(backbone_config=backbone, encoder_in_channels=stages[1:], num_queries=50 if tiny else 300)
    RTDetrV2ForObjectDetection(config).save_pretrained(folder)
    height, width = (160, 224) if tiny else (HEIGHT, WIDTH)
    RTDetrImageProcessorPil(size={"height": height, "width": width}).save_pretrained(folder)
    return folder


def write_film(path: Path, width: int, height: int, rate: int, seconds: int) -> Path:
    """Texture that moves, with as much detail as a camera's picture has."""
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 215, (height // 8, width // 8, 3)).astype(np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"preset": "ultrafast"}
        for number in range(rate * seconds):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 4 * number, 1), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def measurements(settings: Annotate, film: Path, out: Path, batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    detector = load_detector(settings)
    width, height = detector.reads(WIDTH, HEIGHT)
    frames = np.random.default_rng(0).integers(0, 255, (max(batches), height, width, 3), dtype=np.uint8)
    for batch in batches:
        part = list(frames[:batch])
        model = rate_of(partial(run_model, detector, detector.pixels(part)), batch)
        yield {"what": "model", "batch": batch, "frames_per_s": model}
        whole = rate_of(partial(detector.find, part, width, height), batch)
        yield {"what": "detector", "batch": batch, "frames_per_s": whole}
    if torch.cuda.is_available():
        yield {"what": "memory", "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    for rate in (settings.rate, Fraction(FILM[2])):  # as the article looks, and at every frame
        record, _ = annotate(film, out / f"run-{time.time_ns()}", replace(settings, rate=rate), lambda: detector)
        size = f"{record.width}x{record.height}"
        yield {
            "what": "annotate",
            "size": size,
            "looks_per_s_of_video": float(rate),
            "video_s": record.seconds,
            "frames_per_s": record.per_second,
            "hour_of_video_takes_s": round(3600 * record.frames / record.seconds / record.per_second["together"]),
        }


@torch.no_grad()
def run_model(detector: Detector, pixels: torch.Tensor) -> None:
    detector.model(pixel_values=pixels)


def rate_of(work: Any, frames: int, least_s: float = 3.0) -> float:
    """Frames a second, after a warm-up."""
    for _ in range(2):
        work()
    wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < least_s:
        work()
        wait()
        done += frames
    return round(done / (time.perf_counter() - began), 1)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def where(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"on": name, "torch": torch.__version__, "pyav": av.__version__}


if __name__ == "__main__":
    main()
