# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""TOFU's metrics during training, after each epoch, on the model as it is; the best epoch is kept."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from .backends import AnswerScores, GenerateRequest
from .backends.transformers import TransformersBackend
from .config import EvalConfig
from .evaluation import check_retain_log, load_rows
from .files import read_json, write_json
from .metrics import rouge_scores
from .models import evaluating, without_peft
from .quantization import keep_quantized_weights, quantized_parameters
from .questions import QuestionSet, ends_of_answers, tofu_questions
from .results import EvalLog, RougeItem, read_log
from .tofu import SetScores, build_log


logger = get_logger(__name__)

Entry = dict[str, float]
"""Epoch, step and the values of one evaluation, by their names in [`TofuEvalCallback`]."""

BEST_FOLDER = "best"
RECORD_FILE = "tofu_eval.json"
PREFIX = "tofu_"

# Our names, and those of a log. What a log has as a null is left out.
_METRICS = {
    "forget_quality": "forget_quality",
    "forget_truth_ratio": "forget_truth_ratio",
    "forget_prob": "forget_Q_A_Prob",
    "forget_rouge": "forget_Q_A_ROUGE",
    "extraction_strength": "extraction_strength",
    "retain_prob": "retain_Q_A_Prob",
    "retain_truth_ratio": "retain_Truth_Ratio",
    "retain_rouge": "retain_Q_A_ROUGE",
}
_HIGHER_IS_BETTER = {
    "forget_quality": True,
    "ks_d": False,
    "forget_prob": False,
    "extraction_strength": False,
    "forget_rouge": False,
}


class TofuEvalCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that computes forget quality and a cheap utility before training and after each
    epoch, keeps the best epoch, and can stop early.

    It scores as [`evaluate`] does with the transformers backend, in the dtype of the weights unless told otherwise
    (only generation may run in the trainer's mixed precision), and leaves training as it would have been without. With
    several processes each scores a share of the questions.

    Logged, with the prefix `tofu_`: `forget_quality` and `ks_d` (with `retain_logs`), `forget_truth_ratio`,
    `forget_prob`, `extraction_strength`, `retain_prob`, `retain_truth_ratio`, with `generate` also `forget_rouge` and
    `retain_rouge`, and `utility`: the harmonic mean of the two (or three) values of the retain set. Never a text.

    Usage:
    ```python
    >>> trainer = RKLDTrainer(...)
    >>> callback = TofuEvalCallback(trainer, forget_split="forget10", retain_logs="retain90/TOFU_EVAL.json")
    >>> trainer.add_callback(callback)
    >>> trainer.train()
    >>> print(callback.best)  # the model is in <output_dir>/best
    ```

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer to which the callback will be attached: [`~trl.SFTTrainer`], one of this package, or another one of
            causal language models. On one device, or distributed by DDP.
        dataset_name, forget_split (`str`, *optional*, defaults to `"locuslab/TOFU"`, `"forget10"`):
            TOFU, as in [`EvalConfig`].
        forget_dataset, retain_dataset (`str`, *optional*):
            Records of your own instead of TOFU, both with its columns `question`, `answer`, `paraphrased_answer` and
            `perturbed_answer`.
        retain_logs (`str`, *optional*):
            `TOFU_EVAL.json` of the retain-only model: for forget quality.
        max_samples (`int`, *optional*):
            Take the first rows of each set only. The retain-only model's log must be made with the same number.
        max_retain_samples (`int`, *optional*, defaults to `100`):
            Take no more rows of the retain set.
        system_prompt, date_string, question_template (`str`, *optional*):
            As in the trainer's configuration: give the same.
        generate (`bool`, *optional*, defaults to `False`):
            Whether to generate answers, too, for ROUGE-L recall. Takes many times longer.
        batch_tokens (`int`, *optional*):
            Tokens that are scored at once. Defaults to 2048 on a CPU and 8192 elsewhere.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype to which the weights are rounded while they are evaluated: `"bfloat16"` halves the time, and is what
            [`evaluate`] with `dtype="bfloat16"` finds in the saved model. `"auto"` leaves them as they are.
        metric_for_best (`str`, *optional*, defaults to `"forget_quality"`):
            What makes an epoch the best: the highest `"forget_quality"`, or the lowest `"ks_d"`, `"forget_prob"`,
            `"extraction_strength"` or `"forget_rouge"`. Where two have the same, the one of higher utility.
        keep_best (`bool`, *optional*, defaults to `True`):
            Whether to save the best epoch's model in `<output_dir>/best`, with its values in `tofu_eval.json`.
        min_utility (`float`, *optional*, defaults to `0.9`):
            Share of the utility before training below which no epoch is the best.
        patience (`int`, *optional*):
            Number of epochs in a row without a better one after which training stops.

    Attributes:
        history (`list[dict]`):
            `epoch`, `step` and the values above, without the prefix, of each evaluation; the first is before training.
            A run that is resumed has those from before, too. Names that [`~unlearn_eval.plots.draw`] also has mean the
            same there; `utility` is not the `model_utility` of its x axis.
        best (`dict`, *optional*):
            The best epoch's entry.

    Raises:
        [`ValueError`]: If settings, data, log and trainer don't fit together, before training.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        dataset_name: str = "locuslab/TOFU",
        forget_split: str = "forget10",
        forget_dataset: str | None = None,
        retain_dataset: str | None = None,
        retain_logs: str | None = None,
        max_samples: int | None = None,
        max_retain_samples: int | None = 100,
        system_prompt: str | None = None,
        date_string: str | None = None,
        question_template: str | None = None,
        generate: bool = False,
        batch_tokens: int | None = None,
        dtype: str = "auto",
        metric_for_best: str = "forget_quality",
        keep_best: bool = True,
        min_utility: float = 0.9,
        patience: int | None = None,
    ):
        self.trainer, self.generate, self.metric_for_best = trainer, generate, metric_for_best
        self.keep_best, self.min_utility, self.patience = keep_best, min_utility, patience
        _check_rule(metric_for_best, retain_logs, generate)
        _check_numbers(max_retain_samples, min_utility, patience)
        _check_trainer(trainer)
        self.folder = Path(trainer.args.output_dir) / BEST_FOLDER
        if keep_best and self.folder.exists() and not (self.folder / RECORD_FILE).is_file():
            raise ValueError(
                f"`{self.folder}` is where the best epoch goes, and holds something else. Move it away, choose another "
                "`output_dir`, or set `keep_best=False`."
            )
        config = EvalConfig(
            model_name_or_path=[trainer.model.name_or_path or "the model in training"],
            output_dir=trainer.args.output_dir,
            backend="transformers",
            dataset_name=dataset_name,
            forget_split=forget_split,
            forget_dataset=forget_dataset,
            retain_dataset=retain_dataset,
            retain_logs=retain_logs,
            max_samples=max_samples,
            max_retain_samples=max_retain_samples,
            system_prompt=system_prompt,
            date_string=date_string,
            question_template=question_template,
            batch_tokens=batch_tokens,
            dtype=dtype,
        )
        if forget_dataset is not None and retain_dataset is None:
            raise ValueError(
                "`retain_dataset` is missing: the utility is measured on it. Give it with `forget_dataset`."
            )
        rows = load_rows(config)
        self.config = config
        self.sets: dict[str, QuestionSet] = {
            name: tofu_questions(name, rows[name], trainer.processing_class, config.template, config.question_key)
            for name in ("forget", "retain")
        }
        for name, one in self.sets.items():
            if generate and not one.is_read_by_rouge:
                raise ValueError(
                    f"`generate=True` is for ROUGE, which knows words of a to z only, and the answers of the {name} set are "
                    "written in other letters. Leave it out."
                )
        self.retain_log: EvalLog | None = None
        if retain_logs is not None:
            self.retain_log = read_log(retain_logs)
            check_retain_log(config, rows, self.retain_log)
        eos_token_id = without_peft(trainer.model).generation_config.eos_token_id
        answers = [answer for one in self.sets.values() for answer in one.answers]
        self.end_ids = ends_of_answers(trainer.processing_class, eos_token_id, answers)
        keep_quantized_weights(without_peft(trainer.model))  # a CPU would round their scales at the first evaluation
        self.history: list[Entry] = []
        self.best: Entry | None = None

    # ---- Events ----

    def on_train_begin(self, args, state, control, **kwargs):
        # A checkpoint holds all that was logged until then, and nothing else is needed to go on from there.
        self.history = [_read_entry(logs) for logs in state.log_history if f"{PREFIX}utility" in logs]
        self.best = None
        if state.global_step == 0:
            self._put_earlier_best_aside()
            self._evaluate(control)
            return
        self._resume()
        if float(state.epoch).is_integer():  # saved after an epoch's last step, maybe before its evaluation
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.history[-1]["step"] == state.global_step:
            return
        self._evaluate(control)
        if self._is_better(self.history[-1]):
            self.best = self.history[-1]
            if self.keep_best:
                self._save_best()
        waited = len(self.history) - 1 - self.history.index(self.best or self.history[0])
        if self.patience is not None and waited >= self.patience:
            self.trainer.accelerator.print(
                f"Stopping: no better epoch by {self.metric_for_best} in {waited}, `patience` is {self.patience}."
            )
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.best is None:
            logger.warning(
                f"No epoch is the best one: after each, utility was below `min_utility={self.min_utility:g}` of its value "
                "before training. Lower `learning_rate`, or `min_utility`."
            )

    # ---- Which epoch is the best ----

    def _is_better(self, entry: Entry) -> bool:
        if entry["step"] == 0 or entry["utility"] < self.min_utility * self.history[0]["utility"]:
            return False
        return self.best is None or self._rank(entry) > self._rank(self.best)

    def _rank(self, entry: Entry) -> tuple[float, float]:
        value = entry[self.metric_for_best]
        return (value if _HIGHER_IS_BETTER[self.metric_for_best] else -value), entry["utility"]

    def _resume(self) -> None:
        """Find the best epoch until the checkpoint again."""
        if not self.history or self.history[0]["step"] > 0 or self.metric_for_best not in self.history[0]:
            raise ValueError(
                "`resume_from_checkpoint`: the checkpoint was made without this callback, or with other settings: it does "
                f"not hold utility and `{self.metric_for_best}` before training. Start anew, or without the callback."
            )
        for entry in self.history:
            if self._is_better(entry):
                self.best = entry
        if self.keep_best and self.best is not None and self.trainer.args.should_save:
            path = self.folder / RECORD_FILE
            if not path.is_file() or read_json(path)["step"] != self.best["step"]:
                logger.warning(
                    f"`{self.folder}` does not hold the best epoch until this checkpoint ({self.best['epoch']:g}), but a later "
                    "one, after which the run was cut off, or nothing. The next better epoch takes its place."
                )

    def _save_best(self) -> None:
        partial = self.folder.with_name(f"_{BEST_FOLDER}_partial")  # the Trainer never pushes what starts with `_`
        if self.trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.trainer.save_model(str(partial), _internal_call=True)  # without pushing it to the Hub
        if self.trainer.args.should_save:
            write_json(partial / RECORD_FILE, {"metric_for_best": self.metric_for_best, **self.best})
            _replace_folder(partial, self.folder)

    def _put_earlier_best_aside(self) -> None:
        """What another run has left must not be taken for this one's."""
        if self.keep_best and self.folder.exists() and self.trainer.args.should_save:
            aside = self.folder.with_name(f"{BEST_FOLDER}_previous")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(self.folder, aside)
            logger.warning(f"`{self.folder}` held the best epoch of another run. It is now `{aside}`.")

    # ---- Evaluation ----

    def _evaluate(self, control) -> None:
        """Score the model, log the values and note them in the history."""
        trainer = self.trainer
        should_log = control.should_log
        # In training mode TRL's trainers would put the means of the last steps beside the values, and begin new ones.
        with evaluating(trainer.model), rounded_weights(trainer.model, self.config.dtype):
            values = self._values(self._scores())
            trainer.log({f"{PREFIX}{name}": value for name, value in values.items()})
        control.should_log = should_log  # `log` takes for done what the epoch's end still has to log
        self.history.append({"epoch": trainer.state.epoch, "step": trainer.state.global_step, **values})

    def _values(self, scores: dict[str, SetScores]) -> dict[str, float]:
        log = build_log(self.sets, scores, self.retain_log)
        values = {name: log[metric]["agg_value"] for name, metric in _METRICS.items()}
        values["ks_d"] = log["forget_quality"].get("ks_d")
        values = {name: value for name, value in values.items() if value is not None}

        from scipy.stats import hmean

        values["utility"] = float(hmean([value for name, value in values.items() if name.startswith("retain_")]))
        return values

    def _scores(self) -> dict[str, SetScores]:
        """What the model makes of the questions, each asked in one of the processes."""
        accelerator = self.trainer.accelerator
        questions = [(name, i) for name, one in self.sets.items() for i in range(len(one.answers))]
        share = questions[accelerator.process_index :: accelerator.num_processes]
        config = self.config
        backend = TransformersBackend(self.trainer.model, self.end_ids, config.batch_tokens, config.batch_size)
        results = list(zip(share, self._score(backend, share), self._generate(backend, share), strict=True))
        by_question = {question: result for question, *result in gather_object(results)}
        return {
            name: _set_scores([by_question[name, i] for i in range(len(one.answers))], self.generate)
            for name, one in self.sets.items()
        }

    def _score(self, backend: TransformersBackend, questions: Sequence[tuple[str, int]]) -> list[list[AnswerScores]]:
        """Scores of all answers to each question: the true one, its paraphrase, and the wrong ones."""
        answers = [self.sets[name].answers_of(i) for name, i in questions]
        requests = [answer for group in answers for answer in group]
        is_silent = self.trainer.args.disable_tqdm or not self.trainer.accelerator.is_local_main_process
        scored = backend.score(requests)
        scores = dict(tqdm(scored, "Scoring", len(requests), leave=False, unit="answers", disable=is_silent))
        # Only membership inference needs the moments: they would double what the processes exchange.
        ordered = iter(scores[index]._replace(means=None, variances=None) for index in range(len(scores)))
        return [[next(ordered) for _ in group] for group in answers]

    def _generate(
        self, backend: TransformersBackend, questions: Sequence[tuple[str, int]]
    ) -> Sequence[RougeItem | None]:
        """ROUGE scores of the generated answer to each question."""
        if not self.generate or not questions:
            return [None] * len(questions)
        limit = self.config.max_new_tokens
        generations = dict(
            backend.generate([GenerateRequest(self.sets[name].prompts[i], limit) for name, i in questions])
        )
        tokenizer = self.trainer.processing_class
        return rouge_scores(
            [self.sets[name].references[i] for name, i in questions],
            [
                tokenizer.decode(generations[index], skip_special_tokens=True).strip()
                for index in range(len(questions))
            ],
        )


@contextmanager
def rounded_weights(model: nn.Module, dtype: str) -> Iterator[None]:
    """
    Hold a model's weights in another dtype for a while. They come back as they were, bit for bit.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model. Quantised weights stay as they are, and so do an adapter's, as in [`evaluate`].
        dtype (`str`):
            `"bfloat16"`, `"float16"`, `"float32"`, or `"auto"` to change nothing.
    """
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    left = quantized_parameters(model)  # which may be stored as floats, and are none
    if isinstance(model, PeftModel):
        left |= {id(parameter) for name, parameter in model.named_parameters() if model.base_model.prefix in name}
    changed = [
        parameter
        for parameter in model.parameters()
        if wanted not in (None, parameter.dtype) and parameter.is_floating_point() and id(parameter) not in left
    ]
    kept = [parameter.data for parameter in changed]
    try:
        for parameter in changed:
            parameter.data = parameter.data.to(wanted)
        yield
    finally:
        for parameter, data in zip(changed, kept, strict=False):
            parameter.data = data


def _set_scores(results: Sequence[tuple[list[AnswerScores], RougeItem | None]], generate: bool) -> SetScores:
    scores, rouge = zip(*results, strict=True)
    return SetScores(
        answers=[group[0] for group in scores],
        paraphrased=[group[1] for group in scores],
        perturbed=[group[2:] for group in scores],
        rouge=list(rouge) if generate else None,
    )


def _read_entry(logs: Mapping[str, Any]) -> Entry:
    values = {name.removeprefix(PREFIX): value for name, value in logs.items() if name.startswith(PREFIX)}
    return {"epoch": logs["epoch"], "step": logs["step"], **values}


def _replace_folder(new: Path, folder: Path) -> None:
    """Put a folder in another's place. The old one is deleted last: a kill halfway leaves it, or the new one, whole."""
    old = folder.with_name(f"_{folder.name}_old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _check_rule(metric_for_best: str, retain_logs: str | None, generate: bool) -> None:
    if metric_for_best not in _HIGHER_IS_BETTER:
        raise ValueError(f"`metric_for_best={metric_for_best!r}` is not one of {', '.join(_HIGHER_IS_BETTER)}.")
    if metric_for_best in ("forget_quality", "ks_d") and retain_logs is None:
        raise ValueError(
            f"`metric_for_best={metric_for_best!r}` compares with a retain-only model: give its log as `retain_logs`, or "
            "set `metric_for_best='forget_prob'` (the lower, the better)."
        )
    if metric_for_best == "forget_rouge" and not generate:
        raise ValueError("`metric_for_best='forget_rouge'` needs generated answers: set `generate=True`.")


def _check_numbers(max_retain_samples: int | None, min_utility: float, patience: int | None) -> None:
    for name, value in (("max_retain_samples", max_retain_samples), ("patience", patience)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}={value}` must be at least 1.")
    if not 0 <= min_utility <= 1:
        raise ValueError(f"`min_utility={min_utility}` must be in [0, 1]: a share of the utility before training.")


def _check_trainer(trainer: Trainer) -> None:
    if not isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        raise ValueError("The trainer has no tokenizer to ask questions with: pass it one as `processing_class`.")
    distributed_type = trainer.accelerator.distributed_type
    if distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"{distributed_type.value} is not supported: each process scores with whole weights. Use one process or DDP, "
            "or evaluate the saved checkpoints."
        )
