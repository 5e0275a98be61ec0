"""What other trainers call our settings: one table for messages about unknown keys, `ftjax.import_config` and the docs.

Names are those of TRL 1.10 (its configs, transformers' TrainingArguments, peft's LoraConfig) and of Axolotl 0.18.
"""

from typing import NamedTuple


class Ours(NamedTuple):
    """What stands here for a setting of another trainer.

    Attributes:
      key: of our config; "" where there is none.
      note: how the two differ, or why there is none; a phrase that can follow a semicolon.
    """

    key: str
    note: str = ""


_BATCH = "it counts the rows of a step over all devices and micro-batches, theirs those of one device at a time"
_LENGTH = "tokens of a document, where it is cut"
_REMAT = "full where theirs is on, none where it is off"
_TRACKERS = "wandb, mlflow or trackio; metrics.jsonl and TensorBoard files are always written to the workdir"
_SHARDING = "parameters are always sharded over the devices; the mesh.* keys say how"
_KERNELS = "model.attention chooses the kernel, and auto takes the fastest that fits"
_RESUME = "the same command resumes; checkpoint.resume_step goes back to a step"
_BEST = "the best checkpoint is kept beside the newest, and ftjax.generate and ftjax.export take it"
_EPOCH_EVAL = "eval_every counts steps and eval_epochs epochs; with neither it is evaluated at the end"
_HUB = "nothing is uploaded; ftjax.export writes a directory to upload"
_TF32 = "the precision of matrix products follows from model.dtype"
_CACHE = "tokens are cached by content, in $FTJAX_CACHE"
_WORKERS = "rows are tokenized by as many processes as there are cores"
_LOSS = "the loss is computed in blocks without the logits of all tokens, always"
_PADDING = "padding is left out of attention and loss whatever its token, so none is needed"
_COMPILE = "every step is compiled, always"
_CODE = "code from a model's repository is never run; ftjax has its own implementations"
_LAYERS = "numbers and ranges, such as 0-7,20"

# What the two call alike, after transformers
_BOTH: dict[str, Ours] = {
    "tf32": Ours("", _TF32),
    "activation_offloading": Ours("model.remat", "offload"),
    "trust_remote_code": Ours("", _CODE),
    "torch_compile": Ours("", _COMPILE),
    "load_in_8bit": Ours("quantize.base", "int8"),
    "load_in_4bit": Ours("quantize.base", "nf4"),
    "lora_r": Ours("adapter.rank"),
    "lora_alpha": Ours("adapter.alpha"),
    "lora_dropout": Ours("adapter.dropout"),
    "lora_modules_to_save": Ours("adapter.modules_to_save"),
    "dataset_num_proc": Ours("", _WORKERS),
    "gradient_accumulation_steps": Ours("accumulate", "micro-batches that data.batch_size is split into"),
    "max_steps": Ours("steps"),
    "learning_rate": Ours("optimizer.learning_rate"),
    "weight_decay": Ours("optimizer.weight_decay"),
    "adam_beta1": Ours("optimizer.b1"),
    "adam_beta2": Ours("optimizer.b2"),
    "adam_epsilon": Ours("optimizer.eps"),
    "max_grad_norm": Ours("optimizer.clip_norm"),
    "warmup_ratio": Ours("schedule.warmup_ratio"),
    "warmup_steps": Ours("schedule.warmup_steps"),
    "seed": Ours("seed"),
    "output_dir": Ours("", "the flag --workdir says where a run is kept"),
    "logging_steps": Ours("log_every"),
    "save_steps": Ours("checkpoint_every"),
    "save_total_limit": Ours("checkpoint.keep", "the newest so many, and the best"),
    "eval_steps": Ours("eval_every"),
    "load_best_model_at_end": Ours("", _BEST),
    "metric_for_best_model": Ours("evaluate.best", "eval_loss, eval_NAME/score, or a sum of metrics with factors"),
    "greater_is_better": Ours("evaluate.best", "min: or max: before it; of losses and scores it is known"),
    "early_stopping_patience": Ours("evaluate.patience"),
    "resume_from_checkpoint": Ours("", _RESUME),
    "deepspeed": Ours("", _SHARDING),
}

TRL: dict[str, Ours] = _BOTH | {
    "model_name_or_path": Ours("model.source", "also a .gguf file or package:NAME"),
    "model_revision": Ours("model.revision"),
    "dtype": Ours("model.dtype", "of activations; model.param_dtype is that of the stored base"),
    "torch_dtype": Ours("model.dtype", "of activations; model.param_dtype is that of the stored base"),
    "bf16": Ours("model.dtype", "bfloat16, which is the default but on CPUs"),
    "fp16": Ours("model.dtype", "bfloat16 is the default and needs no loss scaling, which is not there"),
    "attn_implementation": Ours("model.attention", "auto takes the fastest that fits"),
    "gradient_checkpointing": Ours("model.remat", _REMAT),
    "use_liger_kernel": Ours("", _LOSS),
    "use_peft": Ours("adapter.kind", "lora or dora; none trains the model itself"),
    "r": Ours("adapter.rank"),
    "target_modules": Ours("adapter.targets", "names with commas between, a regular expression, or all-linear"),
    "lora_target_modules": Ours("adapter.targets", "names with commas between, a regular expression, or all-linear"),
    "modules_to_save": Ours("adapter.modules_to_save"),
    "rank_pattern": Ours("adapter.rank_pattern", "pairs of a regular expression and a rank"),
    "alpha_pattern": Ours("adapter.alpha_pattern", "pairs of a regular expression and an alpha"),
    "layers_to_transform": Ours("adapter.layers", _LAYERS),
    "use_rslora": Ours("adapter.rslora"),
    "use_dora": Ours("adapter.kind", "dora"),
    "init_lora_weights": Ours("adapter.init", "default or pissa"),
    "dataset_name": Ours("data.train", "hf:NAME, files, task:NAME or tfds:NAME"),
    "dataset_text_field": Ours("data.train", "the format of a row is recognized by its fields: text, messages, ..."),
    "eval_dataset": Ours("data.eval"),
    "max_length": Ours("data.max_length", _LENGTH),
    "max_seq_length": Ours("data.max_length", _LENGTH),
    "packing": Ours("data.packing", "on by default; no example sees another"),
    "assistant_only_loss": Ours("data.train_on", "assistant, which is the default"),
    "completion_only_loss": Ours("data.train_on", "of a prompt and its completion only the completion is trained"),
    "chat_template_path": Ours("data.chat_template", "a Jinja file, or the name of a known template"),
    "pad_token": Ours("", _PADDING),
    "per_device_train_batch_size": Ours("data.batch_size", _BATCH),
    "per_device_eval_batch_size": Ours("data.batch_size", "rows are evaluated in micro-batches of the training's size"),
    "auto_find_batch_size": Ours("data.batch_size", "python -m ftjax.plan says what fits"),
    "num_train_epochs": Ours("epochs"),
    "optim": Ours("optimizer.name"),
    "lr_scheduler_type": Ours("schedule.name"),
    "label_smoothing_factor": Ours("objective.label_smoothing"),
    "loss_type": Ours("objective.loss", "kto, cpo, simpo and orpo are methods: objective.name"),
    "loss_weights": Ours("objective.loss", "pairs of a name and a weight"),
    "f_divergence_type": Ours("objective.divergence"),
    "f_alpha_divergence_coef": Ours("objective.divergence_alpha"),
    "discopop_tau": Ours("objective.discopop_tau"),
    "ld_alpha": Ours("objective.ld_alpha", "1 where theirs is None"),
    "use_weighting": Ours("objective.weighting", "wpo where theirs is on, none where it is off"),
    "center_rewards_coefficient": Ours("objective.center_coef", "0 where theirs is None"),
    "step_separator": Ours("objective.step_separator"),
    "simpo_gamma": Ours("objective.gamma"),
    "desirable_weight": Ours("objective.desirable_weight"),
    "undesirable_weight": Ours("objective.undesirable_weight"),
    "precompute_ref_log_probs": Ours("objective.cache_reference", "kept for later runs, too"),
    "ref_model_sync_steps": Ours("objective.reference_every", "0 where theirs has sync_ref_model off"),
    "ref_model_mixup_alpha": Ours("objective.reference_share"),
    "beta": Ours("objective.beta", "of grpo and rloo objective.kl_coef, of gkd objective.distill_beta"),
    "num_generations": Ours("rollouts.samples"),
    "max_completion_length": Ours("rollouts.max_new_tokens"),
    "temperature": Ours("rollouts.temperature"),
    "top_k": Ours("rollouts.top_k"),
    "top_p": Ours("rollouts.top_p"),
    "min_p": Ours("rollouts.min_p", "0 where theirs is None"),
    "num_iterations": Ours("rollouts.iterations"),
    "environment_factory": Ours("rollouts.environment", "MODULE:NAME; its `step` answers a turn"),
    "max_tool_calling_iterations": Ours("", "rollouts.turns counts turns, which are one more than rounds of calls"),
    "vllm_importance_sampling_mode": Ours(
        "objective.correction", "none where vllm_importance_sampling_correction is off"
    ),
    "vllm_importance_sampling_clip_max": Ours("objective.correction_max"),
    "vllm_importance_sampling_clip_min": Ours("objective.correction_min", "0 where theirs is None"),
    "judge": Ours("objective.judge", "a model, or an endpoint's URL with objective.judge_model"),
    "reward_funcs": Ours("objective.rewards", "scores by name, reward:PATH, MODULE:FUNCTION"),
    "reward_weights": Ours("objective.rewards", "pairs of a name and a weight"),
    "scale_rewards": Ours("objective.scale_rewards"),
    "epsilon": Ours("objective.epsilon"),
    "epsilon_high": Ours("objective.epsilon_high", "0 where theirs is None"),
    "importance_sampling_level": Ours("objective.importance"),
    "mask_truncated_completions": Ours("objective.mask_truncated"),
    "kl_coef": Ours("objective.kl_coef", "of ppo"),
    "kl_estimator": Ours("objective.kl_estimator"),
    "cliprange": Ours("objective.epsilon", "of ppo"),
    "cliprange_value": Ours("objective.value_clip"),
    "vf_coef": Ours("objective.vf_coef"),
    "gamma": Ours("objective.discount", "of ppo"),
    "lam": Ours("objective.gae_lambda"),
    "missing_eos_penalty": Ours("objective.missing_eos_penalty", "0 where theirs is None"),
    "num_ppo_epochs": Ours("rollouts.iterations", "steps on the same completions"),
    "response_length": Ours("rollouts.max_new_tokens"),
    "sapo_temperature_pos": Ours("objective.sapo_temperature_pos"),
    "sapo_temperature_neg": Ours("objective.sapo_temperature_neg"),
    "teacher_model_name_or_path": Ours("objective.teacher"),
    "lmbda": Ours("objective.student_share"),
    "ref_model": Ours("", "the reference of dpo is the model as training starts"),
    "data_seed": Ours("data.seed"),
    "save_strategy": Ours("checkpoint_every", "in steps"),
    "eval_strategy": Ours("eval_every", _EPOCH_EVAL),
    "early_stopping": Ours("evaluate.patience", "evaluations without improvement that end a run"),
    "early_stopping_threshold": Ours("evaluate.min_delta", "from the last improvement that was one, not from the best"),
    "report_to": Ours("trackers", _TRACKERS),
    "run_name": Ours("", "the flag --workdir names a run"),
    "push_to_hub": Ours("", _HUB),
    "fsdp": Ours("mesh.fsdp", _SHARDING),
}

AXOLOTL: dict[str, Ours] = _BOTH | {
    "base_model": Ours("model.source", "also a .gguf file or package:NAME"),
    "revision_of_model": Ours("model.revision"),
    "base_model_config": Ours("", "the model's own config.json is read"),
    "model_type": Ours("", "the architecture is read from the model's config.json"),
    "tokenizer_type": Ours("", "the model's own tokenizer is read"),
    "tokenizer_config": Ours("", "the model's own tokenizer is read"),
    "bf16": Ours("model.dtype", "bfloat16, which is the default but on CPUs; float32 where bf16 and fp16 are off"),
    "fp16": Ours("", "bfloat16 is used instead, which needs no loss scaling"),
    "attn_implementation": Ours("", _KERNELS),
    "flash_attention": Ours("", _KERNELS),
    "sdp_attention": Ours("", _KERNELS),
    "xformers_attention": Ours("", _KERNELS),
    "gradient_checkpointing": Ours(
        "model.remat", "full where it is on, none where it is off, offload where it says so"
    ),
    "gradient_checkpointing_kwargs": Ours("", "model.remat needs none"),
    "adapter": Ours("adapter.kind", "lora; with qlora also quantize.base = nf4; none where it is left out"),
    "lora_model_dir": Ours("adapter.source", "a PEFT adapter to go on from"),
    "lora_target_linear": Ours("adapter.targets", "all-linear"),
    "lora_target_modules": Ours("adapter.targets", "names with commas between, or a regular expression"),
    "lora_target_parameters": Ours("", "adapter.targets finds the kernels of experts by their names as well"),
    "lora_rank_pattern": Ours("adapter.rank_pattern", "pairs of a regular expression and a rank"),
    "lora_alpha_pattern": Ours("adapter.alpha_pattern", "pairs of a regular expression and an alpha"),
    "unfrozen_parameters": Ours("adapter.trainable", "with adapter.kind = none; it is found in paths of ours"),
    "lora_mlp_kernel": Ours("", "compiled kernels need no setting"),
    "lora_fan_in_fan_out": Ours("", "kernels are oriented as the model's files say"),
    "peft_layers_to_transform": Ours("adapter.layers", _LAYERS),
    "peft_use_rslora": Ours("adapter.rslora"),
    "peft_use_dora": Ours("adapter.kind", "dora"),
    "peft_init_lora_weights": Ours("adapter.init", "default or pissa"),
    "loraplus_lr_ratio": Ours("optimizer.loraplus_ratio"),
    "datasets": Ours("data.train", "paths stay paths, names on the Hub become hf:NAME; `type` becomes `format`"),
    "test_datasets": Ours("data.eval"),
    "val_set_size": Ours("data.holdout", "a share; rows of one prompt stay on one side"),
    "dataset_prepared_path": Ours("", _CACHE),
    "dataset_processes": Ours("", _WORKERS),
    "shuffle_merged_datasets": Ours("", "every epoch is shuffled"),
    "sequence_len": Ours("data.max_length", _LENGTH),
    "sample_packing": Ours("data.packing", "no example sees another"),
    "eval_sample_packing": Ours("data.packing", "one setting for both"),
    "pad_to_sequence_len": Ours("", "packed rows are always padded to one length"),
    "group_by_length": Ours("", "data.packing fills rows; without it batches are padded to one of a few lengths"),
    "train_on_inputs": Ours("data.train_on", "all where it is on, assistant where it is off"),
    "chat_template": Ours("data.chat_template", "a known template, or the model's own"),
    "chat_template_jinja": Ours("data.chat_template", "a file"),
    "default_system_message": Ours("data.system"),
    "tokens": Ours("model.add_tokens"),
    "eot_tokens": Ours("", "where a turn ends is seen from the chat template"),
    "special_tokens": Ours("", "the tokenizer's own are used; padding is left out of attention and loss"),
    "micro_batch_size": Ours("data.batch_size", _BATCH),
    "batch_size": Ours("data.batch_size"),
    "eval_batch_size": Ours("data.batch_size", "rows are evaluated in micro-batches of the training's size"),
    "num_epochs": Ours("epochs"),
    "optimizer": Ours("optimizer.name", "every kind of AdamW is adamw"),
    "lr_scheduler": Ours("schedule.name", "cosine, linear or constant"),
    "cosine_min_lr_ratio": Ours("schedule.final_ratio"),
    "rl": Ours("objective.name", "dpo or kto"),
    "rl_beta": Ours("objective.beta"),
    "dpo_beta": Ours("objective.beta"),
    "kto_desirable_weight": Ours("objective.desirable_weight"),
    "kto_undesirable_weight": Ours("objective.undesirable_weight"),
    "saves_per_epoch": Ours("", "checkpoint_every counts steps"),
    "save_strategy": Ours("", "checkpoint_every counts steps"),
    "evals_per_epoch": Ours("eval_epochs", "epochs from one to the next: 1 divided by it"),
    "eval_strategy": Ours("", _EPOCH_EVAL),
    "auto_resume_from_checkpoints": Ours("", _RESUME),
    "tensor_parallel_size": Ours("mesh.tensor"),
    "context_parallel_size": Ours("mesh.context"),
    "expert_parallel_size": Ours("mesh.expert"),
    "dp_shard_size": Ours("mesh.fsdp"),
    "dp_replicate_size": Ours("mesh.data"),
    "fsdp": Ours("", _SHARDING),
    "fsdp_config": Ours("", _SHARDING),
    "fsdp_version": Ours("", _SHARDING),
    "wandb_project": Ours("trackers", _TRACKERS),
    "use_tensorboard": Ours("trackers", _TRACKERS),
    "hub_model_id": Ours("", _HUB),
    "plugins": Ours("", _LOSS),
    "cut_cross_entropy": Ours("", _LOSS),
    "chunked_cross_entropy": Ours("", _LOSS),
    "strict": Ours("", "unknown keys are always refused"),
}

# What people type, of no one trainer.
SHORT: dict[str, Ours] = {
    "lr": Ours("optimizer.learning_rate"),
    "wd": Ours("optimizer.weight_decay"),
    "bs": Ours("data.batch_size"),
    "model": Ours("model.source"),
    "model_name": Ours("model.source"),
    "train_file": Ours("data.train"),
    "dataset": Ours("data.train"),
    "lora_rank": Ours("adapter.rank"),
    "grad_clip": Ours("optimizer.clip_norm"),
    "gradient_clipping": Ours("optimizer.clip_norm"),
    "grad_accum": Ours("accumulate", "micro-batches that data.batch_size is split into"),
    "accumulation_steps": Ours("accumulate", "micro-batches that data.batch_size is split into"),
    "scheduler": Ours("schedule.name"),
    "warmup": Ours("schedule.warmup_ratio", "a share of all steps"),
    "precision": Ours("model.dtype"),
    "qlora": Ours("quantize.base", "nf4"),
}


def find(name: str) -> Ours | None:
    """What stands here for a name of another trainer; None for one that none of them has."""
    return next((names[name] for names in (TRL, AXOLOTL, SHORT) if name in names), None)
