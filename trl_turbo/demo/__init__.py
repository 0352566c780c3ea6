"""What `trl-turbo demo` runs: a small model, an unmodified TRL script, a measurement and a reward curve."""
