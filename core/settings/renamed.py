"""Lists renamed and removed settings, and settings of other programs. Errors then say what to write instead."""

RENAMED = {
    "run.shutdown_seconds": "run.shutdown_reserve_seconds",
    "data.shuffle_shards": "data.shards_mixed",
    "data.rows": "data.examples",
    "data.max_bad_share": "data.max_bad_fraction",
    "model.vocab_rows": "model.padded_vocab_size",
    "model.tied": "model.tie_embeddings",
    "model.rope_share": "model.rope_fraction",
    "batch.tokens": "batch.tokens_per_step",
    "batch.micro_batch": "batch.micro_batch_size",
    "optimizer.shard": "optimizer.zero=1",
    "optimizer.deal_sums": "optimizer.zero=2",
    "optimizer.clip": "optimizer.grad_clip",
    "optimizer.muon_rounds": "optimizer.muon_ns_steps",
    "optimizer.cooldown": "optimizer.cooldown_fraction",
    "train.recompute": "train.activation_checkpointing",
    "train.reduce_dtype": "train.grad_reduce_dtype",
    "train.overfit_bound": "train.overfit_max_loss",
    "train.skip_batches": "train.skip_steps",
    "train.view": "train.display",
    "checkpoint.every": "checkpoint.every_steps",
    "checkpoint.keep": "checkpoint.keep_last",
    "checkpoint.keep_every": "checkpoint.keep_every_steps",
    "checkpoint.mean_hours_between_failures": "checkpoint.expected_hours_between_failures",
    "finetune.start": "start.weights with stage=finetune",
    "finetune.epochs": "train.epochs with stage=finetune",
    "dpo.start": "start.weights with stage=dpo",
    "dpo.epochs": "train.epochs with stage=dpo",
    "distil.start": "start.weights with stage=distil",
    "distil.teacher": "teacher.weights with stage=distil",
    "distil.weight": "distil.kl_weight with stage=distil",
    "again": "rerun",
    "rolling": "per_document",
    "items": "limit",
    "few_shot": "num_fewshot",
    "lm_eval_folder": "lm_eval_tasks",
    "shutdown_seconds": "shutdown_reserve_seconds",
    "tokens": "max_tokens",  # former flag of generation; evaluation has another setting with this name
    "rows": "max_batch_size",
}

# Settings that were removed, and why.
REMOVED = {
    "train.compile_cache": "each machine compiles its kernels, because stored ones are pickles, which may run code",
}

# Settings by which a config for another program is recognised, and the command that takes it.
_FETCH, _PREPARE = "python -m data_prep.fetch (make fetch-data)", "python -m data_prep.prepare (make prep-data)"
ELSEWHERE = {"source.train_url": _FETCH, "source.val_url": _FETCH, "source.url": _PREPARE, "source.dataset": _PREPARE}
