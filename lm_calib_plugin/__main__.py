"""``python -m lm_calib_plugin`` is the ``lm-calib`` command."""

from __future__ import annotations

from lm_calib_plugin.cli import main

if __name__ == "__main__":
    main()
