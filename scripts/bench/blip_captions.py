"""The peer for captions: transformers' own loop, an image at a time, in fp16 on a GPU.

python scripts/bench/blip_captions.py BASE FOLDER IMAGES
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessor

base, folder, images = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
processor, tokenizer = BlipImageProcessor.from_pretrained(base), AutoTokenizer.from_pretrained(base)
model = BlipForConditionalGeneration.from_pretrained(base, dtype=dtype).to(device).eval()
for file in sorted(Path(folder).glob("*.jpg"))[: int(images)]:
    inputs = processor(images=Image.open(file).convert("RGB"), return_tensors="pt").to(device, dtype)
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=40)
    print(tokenizer.decode(written[0], skip_special_tokens=True))
