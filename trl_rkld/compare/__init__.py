# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The paper's comparison: many methods, settings and seeds, trained and evaluated by one recipe (`trl-rkld compare`)."""
