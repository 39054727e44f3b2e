from tests.core.cli.conftest import config_file, tp_validate

__all__ = ["config_file", "tp_validate"]
