"""Turn a language model into a nested one: `python train.py model=tiny router=surrogate`."""

from nestlm.utils.interrupts import listen

if __name__ == "__main__":
    listen()  # before the heavy imports
    from nestlm.config.compose import run

    run()
