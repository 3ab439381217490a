"""The peer for FLUX.1: a LoRA loop on diffusers' classes with the base in NF4, in the settings of diffusers' example of
it: texts and latents are made beforehand, blocks are recomputed, AdamW has 8 bits.

python scripts/bench/flux_lora.py BASE FOLDER SIDE BATCH STEPS
"""

import gc
import itertools
import json
import random
import sys
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import BitsAndBytesConfig, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig, prepare_model_for_kbit_training
from PIL import Image

base, folder, side, batch, steps = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
accelerator = Accelerator(mixed_precision="bf16")
device, dtype = accelerator.device, torch.bfloat16
torch.manual_seed(0)

pipeline = FluxPipeline.from_pretrained(base, transformer=None, torch_dtype=dtype).to(device)
examples = []
with torch.no_grad():
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        entry = json.loads(line)
        image = Image.open(folder / entry["file_name"]).convert("RGB").resize((side, side))
        pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].to(device, dtype) / 127.5 - 1
        text, pooled, text_ids = pipeline.encode_prompt(entry["text"], None, device=device, max_sequence_length=512)
        examples.append((pipeline.vae.encode(pixels).latent_dist, text, pooled))
shift, scale = pipeline.vae.config.shift_factor, pipeline.vae.config.scaling_factor
del pipeline
gc.collect()

scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
transformer = FluxTransformer2DModel.from_pretrained(
    base, subfolder="transformer", quantization_config=stored if torch.cuda.is_available() else None, torch_dtype=dtype
)
transformer = prepare_model_for_kbit_training(transformer, use_gradient_checkpointing=False)
transformer.requires_grad_(False)
transformer.enable_gradient_checkpointing()
attention = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=attention))
trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=1e-4)
transformer, optimizer = accelerator.prepare(transformer, optimizer)
transformer.train()

draw = random.Random(0)
order = itertools.chain.from_iterable(draw.sample(examples, len(examples)) for _ in itertools.count())
sigmas = scheduler.sigmas.to(device)
for _ in range(steps):
    drawn = list(itertools.islice(order, batch))
    clean = (torch.cat([latents.sample() for latents, _, _ in drawn]) - shift) * scale
    noise = torch.randn_like(clean)
    share = compute_density_for_timestep_sampling("logit_normal", batch, logit_mean=0.0, logit_std=1.0)
    places = (share * scheduler.config.num_train_timesteps).long()
    sigma = sigmas[places.to(device)].view(-1, 1, 1, 1).to(clean.dtype)
    noisy = (1 - sigma) * clean + sigma * noise
    rows, columns = clean.shape[2:]
    packed = FluxPipeline._pack_latents(noisy, batch, clean.shape[1], rows, columns)
    image_ids = FluxPipeline._prepare_latent_image_ids(batch, rows // 2, columns // 2, device, dtype)
    predicted = transformer(
        hidden_states=packed,
        timestep=sigma.flatten(),
        guidance=torch.ones(batch, device=device),
        pooled_projections=torch.cat([pooled for _, _, pooled in drawn]),
        encoder_hidden_states=torch.cat([text for _, text, _ in drawn]),
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    predicted = FluxPipeline._unpack_latents(predicted, 8 * rows, 8 * columns, 8)
    weights = compute_loss_weighting_for_sd3("none", sigma)
    loss = (weights.float() * (predicted.float() - (noise - clean).float()) ** 2).mean()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item())
