"""The peer for language models: TRL's SFTTrainer on packed rows with PEFT, on a base in NF4, as its documentation has.

python scripts/bench/trl_sft.py BASE CONVERSATIONS OUT ROWS LENGTH STEPS [liger] [rows]

liger: with Liger kernels. rows: not packed, which is TRL's default; writes how many tokens a step had into OUT.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from datasets import load_dataset

base, conversations, out, rows, length, steps, *more = sys.argv[1:]
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.bfloat16),
    processing_class=AutoTokenizer.from_pretrained(base),
    train_dataset=load_dataset("json", data_files=conversations, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=linear, task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir=out,
        max_length=int(length),
        packing="rows" not in more,
        packing_strategy="wrapped",
        per_device_train_batch_size=int(rows),
        max_steps=int(steps),
        learning_rate=1e-4,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused",
        gradient_checkpointing=True,
        use_liger_kernel="liger" in more,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()
if "rows" in more:
    (tokens,) = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry][-1:]
    Path(out).mkdir(parents=True, exist_ok=True)
    Path(out, "count.txt").write_text(str(tokens / int(steps)))
