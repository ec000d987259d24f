# SPDX-License-Identifier: GPL-2.0
"""Guests that hand over memory by kexec: running them, their tests, the benchmark."""
