"""Suggestions for an unknown option, key or verb: first by names in other programs, then by spelling."""

import difflib
from collections.abc import Collection

from gptjax.errors import did_you_mean

OPTIONS: dict[str, str] = {
    "seed": "random_seed manual_seed rng_seed",
    "init_from": "model pretrained pretrained_model from_pretrained base_model model_name_or_path finetune_from"
    " load_from weights warm_start",
    "out": "output output_file",
    "run_dir": "out out_dir output output_dir save_dir log_dir logdir work_dir workdir ckpt_dir checkpoint_dir run"
    " run_name model model_dir model_path ckpt checkpoint_path",
    "cache_dir": "cache",
    "model.n_layer": "layers num_layers n_layers depth num_hidden_layers n_blocks num_blocks",
    "model.n_head": "heads num_heads n_heads num_attention_heads",
    "model.n_kv_head": "kv_heads num_kv_heads n_kv_heads num_key_value_heads n_query_groups",
    "model.n_embd": "d_model dim width hidden hidden_size embed_dim emb_dim n_embed embedding_size model_dim",
    "model.block_size": "context context_length context_size ctx ctx_len seq_len seq_length sequence_length"
    " sequence_len max_seq_len max_seq_length max_sequence_length max_length n_ctx n_positions"
    " max_position_embeddings",
    "model.dropout": "drop dropout_rate dropout_prob p_dropout resid_pdrop attn_pdrop embd_pdrop",
    "model.attention_window": "window sliding_window window_size local_window",
    "model.tied_embeddings": "tie_weights tie_embeddings tie_word_embeddings weight_tying tied",
    "model.adapter.kind": "lora peft adapters use_lora",
    "model.adapter.rank": "lora_r lora_rank r",
    "model.adapter.alpha": "lora_alpha",
    "model.adapter.dropout": "lora_dropout",
    "model.adapter.targets": "target_modules lora_targets",
    "tokenizer.name": "tokenizer encoding tokenizer_name",
    "tokenizer.kind": "tokenizer_type tokenizer_kind",
    "tokenizer.vocab_size": "vocab n_vocab",
    "data.path": "data text dataset data_path data_dir dataset_path dataset_dir train_file train_data train_path"
    " corpus input input_file text_file files",
    "data.hf_dataset": "dataset_name hf_path huggingface",
    "data.validation_fraction": "val_split val_fraction valid_fraction validation_split test_size eval_fraction",
    "task.validation_path": "val_file val_path validation_file eval_file eval_path test_file",
    "optim.name": "optimizer optim_name opt",
    "optim.learning_rate": "lr learn_rate max_lr peak_lr base_lr max_learning_rate eta",
    "optim.min_learning_rate": "min_lr lr_min final_lr end_lr eta_min min_learn_rate",
    "optim.warmup_steps": "warmup warm_up warmup_iters num_warmup_steps lr_warmup_steps warmup_updates",
    "optim.warmup_fraction": "warmup_ratio warmup_share warmup_proportion",
    "optim.schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler lr_decay decay_lr lr_decay_style",
    "optim.weight_decay": "wd l2 decay",
    "optim.beta1": "betas adam_beta1 b1",
    "optim.beta2": "adam_beta2 b2",
    "optim.eps": "epsilon adam_eps adam_epsilon",
    "optim.grad_clip": "clip clip_grad clip_norm max_grad_norm gradient_clip gradient_clip_val grad_norm_clip"
    " clip_grad_norm clip_gradients",
    "train.num_epochs": "epochs epoch n_epochs max_epochs num_train_epochs",
    "train.num_steps": "steps iters iterations max_iters max_steps num_iters num_iterations total_steps train_steps"
    " training_steps updates max_updates n_steps",
    "train.batch_size": "batch bs train_batch_size global_batch_size total_batch_size",
    "batch_size": "bs eval_batch_size per_device_eval_batch_size",
    "train.micro_batch_size": "grad_accum grad_accum_steps gradient_accumulation gradient_accumulation_steps"
    " accumulate accumulate_grad_batches accumulation_steps micro_batch microbatch device_batch_size"
    " per_device_batch_size per_device_train_batch_size",
    "train.compute_dtype": "dtype precision amp mixed_precision fp16 bf16 bfloat16 half",
    "compute_dtype": "dtype precision fp16 bf16 bfloat16 half",
    "train.label_smoothing": "smoothing label_smoothing_factor",
    "train.z_loss": "zloss z_loss_weight",
    "train.ema": "ema_decay ema_rate use_ema",
    "train.remat": "gradient_checkpointing activation_checkpointing recompute recompute_granularity rematerialize"
    " grad_checkpointing",
    "train.log_every": "log_interval logging_steps log_freq log_steps print_every print_freq",
    "train.eval_every": "eval_interval eval_freq eval_steps val_every val_interval val_check_interval validate_every"
    " test_every",
    "train.eval_windows": "eval_iters eval_batches val_batches limit_val_batches num_eval_batches",
    "windows": "eval_iters eval_batches limit num_samples max_samples",
    "train.save_every": "save_interval save_steps save_freq ckpt_every checkpoint_every checkpoint_interval",
    "train.keep_checkpoints": "keep save_total_limit max_checkpoints max_to_keep save_top_k",
    "train.patience": "early_stop early_stopping early_stopping_patience",
    "train.best_by": "metric monitor best_metric metric_for_best_model",
    "mesh.data": "dp data_parallel dp_size data_parallel_size",
    "mesh.fsdp": "zero fully_sharded",
    "mesh.tensor": "tp tensor_parallel tensor_parallel_size tp_size tensor_model_parallel_size model_parallel",
    "mesh.context": "cp sp context_parallel sequence_parallel context_parallel_size",
    "mesh.stage": "pp pipeline pipeline_parallel pipeline_parallel_size stages",
    "prompt": "text start input query",
    "prompt_file": "file input_file start_file",
    "text": "prompt input",
    "file": "input input_file path data",
    "num_samples": "n num samples n_samples num_return_sequences",
    "max_new_tokens": "max_tokens length max_length num_tokens n_tokens tokens new_tokens max_gen_len n_predict",
    "temperature": "temp t",
    "top_k": "k topk",
    "top_p": "p nucleus topp",
    "to": "out out_dir output output_dir save_dir run_dir",
    "log.wandb": "wandb use_wandb wandb_log log_wandb",
    "log.tensorboard": "tensorboard use_tensorboard tensorboard_dir tb",
    "log.trackio": "trackio use_trackio",
    "log.mlflow": "mlflow use_mlflow",
    "log.project": "wandb_project project_name experiment_name",
    "chip": "gpu device accelerator hardware",
    "devices": "num_devices n_devices num_gpus gpus n_gpus",
}
"""Names of each option in other programs, separated by spaces. If a name stands at two options, the first that the verb
has is suggested."""

HINTS: dict[str, str] = {
    **dict.fromkeys(
        ("report_to", "logger", "sinks", "loggers"),
        "A run writes its metrics to metrics.jsonl in its run directory, one JSON object a line; log.tensorboard,"
        " log.wandb, log.trackio and log.mlflow send them elsewhere too.",
    ),
    **dict.fromkeys(
        ("device", "cuda", "gpu", "gpus", "accelerator", "use_gpu", "num_gpus"),
        "JAX uses every device that it finds; the environment variables JAX_PLATFORMS and CUDA_VISIBLE_DEVICES"
        " choose among them.",
    ),
    **dict.fromkeys(
        ("compile", "torch_compile", "jit"),
        "Every step is compiled by XLA; there is no option for it.",
    ),
    **dict.fromkeys(
        ("num_workers", "workers", "dataloader_num_workers", "prefetch"),
        "Batches are always prepared in the background; there is no option for it.",
    ),
    **dict.fromkeys(
        ("resume", "resume_from", "resume_from_checkpoint", "load_checkpoint", "auto_resume"),
        "A run resumes by itself: gptjax train RUN_DIR, or the command that started it.",
    ),
    **dict.fromkeys(
        ("config", "cfg", "config_file", "conf"),
        "A config file is given without an option's name: gptjax train CONFIG.yaml.",
    ),
}
"""Hints for options that gptjax does not have under any name."""

VERBS: dict[str, str] = {
    "sample": "generate generation inference infer complete completion gen decode prompt",
    "train": "finetune fine-tune fine_tune fit pretrain pre-train resume continue sft run learn",
    "evaluate": "eval test score validate validation perplexity ppl measure",
    "predict": "classify label tag annotate",
    "prepare": "tokenize tokenise preprocess encode",
    "doctor": "check info verify env debug status",
    "plan": "estimate memory cost flops",
    "verify-resume": "verify_resume verify-resuming",
    "sweep": "search grid tune hyperparameters hpo",
    "lr-find": "lr_find lrfind find_lr lr-finder lr_finder",
    "diagnose": "analyze analyse calibration errors",
    "profile": "trace profiler benchmark_step",
    "inspect": "explain attention lens interpret logit_lens",
    "report": "plot curves compare dashboard visualize visualise view show summary",
}
"""Each verb's names in other programs."""

VERB_HINTS: dict[str, str] = {
    **dict.fromkeys(
        ("log", "logs", "metrics", "tensorboard", "wandb"),
        "A run's metrics are in metrics.jsonl in its run directory, one JSON object a line; gptjax report draws them.",
    ),
    "convert": "gptjax import reads a Hugging Face folder, gptjax export writes one.",
    "bench": "make bench measures this machine.",
    "benchmark": "make bench measures this machine.",
}


def suggest_option(name: str, options: Collection[str]) -> str:
    """Returns a sentence that names the option meant by `name`, or an empty string.

    Args:
        name: What the user wrote, such as "optim.lr" or "batch-size".
        options: Dotted names that exist, such as "optim.learning_rate".
    """
    written = name.lower().replace("-", "_")
    by_word = {option.rpartition(".")[2]: option for option in sorted(options, key=lambda o: -o.count("."))}
    meant = meant_option(written, options)
    if meant in options:
        return _did_you_mean(meant)
    if meant:
        return f" {meant}"
    near = difflib.get_close_matches(written, options, 1)
    near += [by_word[word] for word in difflib.get_close_matches(written.rpartition(".")[2], by_word, 1)]
    return _did_you_mean(near[0]) if near else ""


def meant_option(name: str, options: Collection[str]) -> str:
    """Returns the option that `name` means, a sentence from `HINTS`, or an empty string; spelling does not count."""
    if name in options:
        return name
    word = name.rpartition(".")[2]
    meant = [option for option, words in OPTIONS.items() if option in options and word in words.split()]
    same = [option for option in options if option.rpartition(".")[2] == word]
    meant += sorted(same, key=lambda option: option.count("."))
    return meant[0] if meant else HINTS.get(word, "")


def suggest_verb(name: str, verbs: Collection[str]) -> str:
    """Returns a sentence that names the verb meant by `name`, or an empty string."""
    for verb, words in VERBS.items():
        if verb in verbs and name.lower() in words.split():
            return _did_you_mean(verb)
    hint = VERB_HINTS.get(name.lower())
    return f" {hint}" if hint else did_you_mean(name, verbs)


def _did_you_mean(name: str) -> str:
    return f" Did you mean {name!r}?"
