"""`python -m mehdb`: the same as the `mehdb` command."""

from mehdb.cli import main

main()
