"""`python -m kdacli` is `kda`."""

from kdacli.main import main

main()
