"""`python -m edgeguard` is the `edgeguard` command."""

from edgeguard.cli import main

raise SystemExit(main())
