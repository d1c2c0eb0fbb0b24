"""Turn a language model into a nested one: `python train.py model=tiny router=surrogate`."""

from nestlm.compose import run

if __name__ == "__main__":
    run()
