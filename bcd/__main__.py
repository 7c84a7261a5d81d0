# SPDX-License-Identifier: BSD-3-Clause
"""``python -m bcd``: the `bcd` command."""

from bcd.cli import main

main()
