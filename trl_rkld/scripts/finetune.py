# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tune a model on the forget and the retain set together: a model that knows the records, to try unlearning out.

```bash
trl-rkld finetune --config smollm2-135m/tofu/config_finetune
```

The records are tokenised, and their tokens counted, as in unlearning and in evaluation. Leave `dataset_name` out for a
model that has never seen the forget set (the "retain-only" model of TOFU).
"""


def main(script_args, training_args, model_args):
    from trl_rkld.scripts.loading import train_and_save

    forget_set = None if script_args.dataset_name is None else script_args.forget_set()
    sets = {"forget_set": forget_set, "retain_set": script_args.retain_set()}
    train_and_save(make_trainer(script_args, training_args, model_args, **sets))


def make_trainer(script_args, training_args, model_args, forget_set=None, retain_set=None):
    """The trainer, ready to train on one set or both."""
    from datasets import Dataset, concatenate_datasets
    from trl import SFTTrainer

    from trl_rkld.data import tokenize_rows
    from trl_rkld.scripts.loading import (
        check_template_is_the_models,
        trainer_model_arguments,
        trainer_tokenizer,
    )
    from trl_rkld.trainer.checks import warn_slow_bfloat16
    from trl_rkld.trainer.saves_record import SavesRecord
    from unlearn_eval.prompts import Template
    from unlearn_eval.records import check_answers, check_columns, is_tokenized_here

    class FinetuneTrainer(SavesRecord, SFTTrainer):
        pass

    check_template_is_the_models(training_args)
    warn_slow_bfloat16(training_args)
    tokenizer = trainer_tokenizer(model_args, training_args)
    template = Template.of(script_args)
    parts = []
    for name, dataset in {"forget": forget_set, "retain": retain_set}.items():
        if dataset is None:
            continue
        first_row = next(iter(dataset))
        check_columns(first_row, "text", name)
        if not is_tokenized_here(first_row):
            raise ValueError(
                f"The {name} dataset holds texts or tokens, which TRL's own `trl sft` trains on. Give questions and answers, "
                "`messages`, or prompts and completions."
            )
        check_answers(dataset, name)
        rows = tokenize_rows(dataset, name, training_args.max_length, tokenizer, template)
        parts.append(Dataset.from_list(rows))
    if not parts:
        raise ValueError("`dataset_name` or `retain_dataset_name` is required: the records to learn.")

    return FinetuneTrainer(
        **trainer_model_arguments(model_args, training_args),
        args=training_args,
        train_dataset=concatenate_datasets(parts),
        processing_class=tokenizer,
    )


def make_parser(prog: str | None = None):
    from trl import ModelConfig, SFTConfig, TrlParser

    from trl_rkld.scripts.arguments import TemplateScriptArguments

    return TrlParser((TemplateScriptArguments, SFTConfig, ModelConfig), prog=prog, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
