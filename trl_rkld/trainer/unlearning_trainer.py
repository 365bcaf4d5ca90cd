# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import copy
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.training_args import TrainingArguments
from trl import SFTTrainer
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

from unlearn_eval.fingerprint import hash_samples, hash_tensors
from unlearn_eval.models import without_peft
from unlearn_eval.prompts import Template
from unlearn_eval.records import check_answers, check_columns, is_tokenized_here

from ..adapters import is_adapter, student_adapter
from ..data import (
    DataCollatorForUnlearning,
    RetainSampler,
    check_overlap,
    check_row,
    check_rows,
    in_memory,
    tokenize_numbered_row,
)
from ..losses import HeadInput, TokenLosses, chunked_divergence, chunked_nll, lm_head_of
from ..run_record import (
    base_record,
    check_same_run,
    complete_checkpoint,
    mark_finished,
    refuse_unfinished,
    stopped_at,
    write_record,
)
from ..teacher.given import check_augmented_model
from ..teacher.prepare import needed_bytes, prepare_teacher, teacher_fingerprint
from ..teacher.private_folder import PrivateFolder
from ..teacher.roles import (
    Role,
    answer_probabilities,
    check_logits,
    check_no_dropout,
    counted_hidden_states,
    counted_labels,
    is_counted,
    probabilities_of_answers,
)
from ..version import __version__
from .checks import check_arguments, check_is_text, check_model, warn_of_dates, warn_slow_bfloat16
from .model_card import extend_model_card
from .saves_record import ResumesAdapter
from .unlearning_config import UnlearningConfig


logger = get_logger(__name__)

_COLUMNS = ["input_ids", "labels", "sample_id"]

# The verdict at the end of a run is a mean over at most this many samples of each set.
_VERDICT_SAMPLES = 400


class UnlearningTrainer(ResumesAdapter, SFTTrainer):
    """
    What every unlearning method shares: forget and retain batches, the original model, the retain loss, saving.

    This class is a wrapper around the [`~trl.SFTTrainer`] class and inherits all of its attributes and methods. A
    method is a subclass with a `forget_losses` of its own.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model that is to forget. Can be:

            - A Hub id or the path of a folder, loaded with `args.model_init_kwargs`.
            - A [`~transformers.PreTrainedModel`], trained whole or, with `peft_config`, through a new adapter.
            - A [`~peft.PeftModel`] whose adapter holds what is to be forgotten; that adapter is trained.
        args ([`UnlearningConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            What to forget, in any format of [`~trl.SFTTrainer`] or with `question` and `answer` columns. Streaming
            data need `precompute_teacher=False`.
        retain_dataset ([`~datasets.Dataset`], *optional*):
            What to keep: with each forgotten sample goes one of these.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Data on which `evaluate` computes the forget loss.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, loaded from where the model is.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantisation with which a model given by name is loaded; 4-bit only.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to add to the model.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks to customise the training loop.
        optimizers (`tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]`, *optional*):
            Optimizer and scheduler.
    """

    _tag_names = ["trl", "unlearning"]
    _name = "Unlearning"
    loss_is_scaled_for_ga = True  # the counts of a whole accumulation window divide the loss

    config_class = UnlearningConfig
    # What the forget loss needs of frozen models. The retain loss sees to itself.
    uses_original_logits = False
    uses_original_log_probs = False
    uses_augmented_model = False
    augmented_model: str | PreTrainedModel | PeftModel | None = None

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: UnlearningConfig | TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        retain_dataset: Dataset | None = None,
        eval_dataset: Dataset | DatasetDict | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{model_name.split('/')[-1]}-{self._name}")
        elif isinstance(args, UnlearningConfig) and not issubclass(self.config_class, type(args)):
            raise ValueError(
                f"`args` is a `{type(args).__name__}`, the configuration of another method. Use `{self.config_class.__name__}`."
            )
        elif not isinstance(args, self.config_class):
            # `to_dict` shows tokens, the secret ones and those of the text, by their names only.
            tokens = {name: getattr(args, name) for name in args.to_dict() if name.endswith("_token")}
            args = self.config_class(**(args.to_dict() | tokens))
        check_arguments(args, train_dataset, retain_dataset, eval_dataset, quantization_config, peft_config)
        if isinstance(model, str) and is_adapter(model):
            raise ValueError(
                f"`{model}` is an adapter. Load it with its base: `PeftModel.from_pretrained(base, {model!r}, "
                "is_trainable=True)`. The command `trl-rkld` does it for you."
            )

        if peft_config is not None and isinstance(model, str):  # saved with the adapter: which base it is for
            peft_config = copy.copy(peft_config)  # the user's may serve other models, too
            peft_config.revision = (args.model_init_kwargs or {}).get("revision")
        self._num_samples, self._is_constructed = 0, False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        check_is_text(self.processing_class)  # rows with images were not prepared
        self.data_collator = DataCollatorForUnlearning(
            pad_token_id=self.data_collator.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of
        )
        self.has_new_adapter = peft_config is not None
        self.student_adapter = student_adapter(self.model) if isinstance(self.model, PeftModel) else None
        check_model(self.model, self.accelerator.distributed_type)
        warn_slow_bfloat16(args)
        if args.disable_dropout:
            self.disable_dropout()

        self.retain_dataset = self._retain_sampler = None
        if retain_dataset is not None:
            self.retain_dataset = self._prepare_dataset(
                retain_dataset, self.processing_class, args, False, None, "retain"
            )
            self._retain_sampler = RetainSampler(args.seed, len(self.train_dataset), len(self.retain_dataset))
            check_overlap(self.train_dataset, self.retain_dataset)
        self.forget_set_hash = hash_samples(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None
        self.retain_set_hash = hash_samples(self.retain_dataset) if retain_dataset is not None else None
        path = model if isinstance(model, str) else model.name_or_path
        refuse_unfinished(path, self.forget_set_hash, args.output_dir, self._adapter_hash())
        if self.augmented_model is not None:
            check_augmented_model(self.augmented_model, self.model)

        self.teacher = self._before = None
        # Sums and counts of what is logged: a mean over tokens is the same however they are split into batches.
        self._sums = {mode: defaultdict(lambda: (0.0, 0)) for mode in ("train", "eval")}
        self._finished = False
        self._teacher_fingerprint = self._teacher_digest = None
        self._private_folder = PrivateFolder(args.teacher_cache_dir, args.output_dir)
        self._forward_redirection = _ForwardRedirection()
        if args.stop_at_forget_prob is not None:
            self.add_callback(_StopWhenForgotten(self))
        self._is_constructed = True

    # ---- Method ----

    def forget_losses(self, model: PreTrainedModel | PeftModel, inputs: dict[str, torch.Tensor]) -> TokenLosses:
        """
        Loss on the forget set, summed over a batch: over its counted tokens, or what else
        [`UnlearningTrainer.count_forget_items`] counts. To be defined by each method.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Student, not wrapped for distributed training.
            inputs (`dict`):
                Batch with `input_ids`, `attention_mask`, `labels` and `sample_id`.

        Returns:
            [`~trl_rkld.losses.TokenLosses`]:
                Sum, and what is logged.
        """
        raise NotImplementedError

    def retain_losses(self, model: PreTrainedModel | PeftModel, inputs: dict[str, torch.Tensor]) -> TokenLosses:
        """
        Loss on the retain set, summed over the counted tokens of a batch: negative log-likelihood, or the forward KL
        from the original model. Arguments and result as in [`UnlearningTrainer.forget_losses`].
        """
        labels = counted_labels(inputs)
        if self.args.retain_loss_type == "nll":
            return chunked_nll(self.student(model, inputs), labels)
        return chunked_divergence(self.student(model, inputs), self.teacher.original(inputs), labels, beta=0.0)

    def count_forget_items(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        How many items the forget loss of a batch is a sum over: its counted tokens. A method whose loss is one of
        whole answers counts these.

        Args:
            inputs (`dict`):
                Batch with `labels` of shape `(batch_size, length)`.

        Returns:
            `torch.Tensor`:
                A whole number.
        """
        return is_counted(inputs["labels"]).sum()

    def student(self, model: PreTrainedModel | PeftModel, inputs: dict[str, torch.Tensor]) -> HeadInput:
        """
        The student's hidden states of the counted tokens, with gradients, and its head.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Student, not wrapped for distributed training.
            inputs (`dict`):
                Batch with `input_ids`, `attention_mask` and `labels`.

        Returns:
            [`~trl_rkld.losses.HeadInput`]:
                Hidden states of shape `(num_tokens, hidden_size)`, and the head.
        """
        with self.accelerator.autocast():
            hidden_states = counted_hidden_states(model, inputs)
        return HeadInput(hidden_states, lm_head_of(without_peft(model)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        if self.needs_teacher and self.teacher is None:
            raise ValueError(
                "There is no teacher: it is made when `train()` starts, and a live one (`precompute_teacher=False`) ends "
                "with it. Evaluate after `train()` with a cached teacher, or during it (`eval_strategy`)."
            )
        num_items = self._count_items([inputs]) if num_items_in_batch is None else num_items_in_batch
        retain_inputs = {key[len("retain_") :]: inputs.pop(key) for key in list(inputs) if key.startswith("retain_")}

        # Through the wrapper's forward, so that DDP sees the parameters that the loss uses.
        unwrapped = self.accelerator.unwrap_model(model)
        forget = self._forward_redirection(model, unwrapped, partial(self.forget_losses, unwrapped), inputs)
        loss = forget.loss.to(num_items.device) / num_items[0].clamp(min=1)
        self._record(mode, "forget", forget, inputs)
        if retain_inputs:
            retain = self._forward_redirection(model, unwrapped, partial(self.retain_losses, unwrapped), retain_inputs)
            loss = loss + self.args.retain_coef * retain.loss.to(num_items.device) / num_items[1].clamp(min=1)
            self._record(mode, "retain", retain, retain_inputs)
        if not torch.isfinite(loss):
            culprit = "student" if torch.isfinite(forget.teacher_entropy).all() else "teacher"
            raise FloatingPointError(
                f"The loss is not finite at step {self.state.global_step + 1}: the {culprit}'s logits are not. Nothing "
                "was saved since the last checkpoint. Lower `learning_rate` or `max_grad_norm`, or train in bfloat16 or "
                "float32 instead of float16."
            )
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages what is already a sum over the processes
        loss = loss.to(self.accelerator.device)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # The loss never builds the logits.
        return super().prediction_step(model, inputs, True, ignore_keys)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # Before the optimizer's step: the weights, and what is saved of them, stay good. float16's scaler skips such steps.
        if self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(grad_norm)):
            raise FloatingPointError(
                f"The gradient is not finite at step {self.state.global_step + 1}; the step was not taken. Lower "
                "`learning_rate`, or train in bfloat16 or float32."
            )
        return grad_norm

    def _record(self, mode: str, name: str, losses: TokenLosses, inputs: dict[str, torch.Tensor]) -> None:
        probabilities = answer_probabilities(losses.label_log_probs, inputs["labels"])
        num_items = self.count_forget_items(inputs) if name == "forget" else is_counted(inputs["labels"]).sum()
        means = {
            f"{name}_loss": (losses.loss.detach(), num_items),
            f"{name}_prob": (probabilities.sum(), len(probabilities)),
        }
        if name == "forget" and self.uses_augmented_model:
            num_tokens = len(losses.label_log_probs)
            means["teacher_entropy"] = losses.teacher_entropy.sum(), num_tokens
            means["teacher_gap"] = losses.teacher_gap.sum(), num_tokens
        pairs = torch.stack([torch.stack([total, total.new_tensor(float(n))]) for total, n in means.values()])
        for key, pair in zip(means, self.accelerator.reduce(pairs, "sum").tolist(), strict=True):
            self._sums[mode][key] = [x + y for x, y in zip(self._sums[mode][key], pair, strict=True)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else "eval_"
        logs.update({f"{prefix}{key}": total / count for key, (total, count) in self._sums[mode].items()})
        self._sums[mode].clear()
        super().log(logs, start_time)

    # ---- Data ----

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        check_is_text(processing_class)
        first_row = next(iter(dataset))
        # `evaluate` prepares what it is given, ours again, too.
        if self._is_constructed and list(first_row) == _COLUMNS:
            return dataset
        check_columns(first_row, args.dataset_text_field, dataset_name)
        if isinstance(dataset, Dataset):
            dataset = in_memory(dataset)
            check_answers(dataset, dataset_name, args.dataset_text_field)
        if is_tokenized_here(first_row):
            if dataset_name == "train":
                warn_of_dates(args, self._tokenizer, first_row)
            tokenize = partial(
                tokenize_numbered_row, name=dataset_name, tokenizer=self._tokenizer, template=Template.of(args)
            )
            dataset = dataset.map(tokenize, with_indices=True, remove_columns=list(first_row))
        # TRL prepares what is left: strings, masks, labels. Never truncated: `check_rows` raises instead.
        args_of_trl = copy.copy(args)
        args_of_trl.max_length, args_of_trl.dataset_num_proc = None, None
        args_of_trl.shuffle_dataset = False  # until the rows have been checked, by their numbers
        self.completion_only_loss = True  # of tokenised rows, too: TRL asks the first of the forget set only
        dataset = super()._prepare_dataset(dataset, processing_class, args_of_trl, False, None, dataset_name)
        dataset = dataset.select_columns(_COLUMNS[:2])
        if isinstance(dataset, Dataset):
            dataset = dataset.cast(Features({name: List(Value("int64")) for name in _COLUMNS[:2]}))
            check_rows(dataset, args.max_length, dataset_name)
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            ids = range(self._num_samples, self._num_samples + len(dataset))
            dataset = dataset.add_column("sample_id", list(ids))
            self._num_samples += len(dataset)
        else:
            check = partial(check_row, max_length=args.max_length, name=dataset_name)
            dataset = dataset.map(check, with_indices=True)
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "sample_id" not in self._signature_columns:
            self._signature_columns.append("sample_id")

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # The Trainer takes a step before it asks whether there is one to take: where a resumed run had been stopped, say.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            return [], None
        # Retained samples are drawn here, in the main process, where the epoch is known.
        batch_samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.retain_dataset is not None:
            for batch in batch_samples:
                epoch = int(self.state.epoch)
                rows = [self._retain_sampler(epoch, index) for index in batch["sample_id"].tolist()]
                retained = self.data_collator([self.retain_dataset[row] for row in rows])
                batch.update({f"retain_{key}": tensor.to(device) for key, tensor in retained.items()})
        return batch_samples, self.accelerator.reduce(self._count_items(batch_samples), "sum")

    def _count_items(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Items of the forget loss and counted tokens of the retain samples, of shape `(2,)`."""
        retained = [batch["retain_labels"] for batch in batches if "retain_labels" in batch]
        counts = [sum(map(self.count_forget_items, batches)), sum(is_counted(labels).sum() for labels in retained)]
        return torch.stack([torch.as_tensor(count, device=self.accelerator.device) for count in counts])

    def eval_datasets(self) -> list[Dataset]:
        """The evaluation sets, in the order of their sample ids."""
        if self.eval_dataset is None:
            return []
        return list(self.eval_dataset.values()) if isinstance(self.eval_dataset, dict) else [self.eval_dataset]

    def teacher_datasets(self) -> list[Dataset]:
        """The sets whose samples the teacher sees, forget set first; of the retain set only what will be drawn."""
        if isinstance(self.train_dataset, IterableDataset):  # live, sample by sample
            return []
        datasets = [self.train_dataset, *self.eval_datasets()]
        if self.retain_dataset is not None and self.args.retain_loss_type == "kl":
            epochs = range(math.ceil(self.args.num_train_epochs))
            if self.args.max_steps > 0 or len(epochs) * len(self.train_dataset) >= len(self.retain_dataset):
                return [*datasets, self.retain_dataset]
            drawn = {self._retain_sampler(epoch, i) for epoch in epochs for i in range(len(self.train_dataset))}
            datasets.append(self.retain_dataset.select(sorted(drawn)))
        return datasets

    # ---- Training ----

    @property
    def needs_teacher(self) -> bool:
        """Whether a frozen model enters the loss."""
        retain_kl = self.retain_dataset is not None and self.args.retain_loss_type == "kl"
        return self.uses_original_logits or self.uses_original_log_probs or self.uses_augmented_model or retain_kl

    def augmented_settings(self) -> dict[str, Any]:
        """Settings that decide what the augmented model becomes."""
        return {}

    def train_augmented(self, folder: Path) -> None:
        """Train the augmented model in the trainable parameters. To be defined where `uses_augmented_model`."""
        raise NotImplementedError

    def disable_dropout(self) -> None:
        """Switch off dropout, as a layer and as attention's argument."""
        disable_dropout_in_model(self.model)
        for module in self.model.modules():
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        checkpoint = complete_checkpoint(self.args.output_dir, resume_from_checkpoint)
        with ExitStack() as stack:
            stack.enter_context(self._saving_the_student_alone())
            # Before the Trainer loads the checkpoint: the model is still the original one.
            batch = self._first_batch()
            check_logits(Role(self.model), batch, self.accelerator)
            if self.args.disable_dropout:
                check_no_dropout(Role(self.model), batch, self.accelerator)
            if self.needs_teacher and self.teacher is None:
                if self._teacher_digest is not None:
                    raise ValueError(
                        "A live teacher (`precompute_teacher=False`) lasts for one `train()`, after which the model is no "
                        "longer the original. Construct a new trainer."
                    )
                self._teacher_fingerprint = teacher_fingerprint(self)
            expected_digest = None if checkpoint is None else check_same_run(checkpoint, self._run_record())
            if self.needs_teacher:
                self._hold_private_folder(checkpoint, stack)
                if self.teacher is None:
                    self._make_teacher(expected_digest, stack)
            if self._before is None:
                self._before = self._answer_probabilities("Answers before")
            set_seed(self.args.seed)  # whatever went on until here, the run is the same
            self._finished = False
            stopped = None if checkpoint is None else stopped_at(checkpoint)
            if stopped is not None:
                self.accelerator.print(
                    f"A callback had stopped this run at step {stopped}: it goes no further. To train on, start from its "
                    "model, or again without `resume_from_checkpoint`."
                )
                stack.callback(setattr, self.args, "max_steps", self.args.max_steps)
                self.args.max_steps = stopped
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            after = self._answer_probabilities("Answers after")
            if not all(torch.isfinite(probabilities).all() for probabilities in after.values()):
                raise FloatingPointError(
                    "The trained model's probabilities are not finite. The last checkpoint is good; lower `learning_rate`."
                )
            self._finished = True
            if self.is_world_process_zero():
                mark_finished(self.args.output_dir)
            if self._private_folder.is_open:
                self._private_folder.remove()
        before, self._before = self._before, None
        self._report_verdict(before, after, output)
        return output

    def _hold_private_folder(self, checkpoint: str | None, stack: ExitStack) -> None:
        has_teacher = self.teacher is not None  # an earlier `train()` has failed
        resuming = checkpoint is not None or has_teacher
        if self.accelerator.is_main_process:
            is_there = has_teacher or (resuming and self._private_folder.teacher_file.is_file())
            self._private_folder.open(resuming, 0 if is_there else needed_bytes(self))
            stack.callback(self._private_folder.release)
        self.accelerator.wait_for_everyone()
        if not self._private_folder.path.is_dir():
            raise ValueError(
                f"`teacher_cache_dir={str(self._private_folder.root)!r}` is not shared by all nodes. Set it to a folder that is."
            )

    def _make_teacher(self, expected_digest: str | None, stack: ExitStack) -> None:
        trainable = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self.teacher = prepare_teacher(self, self._private_folder, self._teacher_fingerprint, expected_digest, stack)
        self._teacher_digest = self.teacher.digest()
        if self.args.precompute_teacher:
            self.augmented_model = None  # its states are cached
        else:
            stack.callback(setattr, self, "teacher", None)
        for name, parameter in self.model.named_parameters():  # PEFT switches on what the user may have frozen
            parameter.requires_grad_(trainable.get(name, False))

    def _first_batch(self) -> dict[str, torch.Tensor]:
        batch = self.data_collator([next(iter(self.train_dataset))])
        return {key: tensor.to(self.accelerator.device) for key, tensor in batch.items()}

    def _answer_probabilities(self, description: str) -> dict[str, torch.Tensor]:
        """Probabilities of the forgotten and of the retained answers, at most `_VERDICT_SAMPLES` of each."""
        sets = {"forget": self.train_dataset, "retain": self.retain_dataset}
        return {
            name: probabilities_of_answers(
                Role(self.model),
                dataset.select(range(min(_VERDICT_SAMPLES, len(dataset)))),
                self.data_collator,
                self.args.per_device_train_batch_size,
                self.accelerator,
                description,
            )
            for name, dataset in sets.items()
            if isinstance(dataset, Dataset)
        }

    def _report_verdict(self, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], output) -> None:
        for name, what in (("forget", "forgotten"), ("retain", "retained")):
            if name in before:
                old, new = before[name].mean().item(), after[name].mean().item()
                output.metrics.update({f"{name}_prob_before": old, f"{name}_prob_after": new})
                self.accelerator.print(f"Mean probability of the {what} answers: {old:.3f} → {new:.3f}")
        if "forget" not in before:  # streamed
            return
        # A mean may hide single answers that stayed.
        kept = int((after["forget"] > 0.5 * before["forget"]).sum())
        output.metrics["forget_kept"] = kept
        self.accelerator.print(
            f"Forgotten answers still above half of what they were: {kept} of {len(after['forget'])}"
        )
        if output.metrics["forget_prob_after"] > 0.9 * output.metrics["forget_prob_before"]:
            logger.warning(
                f"The forgotten answers are about as likely as before, after {self.state.global_step} updates. Raise "
                "`learning_rate` first (LoRA and small models often need 1e-4 and more), then `num_train_epochs`"
                f"{self._verdict_hint()}."
            )

    def _verdict_hint(self) -> str:
        return ""

    # ---- Saving ----

    def _run_record(self) -> dict[str, Any]:
        return {
            "trl_rkld_version": __version__,
            "method": self._name,
            "finished": self._finished,
            "step": self.state.global_step,
            "forget_set": self.forget_set_hash,
            "num_forget": len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None,
            "retain_set": self.retain_set_hash,
            "adapter": self._adapter_hash(),
            "settings": self.method_settings(),
            "teacher": self._teacher_fingerprint,
            "teacher_digest": self._teacher_digest,
            **base_record(self.model),
        }

    def _adapter_hash(self) -> str | None:
        if self.student_adapter is None:
            return None
        parameters = self.model.named_parameters()
        return hash_tensors((name, p) for name, p in parameters if f".{self.student_adapter}." in f"{name}.")

    def method_settings(self) -> dict[str, Any]:
        """What decides the result, beside data and models: in the card, and the same for a run to be resumed."""
        settings = {"precompute_teacher": self.args.precompute_teacher}
        if self.retain_dataset is not None:
            settings["retain_coef"] = self.args.retain_coef
            settings["retain_loss_type"] = self.args.retain_loss_type
        return settings

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Written beside, then moved: a kill while they are written leaves the files of the last save as they were.
        output_dir = Path(output_dir if output_dir is not None else self.args.output_dir)
        partial_dir = output_dir / "_partial"
        shutil.rmtree(partial_dir, ignore_errors=True)
        with self._saving_the_student_alone():
            super()._save(str(partial_dir), state_dict)
        write_record(partial_dir, self._run_record())
        (partial_dir / "README.md").unlink(missing_ok=True)  # PEFT's blank card would replace ours
        for path in partial_dir.iterdir():
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        partial_dir.rmdir()
        if output_dir == Path(self.args.output_dir):
            self.create_model_card()

    @contextmanager
    def _saving_the_student_alone(self) -> Iterator[None]:
        """PEFT would save a live teacher's adapters, too, and so would callbacks that upload the model (W&B, DVCLive)."""
        if self.student_adapter is None:
            yield
            return
        outer = vars(self.model).get("save_pretrained")  # a checkpoint is saved while `train()` saves alone already
        save = type(self.model).save_pretrained
        self.model.save_pretrained = partial(save, self.model, selected_adapters=[self.student_adapter])
        try:
            yield
        finally:
            if outer is None:
                del self.model.save_pretrained
            else:
                self.model.save_pretrained = outer

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        model_name = model_name or Path(self.args.output_dir).name
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            record = self._run_record()
            extend_model_card(
                Path(self.args.output_dir, "README.md"),
                method=self._name,
                num_forget=record["num_forget"],
                forget_set=self.forget_set_hash,
                settings=self.method_settings() | {"learning_rate": self.args.learning_rate, "steps": record["step"]},
                is_adapter=self.student_adapter is not None,
            )

    def push_to_hub(self, *args, **kwargs):
        if self.student_adapter is not None:
            logger.warning(
                "An unmerged adapter is pushed: switching it off brings the forgotten knowledge back. Merge it first "
                "(`trl-rkld merge`) where others get it."
            )
        return super().push_to_hub(*args, **kwargs)


class _StopWhenForgotten(TrainerCallback):
    def __init__(self, trainer: UnlearningTrainer):
        self.trainer, self.asked_at = trainer, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.asked_at = None
        if state.global_step > 0 and float(state.epoch).is_integer():  # saved before the end of the epoch was told
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.asked_at == state.global_step:
            return
        self.asked_at = state.global_step
        probability = self.trainer._answer_probabilities("Forgotten yet?")["forget"].mean().item()
        if probability <= args.stop_at_forget_prob:
            self.trainer.accelerator.print(
                f"Stopping: the forgotten answers are at {probability:.3f}, `stop_at_forget_prob` is "
                f"{args.stop_at_forget_prob}."
            )
            control.should_training_stop = True
