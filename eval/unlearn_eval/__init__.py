# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The TOFU evaluation harness of trl-rkld. It never imports `trl_rkld`, and importing it loads nothing heavy."""
