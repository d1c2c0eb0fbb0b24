"""The entry point of the `nestlm` command, which listens to signals before it imports anything heavy."""

from nestlm.utils.interrupts import exit_on_signals


def main() -> None:
    """Run a command line."""
    exit_on_signals()
    from nestlm.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
