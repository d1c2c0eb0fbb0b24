"""Turn a language model into a nested one: `python train.py model=tiny router=surrogate`, as `nestlm train` does."""

from nestlm.utils.interrupts import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # before the heavy imports
    from nestlm.config.commands import train

    train()
