"""Every difference between versions of TRL, transformers, PEFT and vLLM: one probe or shim each.

Only this package compares versions.
"""
