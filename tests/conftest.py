"""Loads the shared fixtures where tests run: the process that only hands tests to its workers needs no torch."""

import gc

import clean_environment  # noqa: F401

gc.disable()  # it would search the half million objects of the libraries again and again, a tenth of the time


def pytest_configure(config):
    if not config.getoption("numprocesses", None):
        for name in ("drawing", "finetuning"):
            config.pluginmanager.import_plugin(name)


def pytest_collection_finish():
    gc.enable()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()
