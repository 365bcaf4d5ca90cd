# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tune a model to refuse the questions to forget: the "IDK" baseline (TOFU,
https://huggingface.co/papers/2401.06121, where it is called preference optimization), by TRL's own `SFTTrainer`.

```bash
trl-rkld idk --config smollm2-135m/tofu/config_idk
```

The loss is the mean NLL over the tokens of the refusals and, where a retain set is given, of as many retained answers,
mixed with them. Both are drawn once, with the seed, and stay the same in every epoch: the refusal of a question
depends on the seed and the question's row only, and no retained record is drawn twice before each was drawn once.
"""


def main(script_args, training_args, model_args):
    from trl_rkld.scripts.loading import train_and_save

    sets = {"forget_set": script_args.forget_set(), "retain_set": script_args.retain_set()}
    train_and_save(make_trainer(script_args, training_args, model_args, **sets))


def make_trainer(script_args, training_args, model_args, forget_set, retain_set=None):
    """The trainer, ready to train; the data sets hold `question` and `answer`."""
    from datasets import Dataset, concatenate_datasets
    from trl import SFTTrainer

    from trl_rkld.data import RetainSampler, tokenize_rows
    from trl_rkld.refusals import question_answers, refused
    from trl_rkld.scripts.loading import (
        check_template_is_the_models,
        trainer_model_arguments,
        trainer_tokenizer,
    )
    from trl_rkld.trainer.checks import warn_slow_bfloat16
    from trl_rkld.trainer.saves_record import SavesRecord
    from unlearn_eval.prompts import Template

    class IDKTrainer(SavesRecord, SFTTrainer):
        _name = "IDK"

    check_template_is_the_models(training_args)
    warn_slow_bfloat16(training_args)
    refusing = refused(question_answers(forget_set, "forget"), script_args.refusals(), training_args.seed)
    tokenizer = trainer_tokenizer(model_args, training_args)
    template = Template.of(script_args)
    rows = tokenize_rows(refusing, "forget", training_args.max_length, tokenizer, template)
    parts = [Dataset.from_list(rows)]
    if retain_set is not None:
        retained = question_answers(retain_set, "retain")
        rows = tokenize_rows(retained, "retain", training_args.max_length, tokenizer, template)
        draw = RetainSampler(training_args.seed, len(refusing), len(rows))
        parts.append(Dataset.from_list([rows[draw(0, index)] for index in range(len(refusing))]))

    return IDKTrainer(
        **trainer_model_arguments(model_args, training_args),
        args=training_args,
        train_dataset=concatenate_datasets(parts),
        processing_class=tokenizer,
    )


def make_parser(prog: str | None = None):
    from trl import ModelConfig, SFTConfig, TrlParser

    from trl_rkld.scripts.arguments import RefusalScriptArguments

    return TrlParser((RefusalScriptArguments, SFTConfig, ModelConfig), prog=prog, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
