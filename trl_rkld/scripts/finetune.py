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

    sets = {"retain": script_args.retain_set()}
    if script_args.dataset_name is not None:
        sets = {"forget": script_args.forget_set()} | sets
    train_and_save(make_trainer(sets, script_args, training_args, model_args))


def make_trainer(sets, script_args, training_args, model_args):
    """The trainer on sets of records, by name; `None` is no set."""
    from datasets import Dataset, concatenate_datasets
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    from trl_rkld.data import TEMPLATE, tokenize_rows
    from trl_rkld.scripts.loading import model_init_kwargs, trainer_tokenizer
    from trl_rkld.trainer.checks import warn_slow_bfloat16
    from trl_rkld.trainer.saves_record import SavesRecord
    from unlearn_eval.records import check_answers, check_columns, is_tokenized_here

    class FinetuneTrainer(SavesRecord, SFTTrainer):
        pass

    warn_slow_bfloat16(training_args)
    tokenizer = trainer_tokenizer(model_args, training_args)
    template = {name: getattr(script_args, name) for name in TEMPLATE}
    parts = []
    for name, dataset in sets.items():
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
        rows = tokenize_rows(dataset, name, training_args.max_length, tokenizer=tokenizer, **template)
        parts.append(Dataset.from_list(rows))
    if not parts:
        raise ValueError("`dataset_name` or `retain_dataset_name` is required: the records to learn.")

    training_args.model_init_kwargs = model_init_kwargs(
        model_args, training_args.trust_remote_code, training_args.model_init_kwargs
    )
    return FinetuneTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=concatenate_datasets(parts),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def make_parser(prog: str | None = None):
    from dataclasses import dataclass, field

    from trl import ModelConfig, SFTConfig, TrlParser

    from trl_rkld.scripts.arguments import (
        QUESTION_TEMPLATE_HELP,
        UnlearningScriptArguments,
        refuse_what_unlearning_has,
    )

    @dataclass
    class FinetuneScriptArguments(UnlearningScriptArguments):
        # In unlearning these belong to the trainer's configuration, which `SFTConfig` does not know.
        system_prompt: str | None = field(default=None, metadata={"help": "System message put before questions."})
        date_string: str | None = field(default=None, metadata={"help": "Date shown to templates that print one."})
        question_template: str | None = field(default=None, metadata={"help": QUESTION_TEMPLATE_HELP})

        def __post_init__(self):
            super().__post_init__()
            refuse_what_unlearning_has(self)

    return TrlParser((FinetuneScriptArguments, SFTConfig, ModelConfig), prog=prog, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
