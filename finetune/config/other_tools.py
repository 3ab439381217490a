"""What other tools call a setting or its value: sd-scripts, diffusers' scripts, axolotl, PEFT, transformers, web UIs.

Names that a likeness finds by itself (`lora_alpha`, `mixed_precision`, `lr_scheduler`) are not here.
"""

KEYS = {
    **dict.fromkeys(("learning_rate", "unet_lr", "max_lr"), "optim.lr"),
    **dict.fromkeys(("optimizer", "optimizer_type", "optim_type"), "optim"),
    "lr_scheduler_type": "optim.schedule",
    **dict.fromkeys(("batch_size", "train_batch_size", "per_device_train_batch_size"), "trainer.micro_batch"),
    **dict.fromkeys(("micro_batch_size", "per_gpu_batch_size"), "trainer.micro_batch"),
    "gradient_accumulation_steps": "trainer.accumulate",
    "gradient_checkpointing": "trainer.activation_checkpointing",
    **dict.fromkeys(("max_steps", "max_train_steps", "num_steps", "iterations"), "trainer.steps"),
    **dict.fromkeys(("save_steps", "save_every_n_steps", "checkpointing_steps"), "trainer.save_every"),
    **dict.fromkeys(("save_total_limit", "checkpoints_total_limit"), "trainer.keep_checkpoints"),
    **dict.fromkeys(("eval_steps", "validation_steps", "eval_strategy"), "trainer.validate_every"),
    "logging_steps": "trainer.log_every",
    "early_stopping_patience": "trainer.patience",
    **dict.fromkeys(("max_grad_norm", "clip_grad_norm", "gradient_clipping"), "trainer.clip_norm"),
    **dict.fromkeys(("ema", "use_ema"), "trainer.ema_decay"),
    **dict.fromkeys(("r", "lora_r", "lora_rank", "network_dim", "dim"), "lora.rank"),
    "network_alpha": "lora.alpha",
    "network_dropout": "lora.dropout",
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target_linear"), "lora.targets"),
    "use_rslora": "lora.rslora",
    **dict.fromkeys(("use_dora", "peft_use_dora"), "lora.dora"),
    "init_lora_weights": "lora.init",
    "network_weights": "lora.start_from",
    "loraplus_lr_ratio": "optim.lora_plus",
    **dict.fromkeys(("adam_weight_decay", "decay"), "optim.weight_decay"),
    **dict.fromkeys(("beta1", "beta2", "adam_beta1", "adam_beta2"), "optim.betas"),
    **dict.fromkeys(("sequence_len", "max_seq_length", "max_length", "cutoff_len", "block_size"), "data.length"),
    "sample_packing": "data.packing",
    **dict.fromkeys(("val_set_size", "validation_split", "test_size"), "data.validation_share"),
    **dict.fromkeys(("train_data_dir", "instance_data_dir", "image_dir", "image_folder", "folder_path"), "data.folder"),
    "images": "data.folder",
    **dict.fromkeys(("train_file", "data_files"), "data.file"),
    **dict.fromkeys(("flip_aug", "random_flip"), "data.flip"),
    **dict.fromkeys(("cache_dir", "dataset_prepared_path"), "data.cache"),
    **dict.fromkeys(("max_data_loader_n_workers", "dataloader_num_workers", "num_workers"), "data.workers"),
    "bucket_reso_steps": "model.bucket_step",
    **dict.fromkeys(("base_model", "model_name", "pretrained_model", "ckpt_path"), "model.base"),
    **dict.fromkeys(("model_name_or_path", "pretrained_model_name_or_path"), "model.base"),
    **dict.fromkeys(("sd_model", "sd_model_checkpoint", "ckpt_name", "model_id", "hf_model"), "model.base"),
    **dict.fromkeys(("blocks_to_swap", "lowram", "lowvram"), "model.offload"),
    **dict.fromkeys(("tokens", "special_tokens"), "model.added_tokens"),
    **dict.fromkeys(("instance_prompt", "trigger_word", "class_tokens"), "caption.trigger"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance_scale"), "sample.guidance"),
    **dict.fromkeys(("num_inference_steps", "sample_steps"), "sample.steps"),
    **dict.fromkeys(("validation_prompt", "validation_prompts"), "sample.prompts"),
    **dict.fromkeys(("sample_every", "sample_every_n_steps"), "sample.every"),
    **dict.fromkeys(("batch_count", "num_images"), "sample.seeds"),
    **dict.fromkeys(("quantization", "quant", "fp8_base", "quant_type", "bnb_4bit_quant_type"), "model.quantize"),
    "adam_epsilon": "optim.eps",
    "cpu_offload_checkpointing": "trainer.offload_activations",
    "save_last_n_steps": "trainer.keep_checkpoints",
    "base_weights": "lora.start_from",
    "token_string": "caption.trigger",
    "negative_prompt": "sample.negative",
    "max_new_tokens": "sample.max_new_tokens",
    **dict.fromkeys(("output", "output_dir"), "run_dir"),
    **dict.fromkeys(("output_name", "run_name", "lora_name"), "name"),
}
"""Name -> the key, or the group of presets, that is meant."""

OPTIMISERS = {
    **dict.fromkeys(("adafactor", "lion", "lion8bit", "came"), "adamw8bit"),
    **dict.fromkeys(("prodigy", "sgd", "radam", "muon"), "adamw"),
}
NAMES = {
    **dict.fromkeys(("gpu", "cuda", "nvidia"), "auto"),
    **dict.fromkeys(("resume", "continue", "fit", "finetune"), "train"),
    **dict.fromkeys(("generate", "infer", "inference", "draw"), "sample"),
    **dict.fromkeys(("tag", "label"), "caption"),
    **dict.fromkeys(("merge", "convert"), "export"),
    **dict.fromkeys(("chat", "webui", "gradio"), "serve"),
    **OPTIMISERS,
    "galore_adamw": "adamw8bit",
}
"""Name -> the command or preset that is meant."""

VALUES = {
    "trainer.precision": {
        **dict.fromkeys(("no", "32", "float", "float32", "full", "tf32", "32-true"), "fp32"),
        **dict.fromkeys(("16", "half", "float16", "fp16-mixed", "16-mixed"), "fp16"),
        **dict.fromkeys(("bfloat16", "bf16-mixed", "bf16-true"), "bf16"),
    },
    "hardware.device": dict.fromkeys(("gpu", "nvidia", "rocm", "hip", "amd"), "cuda"),
    "model.quantize": {
        **dict.fromkeys(("4bit", "4-bit", "int4", "fp4", "qlora", "bnb4", "4"), "nf4"),
        **dict.fromkeys(("8bit", "8-bit", "fp8", "float8", "bnb8", "8"), "int8"),
        **dict.fromkeys(("no", "off", "false", "null"), "none"),
    },
    "optim.name": OPTIMISERS,
    "optim.schedule": {
        **dict.fromkeys(("cosine_with_restarts", "cosine_annealing"), "cosine"),
        **dict.fromkeys(("constant_with_warmup", "none"), "constant"),
        "polynomial": "linear",
    },
    "lora.init": {"pissa_niter_4": "pissa", **dict.fromkeys(("gaussian", "true", "zero", "eva", "olora"), "default")},
    "loss.weighting": {"min_snr_gamma": "min_snr", **dict.fromkeys(("none", "constant", "mse"), "uniform")},
    "data.format": {
        **dict.fromkeys(("chatml", "chat_template", "openai", "chat", "jsonl"), "messages"),
        **dict.fromkeys(("completion", "pretrain", "pretraining", "raw"), "text"),
        "input_output": "prompt_completion",
    },
    "export.formats": {
        **dict.fromkeys(("safetensors", "comfyui", "a1111", "webui", "forge", "sd-scripts"), "kohya"),
        **dict.fromkeys(("full", "hf", "16bit"), "merged"),
        "llama.cpp": "gguf",
    },
    "trainer.autotune": {"true": "auto", "false": "off"},
}
"""Key -> what other tools call a value of it -> the value that is meant. Words in small letters."""

_EPOCHS = "a run's length is trainer.steps; `finetune plan` says how often each example is seen in so many steps"
_ATTENTION = "the fastest attention that this machine has is taken by itself"
_CURVES = "curves go to tensorboard/ in the run folder (run_dir) and into report.html"
_CAPTIONS = "captions are read from metadata.jsonl, metadata.csv and .txt files, and stay as they are"
_BUCKETS = "images always go into aspect-ratio buckets: see model.resolution, model.bucket_step and data.max_aspect"
_ENCODERS = "text encoders are not trained; the rate of all else is optim.lr"
_LORA = "every adapter is a LoRA: see lora.rank, lora.targets and, for convolutions, lora.targets=wide"
_DATA = "images are in data.folder, conversations in data.file"
_GOES_ON = "a run goes on by itself: type the same command again"
_GPUS = "which GPU: put CUDA_VISIBLE_DEVICES=1 before the command; several at once: torchrun, see docs/multi_gpu.md"
_SCHEDULER = "the base's own scheduler says it"
_ANSWERS = "only the assistant's turns are trained, and all of a plain text (data.format=text)"
_OWN_FILES = "the base's own files say it, and code that comes with a model is never run"
_SUPERVISED = "training is supervised: on good answers alone"
_FAST = "what is fast on this machine is taken by itself (trainer.fast)"
_STORED = "adapters are trained and written in 32 bits; the arithmetic around them is trainer.precision"
_NOISE = "there is no such loss or noise; what there is stands under loss in finetune --help conf=NAME"
_ROWS = "rows are packed to data.length (data.packing)"
_PARTS = "what a base in a single file lacks comes from model.parts"
_READING = "texts are read as the base's own pipeline reads them"
_SCHEDULE = "a schedule is optim.schedule, optim.warmup_steps and trainer.steps, and no more"
_DRAWING = "images are drawn by the base's own pipeline, without further steps"
_PRIOR = "there are no regularisation images; what is to be kept is an image of data.folder like any other"

TRUTHS = {**dict.fromkeys(("yes", "on", "1"), "true"), **dict.fromkeys(("no", "off", "0", "none", "null"), "false")}
"""What others type for true and false."""

_MAKERS = "GPUs other than NVIDIA's are not used; type hardware.device=cpu"
_WEIGHTS = "weights in 8 bits are model.quantize=int8, in 4 bits model.quantize=nf4"

VALUE_NOTES = {
    "trainer.precision": dict.fromkeys(("fp8", "float8", "int8", "8", "8bit", "int4", "4bit", "nf4"), _WEIGHTS),
    "hardware.device": {
        **dict.fromkeys(("mps", "metal", "xpu", "npu", "tpu", "hpu", "directml", "vulkan"), _MAKERS),
        **dict.fromkeys(("cuda:0", "cuda:1", "cuda:2", "cuda:3", "0", "1", "2", "3"), _GPUS),
    },
}
"""Key -> a value of other tools -> what to know where none does the same."""

NOTES = {
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "num_train_epochs", "max_train_epochs"), _EPOCHS),
    **dict.fromkeys(("repeats", "num_repeats", "dataset_repeats"), _EPOCHS),
    "warmup_ratio": "the warm-up is counted in steps: optim.warmup_steps",
    "save_every_n_epochs": "checkpoints are counted in steps: trainer.save_every",
    "saves_per_epoch": "checkpoints are counted in steps: trainer.save_every",
    "evals_per_epoch": "validations are counted in steps: trainer.validate_every",
    "sample_every_n_epochs": "previews are counted in steps: sample.every",
    **dict.fromkeys(("sampler", "sampler_name", "sample_sampler"), "the base's own scheduler draws images"),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "data_path"), _DATA),
    **dict.fromkeys(("data_dir", "train_dir"), _DATA),
    **dict.fromkeys(("train_on_inputs", "train_on_responses_only", "assistant_only_loss"), _ANSWERS),
    "adapter": "every adapter is a LoRA; lora.start_from goes on from one, sample.adapter draws with one",
    **dict.fromkeys(("save_model_as", "save_safetensors"), "adapters are written in export.formats"),
    "fp16": "type trainer.precision=fp16",
    "bf16": "type trainer.precision=bf16",
    "load_in_4bit": "type model.quantize=nf4",
    "load_in_8bit": "type model.quantize=int8",
    **dict.fromkeys(("xformers", "flash_attention", "flash_attn", "sdpa", "mem_eff_attn", "sdp_attention"), _ATTENTION),
    **dict.fromkeys(("report_to", "log_with", "logging_dir", "wandb_project", "use_wandb"), _CURVES),
    "wandb_name": _CURVES,
    **dict.fromkeys(("hub_model_id", "push_to_hub"), "nothing is uploaded; type: hf upload and the adapter/ folder"),
    **dict.fromkeys(("resume", "resume_from_checkpoint", "auto_resume_from_checkpoints"), _GOES_ON),
    **dict.fromkeys(("caption_extension", "shuffle_caption", "keep_tokens", "caption_column"), _CAPTIONS),
    **dict.fromkeys(("enable_bucket", "min_bucket_reso", "max_bucket_reso", "center_crop", "random_crop"), _BUCKETS),
    "bucket_no_upscale": _BUCKETS,
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs"), "data.cache always does"),
    **dict.fromkeys(("text_encoder_lr", "train_text_encoder", "network_train_unet_only"), _ENCODERS),
    **dict.fromkeys(("network_module", "network_args", "network_type", "conv_dim", "conv_alpha"), _LORA),
    **dict.fromkeys(("reg_data_dir", "class_data_dir", "class_prompt", "prior_loss_weight"), _PRIOR),
    **dict.fromkeys(("v_parameterization", "v_pred", "zero_terminal_snr", "discrete_flow_shift"), _SCHEDULER),
    **dict.fromkeys(("timestep_sampling", "model_prediction_type"), _SCHEDULER),
    **dict.fromkeys(("gpu", "gpus", "gpu_id", "gpu_ids", "device_id", "device_ids", "devices", "num_processes"), _GPUS),
    **dict.fromkeys(("deepspeed", "fsdp", "num_gpus"), _GPUS),
    **dict.fromkeys(("local_rank", "rank0_only"), _GPUS),
    **dict.fromkeys(("clip_skip", "max_token_length", "weighted_captions", "apply_t5_attn_mask"), _READING),
    **dict.fromkeys(("model_type", "tokenizer_type", "base_model_config", "trust_remote_code"), _OWN_FILES),
    **dict.fromkeys(("dpo", "rl", "kto_beta", "rlhf"), _SUPERVISED),
    **dict.fromkeys(("torch_compile", "dynamo_backend", "liger_kernel", "unsloth", "cut_cross_entropy"), _FAST),
    "fused_backward_pass": _FAST,
    **dict.fromkeys(("save_precision", "full_bf16", "full_fp16", "tf32"), _STORED),
    **dict.fromkeys(("neftune_noise_alpha", "multires_noise_iterations", "multires_noise_discount"), _NOISE),
    **dict.fromkeys(("ip_noise_gamma", "adaptive_noise_scale", "debiased_estimation_loss", "loss_type"), _NOISE),
    **dict.fromkeys(("huber_c", "scale_weight_norms"), _NOISE),
    **dict.fromkeys(("roles_to_train", "train_on_eos"), _ANSWERS),
    **dict.fromkeys(("group_by_length", "pad_to_sequence_len", "eval_sample_packing"), _ROWS),
    **dict.fromkeys(("vae", "t5xxl", "clip_l", "clip_g", "ae"), _PARTS),
    **dict.fromkeys(("lr_scheduler_num_cycles", "lr_scheduler_args", "cosine_min_lr_ratio"), _SCHEDULE),
    "optimizer_args": "what an optimiser has is optim.betas, optim.eps and optim.weight_decay",
    "relora_steps": _LORA,
    "save_state": _GOES_ON,
    "stop_text_encoder_training": _ENCODERS,
    **dict.fromkeys(("min_timestep", "max_timestep", "guidance_scale_train"), _SCHEDULER),
    **dict.fromkeys(("config_file", "dataset_config"), "a recipe holds all settings, those of the data too: conf=NAME"),
    "sdxl": "type model=sdxl",
    **dict.fromkeys(("hires", "hires_fix", "restore_faces", "styles", "subseed", "eta"), _DRAWING),
    **dict.fromkeys(("denoise", "denoising_strength"), "images are drawn from noise alone"),
    **dict.fromkeys(("lora_weight", "lora_scale"), "an adapter is drawn with the strength that it was trained with"),
    **dict.fromkeys(("width", "height"), "images are drawn as squares with a side of model.resolution"),
    **dict.fromkeys(("top_p", "top_k", "repetition_penalty"), "answers are drawn by sample.temperature alone"),
}
"""Name -> what to know where no key does the same."""
