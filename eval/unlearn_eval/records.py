# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Records: from a file or the Hub, in any format that `SFTTrainer` takes or question/answer columns, to token ids."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml

from .prompts import Template, TokenizedAnswer, tokenize_conversation, tokenize_strings


LOCAL_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_FOR_SOME_ROWS = ("chat_template_kwargs", "tools")
_MAY_BE_CONVERSATIONS = ("prompt", "completion", "messages", "conversations")
FORMATS = (
    "question + answer, prompt + completion, messages, a text column (`dataset_text_field` in training), or input_ids "
    "(+ labels)"
)


def load_records(path_or_id: str, config: str | None = None, split: str = "train") -> Dataset:
    """
    Load a data set from a local file, or else from the Hub.

    Local files are read into memory and never pass through the shared `datasets` cache: forget sets hold what must not
    lie around.

    Args:
        path_or_id (`str`):
            JSON (a list of objects), JSONL, CSV or Parquet file, or a Hub id such as `"locuslab/TOFU"`.
        config (`str`, *optional*):
            Configuration of the Hub data set, such as `"forget05"`.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the Hub data set.

    Returns:
        [`~datasets.Dataset`]:
            The records, in memory where they came from a file.
    """
    path = Path(path_or_id).expanduser()
    if path.suffix.lower() not in LOCAL_SUFFIXES:
        if path.exists():
            raise ValueError(f"`{path_or_id}` is not a file of a known kind. Use one of {', '.join(LOCAL_SUFFIXES)}.")
        return load_dataset(path_or_id, name=config, split=split)
    if not path.is_file():
        raise FileNotFoundError(f"The data file `{path_or_id}` does not exist. Check `dataset_name` and the like.")
    try:
        rows = _read_rows(path)
    except UnicodeDecodeError:
        raise ValueError(f"`{path_or_id}` is not UTF-8 text. Save it as UTF-8.") from None
    except (ValueError, csv.Error) as error:  # the parsers' messages give positions, not texts
        raise ValueError(f"`{path_or_id}` can't be read as {path.suffix[1:]}: {error}.") from None
    if not rows:
        raise ValueError(f"`{path_or_id}` holds no records.")
    try:
        # `from_list` takes the first row's columns, and these may be wanted for later rows only.
        columns = [*rows[0], *(name for name in _FOR_SOME_ROWS if any(name in row for row in rows))]
        return Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])
    except (TypeError, ValueError):  # Arrow's message quotes the value
        raise ValueError(
            f"`{path_or_id}` mixes kinds of values in a column (texts and numbers, say). Make each column of one kind."
        ) from None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    with open(path, encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as file:
        if suffix == ".csv":
            return _read_csv(csv.DictReader(file))
        text = file.read()
    # A `.json` file that is no list has a record a line, as TOFU's own.
    is_list = suffix == ".json" and text.lstrip().startswith("[")
    rows = json.loads(text) if is_list else _read_json_lines(text.split("\n"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is not a list of objects")
    return rows


def _read_csv(reader: csv.DictReader) -> list[dict[str, str]]:
    rows = []
    for row in reader:
        if None in row or None in row.values():  # cells without a header, or missing ones
            raise ValueError(f"line {reader.line_num} has another number of cells than the header; quote commas")
        rows.append(row)
    return rows


def _read_json_lines(lines: Iterable[str]) -> list[Any]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise ValueError(f"line {number} is not JSON") from None
    return rows


def tokenize_record(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template) -> TokenizedAnswer:
    """
    Tokenise a question with its answer, a conversation, or a prompt and its completion as plain strings. Of
    `messages`, only the last turn of the assistant counts.

    Args:
        row (`dict`):
            Row with `question` and `answer`, `messages`, or `prompt` and `completion`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        template ([`~unlearn_eval.prompts.Template`]):
            How questions are put.

    Returns:
        [`~unlearn_eval.prompts.TokenizedAnswer`]:
            Prompt and counted token ids.
    """
    columns = _columns_used(row)
    if columns == ("question", "answer"):
        return template.tokenize(tokenizer, row["question"], row["answer"])
    if columns == ("prompt", "completion"):
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(completion, str):
            return tokenize_strings(tokenizer, prompt, completion)
    else:
        messages = maybe_convert_to_chatml({column: row[column] for column in columns})["messages"]
        prompt, completion = messages[:-1], messages[-1:]
    if not completion or completion[-1]["role"] != "assistant":
        raise ValueError("the last message is not one of the assistant, so there is no answer to count")
    if template.system_prompt is not None and (not prompt or prompt[0]["role"] != "system"):
        prompt = [{"role": "system", "content": template.system_prompt}, *prompt]
    template_kwargs = (row.get("chat_template_kwargs") or {}) | template.chat_kwargs
    if row.get("tools"):
        template_kwargs["tools"] = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
    return tokenize_conversation(tokenizer, prompt, completion, **template_kwargs)


def _columns_used(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What [`tokenize_record`] reads of a row, in its order of preference."""
    for pair in (("question", "answer"), ("prompt", "completion")):
        if set(pair) <= row.keys():
            return pair
    conversations = (name for name in ("messages", "conversations") if isinstance(row.get(name), list))
    return tuple(conversations)[:1]


def is_tokenized_here(row: dict[str, Any]) -> bool:
    """Whether a row is for [`tokenize_record`], rather than for TRL's own preparation of texts and tokens."""
    return "input_ids" not in row and bool(_columns_used(row))


def labels_of(row: Mapping[str, Any]) -> list[int]:
    """Labels of a tokenised row as TRL makes them: its own, or its tokens where all of its masks are 1."""
    if row.get("labels"):
        return row["labels"]
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if row.get(name)]
    return [token if all(bits) else -100 for token, *bits in zip(row["input_ids"], *masks, strict=True)]


def check_columns(row: dict[str, Any], text_field: str, name: str) -> None:
    """Raise where a data set has none of the known formats."""
    if "input_ids" in row or is_tokenized_here(row) or text_field in row:
        return
    raise ValueError(
        f"The {name} dataset has the columns {column_names(row)}; expected {FORMATS}. Rename its columns."
    )


def column_names(row: Mapping[str, Any]) -> list[str]:
    """Columns, for messages. Of a CSV file without a header the "names" are the first record: these are not shown."""
    return sorted(str(column) if str(column).isidentifier() else "(not a name)" for column in row)


def check_answers(rows: Iterable[dict[str, Any]], name: str, text_field: str = "text") -> None:
    """
    Raise, with the number of the row, where a question, a prompt, an answer or a text is missing, blank or no text.
    All rows are of the first one's format.
    """
    columns = ()
    for index, row in enumerate(rows):
        if index == 0 and "input_ids" not in row:
            columns = _columns_used(row) or (text_field,)
        for column in columns:
            complaint = _complaint(row[column], column)
            if complaint is not None:
                raise ValueError(f"Row {index} of the {name} dataset has {complaint} (Rows count from 0.)")


def _complaint(value: Any, column: str) -> str | None:
    """What is wrong with a row's text, or with the last message of its conversation, and the remedy."""
    kinds = str
    if isinstance(value, list) and column in _MAY_BE_CONVERSATIONS:
        if not all(isinstance(turn, dict) and (turn.get("role") or turn.get("from")) for turn in value):
            return f"a message without `role` in `{column}`. Messages have `role` and `content`."
        value = (value[-1].get("content") or value[-1].get("value")) if value else None
        kinds = str | list  # a message may be of several parts
    if value is None or (isinstance(value, str) and not value.strip()):
        return f"an empty or missing `{column}`. Fill it in or remove the row."
    if not isinstance(value, kinds):
        return f"a `{column}` of type {type(value).__name__}. Write it as text, in quotes."
    return None
