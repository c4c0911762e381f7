"""
The end of a run says what this machine could not show, in a section of its own.

Where there is no PostgreSQL server, the files that only run on one are left out of the coverage, the others are not
held to its goal, because they have branches that only run there, and that is said too.
"""

from collections import Counter

import pytest

ONLY_ON_POSTGRESQL = ["*/kkt_buffer/postgresql/*", "*/kkt_buffer/move.py", "*/kkt_buffer/cli/move.py"]


def _not_proven(config):
    """The reasons for which tests were skipped, with their number."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reasons = (report.longrepr[2] for report in reporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple))
    return Counter(
        reason.removeprefix("Skipped: NOT PROVEN: ") for reason in reasons if reason.startswith("Skipped: NOT PROVEN: ")
    )


def _without_server(config):
    return any(reason.startswith("PostgreSQL: ") for reason in _not_proven(config))


def _coverage(config):
    """The plugin that reports the coverage, or None if it is not measured."""
    plugin = config.pluginmanager.get_plugin("_cov")
    return plugin if plugin and plugin.cov_controller else None


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtestloop(session):
    """After the last test, before pytest-cov reports: trylast makes this the innermost wrapper."""
    result = yield
    config = session.config
    if not hasattr(config, "workerinput") and _without_server(config) and (coverage := _coverage(config)):
        coverage.cov_controller.combining_cov.set_option("report:omit", ONLY_ON_POSTGRESQL)
        coverage.options.cov_fail_under = None
    return result


def pytest_terminal_summary(terminalreporter, config):
    """Say what was not proven."""
    if not (reasons := _not_proven(config)):
        return
    terminalreporter.section("NOT PROVEN", sep="!", red=True, bold=True)
    for reason, number in reasons.items():
        terminalreporter.line(f"NOT PROVEN, {number} tests: {reason}", red=True)
    if _without_server(config) and _coverage(config):
        left_out = ", ".join(ONLY_ON_POSTGRESQL)
        terminalreporter.line(f"LEFT OUT of the coverage, because it only runs on PostgreSQL: {left_out}", red=True)
        terminalreporter.line("The coverage of the rest has NO GOAL here: parts of it only run there too.", red=True)
