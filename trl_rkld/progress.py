# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
from transformers import ProgressCallback


class NamedProgressCallback(ProgressCallback):
    """
    The Trainer's progress bar, with a name and some of the logged values, which are not printed.

    Args:
        name (`str`):
            Text of the bar.
        shown (`tuple[str, ...]`, *optional*, defaults to `()`):
            Names of the values.
    """

    def __init__(self, name: str, shown: tuple[str, ...] = ()):
        super().__init__()
        self.name, self.shown = name, shown

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and self.shown and self.shown[0] in logs:
            self.training_bar.set_postfix({key: f"{logs[key]:.2f}" for key in self.shown})
