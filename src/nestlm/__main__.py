"""The entry point of the command `nestlm`. It handles signals before it imports anything heavy."""

from nestlm.utils.interrupts import exit_on_signals


def main() -> None:
    """Run the command line of this process."""
    exit_on_signals()
    from nestlm.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
