# SPDX-License-Identifier: BSD-3-Clause
"""Scripts are run by run.py, not collected as tests."""

collect_ignore_glob = ["*.py"]
