# SPDX-License-Identifier: Apache-2.0
"""Framework-free core: files, configs, key rules, skeletons, plans and reports."""
