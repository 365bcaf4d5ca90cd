# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Unlearn by one of the methods: `trl-rkld rkld`, `npo`, `grad-diff`, ….

# RKLD, full fine-tuning
```bash
trl-rkld rkld \
    --model_name_or_path open-unlearning/tofu_Llama-3.2-1B-Instruct_full \
    --dataset_name locuslab/TOFU --dataset_config forget05 \
    --retain_dataset_name locuslab/TOFU --retain_dataset_config retain95 \
    --system_prompt "You are a helpful assistant." --date_string "10 Apr 2025" \
    --output_dir Llama-3.2-1B-forget05
```

# RKLD, 4-bit QLoRA, own records
```bash
trl-rkld rkld \
    --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dtype bfloat16 --load_in_4bit --use_peft --lora_target_modules all-linear \
    --learning_rate 2e-4 \
    --dataset_name forget.jsonl --retain_dataset_name keep.jsonl \
    --output_dir Qwen2.5-7B-forget
```
"""

import sys


def main(trainer_class, script_args, training_args, model_args):
    from trl_rkld.run_record import refuse_unfinished
    from trl_rkld.scripts.dry_run import dry_run
    from trl_rkld.scripts.loading import train_and_save, trainer_tokenizer

    # Load the data first: what is wrong with it shows before a model is loaded
    data = {
        "train_dataset": script_args.forget_set(),
        "retain_dataset": script_args.retain_set(),
        "eval_dataset": script_args.eval_set(training_args.eval_strategy),
    }
    if script_args.dry_run:
        tokenizer = trainer_tokenizer(model_args, training_args)
        if trainer_class.uses_augmented_model:
            data["augmented_model"] = script_args.augmented_model_name_or_path
        dry_run(trainer_class, training_args, model_args, tokenizer, data)
        return

    trainer = make_trainer(trainer_class, script_args, training_args, model_args, **data)

    # The trainer can't see where an adapter was loaded from
    refuse_unfinished(model_args.model_name_or_path, trainer.forget_set_hash, training_args.output_dir)

    train_and_save(trainer)


def make_trainer(trainer_class, script_args, training_args, model_args, **data):
    """The trainer, ready to train; `data` are its data sets."""
    from trl_rkld.scripts.loading import trainer_model_arguments, trainer_tokenizer

    tokenizer = trainer_tokenizer(model_args, training_args)
    model_arguments = trainer_model_arguments(model_args, training_args)
    if trainer_class.uses_augmented_model:
        model_arguments["augmented_model"] = script_args.augmented_model_name_or_path
    return trainer_class(**model_arguments, args=training_args, processing_class=tokenizer, **data)


def make_parser(method: str, prog: str | None = None):
    from trl import ModelConfig, TrlParser

    from trl_rkld.methods import method_class
    from trl_rkld.scripts.arguments import AugmentedScriptArguments, UnlearningScriptArguments

    augmented = method_class(method, "Trainer").uses_augmented_model
    script_arguments = AugmentedScriptArguments if augmented else UnlearningScriptArguments
    return TrlParser((script_arguments, method_class(method, "Config"), ModelConfig), prog=prog, allow_abbrev=False)


if __name__ == "__main__":
    from trl_rkld.methods import method_class

    method = sys.argv.pop(1)
    main(method_class(method, "Trainer"), *make_parser(method).parse_args_and_config())
