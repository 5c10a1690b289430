"""Loads the shared fixtures where tests run: the process that only hands tests to its workers needs no torch."""

import clean_environment  # noqa: F401


def pytest_configure(config):
    if not config.getoption("numprocesses", None):
        for name in ("drawing", "finetuning"):
            config.pluginmanager.import_plugin(name)
