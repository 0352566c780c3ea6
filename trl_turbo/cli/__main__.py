"""`python -m trl_turbo.cli`, as launchers start it: `accelerate launch -m trl_turbo.cli run script.py`."""

from trl_turbo.cli import main

if __name__ == "__main__":
    main()
