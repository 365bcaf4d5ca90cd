# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from .prompts import OpenUnlearningTemplate, Template
from .questions import FORGET_SPLITS
from .records import LOCAL_SUFFIXES


BACKENDS = ("vllm", "transformers")
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class EvalConfig:
    r"""
    Configuration of [`evaluate`], and the flags of `trl-rkld eval`.

    Parameters:
        > Parameters that control the model

        model_name_or_path (`list[str]`):
            One or more models or adapters, folders or Hub ids. Adapters of one base share one engine.
        model_revision (`str`, *optional*, defaults to `"main"`):
            Revision of Hub ids.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"bfloat16"`, `"float16"`, `"float32"`, or `"auto"`: that of the checkpoint, or of an adapter's training.
        attn_implementation (`str`, *optional*):
            Attention implementation of the transformers backend.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Quantise the model, or an adapter's base, to 4 bits. Adapters that were trained so by this package are
            evaluated so anyway.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`):
            `"nf4"` or `"fp4"`.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`):
            Whether to quantise the scales, too.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the Hub may run.

        > Parameters that control the data

        forget_split (`str`, *optional*, defaults to `"forget10"`):
            TOFU's forget split: `"forget01"`, `"forget05"` or `"forget10"`.
        dataset_name (`str`, *optional*, defaults to `"locuslab/TOFU"`):
            TOFU: Hub id, or a folder with its files.
        forget_dataset, retain_dataset, holdout_dataset (`str`, *optional*):
            Records of your own instead of TOFU, in any format that the trainer takes; the holdout set, which no model
            has seen, is for membership inference.
        retain_logs (`str`, *optional*):
            `TOFU_EVAL.json` of the retain-only model, ours or open-unlearning's: for forget quality and privacy
            leakage.
        compare_to (`str`, *optional*):
            Model before unlearning: it is evaluated, too, and a report of before and after is written.
        question_key (`str`, *optional*, defaults to `"question"`):
            Column of the question in forget and retain set, such as `"paraphrased_question"`.
        max_samples (`int`, *optional*):
            Take the first rows of each set only.
        max_retain_samples (`int`, *optional*):
            Take no more rows of the retain set: for a model that has learnt only its first rows, or a comparison that
            needs no more.

        > Parameters that control the prompt

        system_prompt (`str`, *optional*):
            System message. If `None`, the chat template's own default applies.
        date_string (`str`, *optional*):
            Date shown to templates that print one; open-unlearning's Llama 3 models had `"10 Apr 2025"`.
        question_template (`str`, *optional*):
            Plain format with a `{question}` field, instead of the chat template.
        compat (`str`, *optional*):
            `"open_unlearning"` reproduces its token boundaries and attention mask (commit d3d7cf9); transformers
            backend only.

        > Parameters that control the computation

        backend, score_backend (`str`, *optional*):
            `"vllm"` or `"transformers"`, for generation (and scoring), and for scoring alone. Defaults to vLLM where
            it is installed, unless `compat` is set.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Largest number of tokens of a generated answer. 0 generates nothing, and leaves ROUGE out.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts that the transformers backend continues at once.
        batch_tokens (`int`, *optional*):
            Tokens that the transformers backend scores at once. Defaults to 2048 on a CPU and 8192 elsewhere.
        seed (`int`, *optional*, defaults to `0`):
            Seed. Scoring and greedy decoding draw nothing at random.
        tensor_parallel_size, data_parallel_size (`int`, *optional*, defaults to `1`):
            Passed to vLLM.
        gpu_memory_utilization (`float`, *optional*, defaults to `0.8`):
            Passed to vLLM. Scoring needs memory beside what vLLM plans for.

        > Parameters that control the output

        output_dir (`str`):
            Folder for `TOFU_EVAL.json` and `TOFU_SUMMARY.json`; with several models, a folder for each below it.
        log_texts (`bool`, *optional*, defaults to `False`):
            Whether to write questions, answers and generations into `TOFU_EVAL.json`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether the results of another model or of other settings in `output_dir` may be replaced.
    """

    model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Models or adapters: folders or Hub ids."}
    )
    model_revision: str = field(default="main", metadata={"help": "Revision of Hub ids."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights. 'auto': that of the checkpoint, or of an adapter's training.",
            "choices": list(DTYPES),
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation of the transformers backend."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise the model, or an adapter's base, to 4 bits."}
    )
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Quantisation type.", "choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Whether to quantise the scales, too."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code from the Hub may run."})
    forget_split: str = field(
        default="forget10", metadata={"help": "TOFU's forget split.", "choices": list(FORGET_SPLITS)}
    )
    dataset_name: str = field(
        default="locuslab/TOFU", metadata={"help": "TOFU: Hub id, or a folder with its JSONL files."}
    )
    forget_dataset: str | None = field(
        default=None, metadata={"help": "Records to forget, instead of TOFU: any file that the trainer takes."}
    )
    retain_dataset: str | None = field(default=None, metadata={"help": "Records to keep, instead of TOFU."})
    holdout_dataset: str | None = field(
        default=None, metadata={"help": "Records that no model has seen, for membership inference."}
    )
    retain_logs: str | None = field(
        default=None, metadata={"help": "TOFU_EVAL.json of the retain-only model, ours or open-unlearning's."}
    )
    compare_to: str | None = field(
        default=None, metadata={"help": "Model before unlearning: evaluated too, and a report is written."}
    )
    question_key: str = field(
        default="question",
        metadata={"help": "Column of the question in forget and retain set, such as paraphrased_question."},
    )
    max_samples: int | None = field(default=None, metadata={"help": "Take the first rows of each set only."})
    max_retain_samples: int | None = field(default=None, metadata={"help": "Take no more rows of the retain set."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message put before questions."})
    date_string: str | None = field(default=None, metadata={"help": "Date shown to templates that print one."})
    question_template: str | None = field(
        default=None, metadata={"help": "Plain format with a {question} field, instead of the chat template."}
    )
    compat: str | None = field(
        default=None,
        metadata={
            "help": "Reproduce open-unlearning's token boundaries and attention mask (transformers backend only).",
            "choices": ["open_unlearning"],
        },
    )
    backend: str | None = field(
        default=None,
        metadata={"help": "Backend. Defaults to vllm where it is installed.", "choices": list(BACKENDS)},
    )
    score_backend: str | None = field(
        default=None, metadata={"help": "Backend for scoring alone.", "choices": list(BACKENDS)}
    )
    max_new_tokens: int = field(
        default=200, metadata={"help": "Largest number of tokens of a generated answer; 0 leaves ROUGE out."}
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts that the transformers backend continues at once."})
    batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that the transformers backend scores at once (2048 on a CPU, 8192 elsewhere)."},
    )
    seed: int = field(default=0, metadata={"help": "Seed."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "Passed to vLLM."})
    data_parallel_size: int = field(default=1, metadata={"help": "Passed to vLLM."})
    gpu_memory_utilization: float = field(default=0.8, metadata={"help": "Passed to vLLM."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for TOFU_EVAL.json and TOFU_SUMMARY.json."})
    log_texts: bool = field(
        default=False, metadata={"help": "Write questions, answers and generations into TOFU_EVAL.json."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the results of another model or of other settings in output_dir."}
    )

    def __post_init__(self):
        if isinstance(self.model_name_or_path, str):  # from a YAML file
            self.model_name_or_path = [self.model_name_or_path]
        if not self.model_name_or_path:
            raise ValueError("`model_name_or_path` is required: the model or adapter to evaluate.")
        if self.output_dir is None:
            raise ValueError("`output_dir` is required: the folder for the results.")
        self.backend = self.backend or default_backend(self.compat)
        self.score_backend = self.score_backend or self.backend
        self._check()

    def _check(self) -> None:
        if self.forget_split not in FORGET_SPLITS:
            raise ValueError(f"`forget_split={self.forget_split!r}` is not one of {', '.join(FORGET_SPLITS)}.")
        for name in ("backend", "score_backend"):
            backend = getattr(self, name)
            if backend not in BACKENDS:
                raise ValueError(f"`{name}={backend!r}` is not one of {', '.join(BACKENDS)}.")
            if backend == "vllm" and self.compat is not None:
                raise ValueError(
                    f"`compat={self.compat}` hides tokens inside the prompt, which vLLM can't. Use `{name}=transformers`."
                )
            if backend == "vllm" and find_spec("vllm") is None:
                raise ValueError(f"`{name}=vllm`, but vLLM is not installed. Install it, or use `transformers`.")
        if self.compat not in (None, "open_unlearning"):
            raise ValueError(f"`compat={self.compat!r}` is unknown. Use `open_unlearning`.")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype={self.dtype!r}` is not one of {', '.join(DTYPES)}.")
        if self.question_template is not None and "{question}" not in self.question_template:
            raise ValueError("`question_template` must contain `{question}`, where the question goes.")
        least_values = {
            "max_samples": 1,
            "max_retain_samples": 1,
            "max_new_tokens": 0,
            "batch_size": 1,
            "batch_tokens": 1,
        }
        for name, least in least_values.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"`{name}={value}` must be at least {least}, and a whole number.")
        if self.forget_dataset is None and (self.retain_dataset is not None or self.holdout_dataset is not None):
            raise ValueError("`retain_dataset` and `holdout_dataset` go with `forget_dataset`: set that, too.")
        if self.forget_dataset is not None and self.question_key != "question":
            raise ValueError("`question_key` is for TOFU. Rename the column of your records to `question`.")
        if self.compare_to is not None and len(self.model_name_or_path) > 1:
            raise ValueError("`compare_to` is for one model: give one `model_name_or_path`.")
        if self.retain_logs is not None and not Path(self.retain_logs).exists():
            raise FileNotFoundError(
                f"`retain_logs={self.retain_logs!r}` does not exist: give the TOFU_EVAL.json of a retain-only model."
            )
        for name in ("forget_dataset", "retain_dataset", "holdout_dataset"):
            path = getattr(self, name)
            is_file = path is not None and Path(path).suffix.lower() in LOCAL_SUFFIXES
            if is_file and not Path(path).expanduser().is_file():
                raise FileNotFoundError(f"`{name}={path!r}` does not exist.")

    @property
    def template(self) -> Template:
        """How questions are put."""
        return (Template if self.compat is None else OpenUnlearningTemplate).of(self)


def default_backend(compat: str | None = None) -> str:
    """vLLM where it is installed and can do as `compat` (`str`, *optional*) says, else transformers."""
    return "vllm" if find_spec("vllm") is not None and compat is None else "transformers"
