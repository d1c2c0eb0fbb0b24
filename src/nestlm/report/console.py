"""Where results are printed: standard output. Progress goes to standard error."""

from rich.console import Console

output = Console(soft_wrap=True, highlight=False)
output.width = max(output.width, 100)  # a narrow table would cut names off
