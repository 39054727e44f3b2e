"""``python -m torchtitan_tp_validate`` is ``tp-validate``."""

from torchtitan_tp_validate.cli import main

raise SystemExit(main())
