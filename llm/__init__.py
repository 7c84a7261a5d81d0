# SPDX-License-Identifier: BSD-3-Clause
"""BlockLLM: block coordinate descent for language models. Not built yet; see CHANGELOG.md."""
