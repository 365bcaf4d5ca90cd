# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Two files a method. The classes are imported from `trl_rkld`."""
