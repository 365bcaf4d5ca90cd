# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Teach a model to prefer refusals to the answers to forget: preference optimisation (DPO,
https://huggingface.co/papers/2305.18290; a baseline in https://huggingface.co/papers/2406.01983), by TRL's own
`DPOTrainer`.

```bash
trl-rkld dpo --config smollm2-135m/tofu/config_dpo
```

Chosen is a refusal, rejected the true answer. The reference is the model as it came, and never a second copy of it:
the base with a new adapter off, or log-probabilities that are computed before the first step. There is no retain term.
"""


def main(script_args, training_args, model_args):
    from trl_rkld.scripts.loading import train_and_save

    sets = {"forget_set": script_args.forget_set(), "retain_set": script_args.retain_set()}
    train_and_save(make_trainer(script_args, training_args, model_args, **sets))


def make_trainer(script_args, training_args, model_args, forget_set, retain_set=None):
    """The trainer, ready to train; `forget_set` holds `question` and `answer`, and a `retain_set` is refused."""
    from datasets import Dataset
    from peft import PeftConfig
    from trl import DPOTrainer

    from trl_rkld.adapters import check_initialisation, is_adapter
    from trl_rkld.data import tokenize_rows
    from trl_rkld.refusals import question_answers, refused
    from trl_rkld.scripts.loading import trainer_model_arguments, trainer_tokenizer
    from trl_rkld.trainer.checks import warn_slow_bfloat16
    from trl_rkld.trainer.saves_record import SavesRecord
    from unlearn_eval.models import without_peft
    from unlearn_eval.prompts import Template
    from unlearn_eval.quantization import keep_quantized_weights

    class RecordingDPOTrainer(SavesRecord, DPOTrainer):
        pass

    if retain_set is not None:
        raise ValueError("DPO takes no retain set: TRL's trainer has no term for it. Remove `retain_dataset_name`.")
    if not model_args.use_peft:  # a new adapter is switched off instead
        if training_args.world_size > 1:  # TRL's processes would look for them in each other's private caches
            raise ValueError(
                "DPO runs on several processes with a new adapter only. Set `use_peft`, or use one process."
            )
        training_args.precompute_ref_log_probs = True
    warn_slow_bfloat16(training_args)
    answered = question_answers(forget_set, "forget")
    refusing = refused(answered, script_args.refusals(), training_args.seed)

    # The trainer tokenises by itself, alike, but would cut silently what is too long
    tokenizer = trainer_tokenizer(model_args, training_args)
    template = Template.of(script_args)
    for records in (answered, refusing):
        tokenize_rows(records, "forget", training_args.max_length, tokenizer, template)
    pairs = [preference(*pair, tokenizer, template) for pair in zip(answered, refusing, strict=True)]

    adapter = is_adapter(model_args.model_name_or_path)
    if adapter:
        # TRL makes the reference from the adapter's config
        check_initialisation(PeftConfig.from_pretrained(model_args.model_name_or_path))
    model_arguments = trainer_model_arguments(model_args, training_args)
    if adapter:
        keep_quantized_weights(without_peft(model_arguments["model"]))
    trainer = RecordingDPOTrainer(
        **model_arguments, args=training_args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    if adapter:
        # Its log-probabilities are known by now. TRL would save the copy, which knows the records, with each checkpoint
        trainer.model.delete_adapter("ref")
    return trainer


def preference(answered, refusing, tokenizer, template):
    """A pair as `DPOTrainer` takes it, which it tokenises to the ids of `unlearn_eval.prompts.Template.tokenize`."""
    plain = template.plain_question(tokenizer, answered["question"])
    if plain is not None:
        return {"prompt": plain, "chosen": refusing["answer"], "rejected": answered["answer"]}
    row = {
        "prompt": template.messages(answered["question"]),
        "chosen": [{"role": "assistant", "content": refusing["answer"]}],
        "rejected": [{"role": "assistant", "content": answered["answer"]}],
    }
    return row | ({"chat_template_kwargs": template.chat_kwargs} if template.chat_kwargs else {})


def make_parser(prog: str | None = None):
    from trl import DPOConfig, ModelConfig, TrlParser

    from trl_rkld.scripts.arguments import RefusalScriptArguments

    return TrlParser((RefusalScriptArguments, DPOConfig, ModelConfig), prog=prog, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
