"""The entry point of the `nestlm` command, which listens to signals before it imports anything heavy."""

from nestlm.utils.interrupts import listen


def main() -> None:
    """Run a command line."""
    listen()
    from nestlm.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
