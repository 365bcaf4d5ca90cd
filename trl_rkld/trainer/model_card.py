# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What an unlearned model's card says beyond TRL's own: how it was made, and what else must be deleted."""

from pathlib import Path
from typing import Any


_SECTION = """## What was done to this model

This model was made to forget {records} with {method} ([trl-rkld](https://pypi.org/project/trl-rkld)).
{digest}No text of them is in this card.

| setting | value |
|---|---|
{settings}

{adapter_warning}### What else must be deleted

Forgetting in one copy does not reach the others. To honour a deletion request, also delete:

- the original model or adapter, and every earlier checkpoint of it that saw the records;
- older checkpoints of this run, with their optimiser state;
- an augmented model, if you asked to keep one (`augmented_output_dir`): it knows the records best of all;
- the forget set itself, its copies and caches, once the request is documented.

Whoever has both the model before and the model after can find out much of what was forgotten from the difference
([2505.24379](https://huggingface.co/papers/2505.24379)). A high forget quality does not prove that nothing is left:
quantising, relearning or sampling many answers may bring some of it back.

"""

ADAPTER_WARNING = """> [!WARNING]
> This is an adapter. **Switching it off brings the forgotten knowledge back**: the base model still holds it. Merge it
> (`trl-rkld merge`) before giving the model to others.

"""


def extend_model_card(
    path: Path,
    method: str,
    num_forget: int | None,
    forget_set: str | None,
    settings: dict[str, Any],
    is_adapter: bool,
):
    """
    Put the section on unlearning into a card that TRL wrote.

    Args:
        path (`Path`):
            `README.md` of the model.
        method (`str`):
            Name of the method.
        num_forget (`int`, *optional*):
            Number of forgotten records; unknown of a stream.
        forget_set (`str`, *optional*):
            SHA-256 of their token ids; unknown of a stream.
        settings (`dict`):
            Settings worth a row of the table.
        is_adapter (`bool`):
            Whether the model is an unmerged adapter.
    """
    section = _SECTION.format(
        records="streamed records" if num_forget is None else f"{num_forget} records",
        method=method,
        digest="" if forget_set is None else f"SHA-256 of their token ids: `{forget_set}`. ",
        settings="\n".join(f"| `{name}` | {value} |" for name, value in settings.items()),
        adapter_warning=ADAPTER_WARNING if is_adapter else "",
    )
    card = path.read_text(encoding="utf-8")
    # TRL knows models by their Hub ids only.
    card = card.replace("[None](https://huggingface.co/None)", "a local model", 1)
    card = card.replace('model="None"', f'model="{path.parent.name}"', 1)
    path.write_text(card.replace("### Framework versions", f"{section}### Framework versions", 1), encoding="utf-8")
